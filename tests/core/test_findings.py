"""The findings document: what it holds comes back, what breaks its schema is refused where it does, and why."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from typing import Any

import finding_samples
import pytest

from gptj.errors import CheckpointWarning, FormatError, LimitError, MissingFileError, ParityError
from gptj.parity import findings as module
from gptj.parity.findings import Findings, findings_schema
from gptj.parity.json_schema import check_schema

SAMPLES = ("full", "holding", "hostile", "huge")
SCHEMA = findings_schema()


def sample(name: str) -> Findings:
    return getattr(finding_samples, name)()


def same(one: object, other: object) -> bool:
    """Equality in which NaN is NaN."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("name", SAMPLES)
def test_all_of_it_comes_back(name):
    found = sample(name)
    again = Findings.from_json(found.to_json())
    assert same(again.as_dict(), found.as_dict())
    for field in dataclasses.fields(found):
        assert same(getattr(again, field.name), getattr(found, field.name)), field.name


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_written_follows_the_schema_and_names_nothing_else(name):
    unknown: list[str] = []
    document = json.loads(sample(name).to_json())
    check_schema(document, SCHEMA, unknown=unknown.append)
    assert unknown == []
    if importlib.util.find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        jsonschema.validate(document, SCHEMA)


def test_schema_and_dataclasses_have_the_same_members():
    kinds = {
        "measure": module.MeasureFound, "pair": module.PairFound, "tap": module.TapFound, "text": module.TextFound,
        "row": module.MeasureFound, "rung": module.LadderRung, "planted": module.PlantedMistake,
        "change": module.SmallestFound,
    }  # fmt: skip
    for name, kind in kinds.items():
        spelt = {field.name: "row" if (name, field.name) == ("row", "against") else field.name
                 for field in dataclasses.fields(kind)}  # fmt: skip
        members = {*spelt.values()}
        needed = {spelt[field.name] for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
        assert SCHEMA["$defs"][name]["properties"].keys() == members, name
        assert {*SCHEMA["$defs"][name]["required"]} == needed, name
    assert SCHEMA["properties"].keys() == {field.name for field in dataclasses.fields(Findings)} | {"findings"}


def test_numbers_that_are_not_finite_are_texts_and_unknown_ones_null():
    document = json.loads(finding_samples.full().to_json())
    assert document["measures"][1]["difference"] == "inf" and document["measures"][2]["limit"] is None
    assert document["texts"][1]["errors"][3:6] == ["nan", "inf", None]
    again = Findings.from_dict(document)
    assert again.measures[1].difference == math.inf and math.isnan(again.texts[1].errors[3])  # type: ignore[arg-type]


def breakages() -> list[tuple[tuple[str | int, ...], Any, str]]:
    """For every member of the full sample, values that it must not have, found by its kind in the schema."""
    found: list[tuple[tuple[str | int, ...], Any, str]] = []

    def walk(value: Any, schema: dict[str, Any], place: tuple[str | int, ...]) -> None:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        last = str(place[-1]) if place and isinstance(place[-1], str) else ""
        if isinstance(value, dict):
            found.append((place, [], last))
            for name in schema.get("required", ()):
                found.append(((*place, name), ..., name))
            for name, member in value.items():
                rule = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
                if rule is not None:
                    walk(member, rule, (*place, name))
        elif isinstance(value, list):
            found.append((place, {}, last))
            if value:
                walk(value[0], schema["items"], (*place, 0))
        else:
            wrong = {"x": 1} if value is None or isinstance(value, str) else [value]
            found.append((place, wrong, last))
            found.append((place, 1.5 if isinstance(value, str | bool) else "a text" if value is not None else {}, last))

    walk(json.loads(finding_samples.full().to_json()), SCHEMA, ())
    return [one for one in found if one[0]]


@pytest.mark.parametrize(("place", "wrong", "named"), breakages(), ids=lambda value: repr(value)[:60])
def test_a_member_of_another_kind_or_missing_is_named(place, wrong, named):
    document = json.loads(finding_samples.full().to_json())
    at: Any = document
    for step in place[:-1]:
        at = at[step]
    if wrong is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = wrong
    with pytest.raises(FormatError, match=r"findings\.json: .*(breaks its rule|is missing)") as caught:
        Findings.from_dict(document, file="findings.json")
    assert named in str(caught.value)
    assert caught.value.where is not None and str(place[0]) in caught.value.where


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"), ("[]", "not a JSON object"), ("{}", "findings: is missing"),
        ('{"findings": 1}', "verdict: is"),
        ('{"findings": true, "verdict": "holds", "headline": ""}', "expected 1, found True"),
        ('{"findings": 2, "verdict": "holds", "headline": ""}', "later version .*newer gptj"),
        ('{"findings": 1, "verdict": "maybe", "headline": ""}', "expected 'holds' or 'differs', found 'maybe'"),
        ('{"findings": 1, "verdict": "holds", "headline": "", "texts": [{"a": "", "b": "", "prompt": -1, "tokens": 1, '
         '"first_difference": null}]}', r"texts\[0\]\.prompt: .*integer of at least 0, found -1"),
        ('{"findings": 1, "verdict": "holds", "headline": "", "verdict": "differs"}', "stands twice"),
        ('{"findings": 1, "verdict": "holds", "headline": NaN}', "NaN is not JSON"),
        ("\udcff", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused(text, said):
    with pytest.raises(FormatError, match=said):
        Findings.from_json(text)


def test_a_verdict_that_contradicts_what_was_found_is_refused():
    document = finding_samples.full().as_dict() | {"verdict": "holds"}
    with pytest.raises(FormatError, match=r"verdict: contradicts what was found .*disagree on logits"):
        Findings.from_dict(document)
    assert not Findings.from_dict(finding_samples.holding().as_dict() | {"verdict": "differs"}).passed


@pytest.mark.parametrize("part", ["measures", "pairs", "texts", "matrix"])
def test_each_part_alone_contradicts_a_verdict(part):
    full = finding_samples.full()
    alone = dataclasses.replace(finding_samples.holding(), **{"measures": (), part: getattr(full, part)})
    with pytest.raises(FormatError, match="contradicts"):
        Findings.from_json(alone.to_json())


@pytest.mark.parametrize("part", ["measures", "pairs", "texts", "matrix", "ladder", "sensitivity", "smallest"])
def test_more_may_be_found_and_the_verdict_follows(part):
    more = finding_samples.full().as_dict()[part]
    found = finding_samples.holding().extended(**{part: more})
    assert len(getattr(found, part)) == len(more) + (2 if part == "measures" else 0)
    assert found.passed == (part in ("ladder", "sensitivity", "smallest"))
    assert found.passed or found.headline == next(found.wrong())
    again = finding_samples.full().extended(**{part: more[:1] if part != "pairs" else []})
    assert again.headline == finding_samples.full().headline and not again.passed


def test_what_is_added_follows_the_schema():
    with pytest.raises(FormatError, match=r"ladder\[0\]\.rung: is missing"):
        finding_samples.holding().extended(ladder=[{"backend": "pt"}])
    found = finding_samples.holding().extended(ladder=[{"backend": "pt", "rung": "int8", "kl": math.inf}])
    assert found.ladder[0].kl == math.inf and found.passed


def test_an_error_that_is_born_within_the_pairs_bound_is_wrong_too():
    tap = dataclasses.replace(finding_samples.pair().taps[0], born=True)
    assert tap.holds and not tap.right


def test_a_member_that_is_not_known_is_said_and_left_out():
    document = copy.deepcopy(finding_samples.holding().as_dict())
    document["measures"][0]["colour"] = "red"
    with pytest.warns(CheckpointWarning, match=r"f\.json: measures\[0\]\.colour: not known, and left out"):
        found = Findings.from_dict(document, file="f.json")
    assert same(found, finding_samples.holding())


def test_many_that_are_not_known_are_said_in_four_lines():
    document = finding_samples.holding().as_dict() | {f"x{n}": n for n in range(10)}
    with pytest.warns(CheckpointWarning) as said:
        Findings.from_dict(document)
    assert len(said) == 4 and "7 more members" in str(said[-1].message)


def test_files_are_read_and_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "f.json").write_text(finding_samples.full().to_json())
    assert not Findings.from_file(tmp_path / "f.json").passed
    with pytest.raises(MissingFileError, match="none"):
        Findings.from_file(tmp_path / "none")
    monkeypatch.setattr(module, "LARGEST_FILE_BYTES", 10)
    with pytest.raises(LimitError, match=r"f\.json: too large"):
        Findings.from_file(tmp_path / "f.json")


def test_failing_raises_the_headline_and_what_else_is_wrong():
    finding_samples.holding().raise_if_failed()
    with pytest.raises(ParityError, match=r"^models/tiny: tf first differs .*q_rotated.*disagree on logits"):
        finding_samples.full().raise_if_failed()


def test_the_checker_refuses_a_schema_that_it_does_not_know_all_of():
    with pytest.raises(AssertionError, match="pattern"):
        check_schema("x", {"type": "string", "pattern": "y"})


def test_findings_need_the_standard_library_alone():
    code = "import sys, gptj.parity.findings; print({'numpy', 'rich', 'torch', 'jax', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
