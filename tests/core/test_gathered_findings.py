"""What the parts of parity found, gathered into findings: nothing of it is lost, and the verdict is the same."""

from __future__ import annotations

import html

import numpy as np
import pytest
from mutants import MUTANTS
from recorded import facts_of, inputs_of, recorded_taps, small_batch, write_sample

from gptj.parity.comparison import Comparison
from gptj.parity.differences import compare_traces
from gptj.parity.findings import Findings
from gptj.parity.gather import findings_of_comparison, findings_of_folders, findings_of_report
from gptj.parity.report import Measure, ParityReport
from gptj.parity.reports.output import render
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.sensitivity import PlantedMistake, Sensitivity, SmallestChange
from gptj.parity.trace import Trace, open_trace, write_trace
from gptj.parity.two_folders import compare_two

CONFIG = revealing_config(n_layer=2, n_positions=512)
BATCH = small_batch(CONFIG)


def told(traces: list[Trace]) -> tuple[Comparison, Findings]:
    """A comparison, and its findings as they come back from a file."""
    comparison = compare_traces(traces)
    return comparison, Findings.from_json(findings_of_comparison(comparison, traces).to_json())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("base") / "base", CONFIG, batch=BATCH)


@pytest.mark.parametrize("name", ["epsilon 1e-6", "rotary sign", "softmax over queries", None])
def test_a_pair_has_its_taps_headline_and_signature(base, tmp_path, name):
    mutant = {None: None, **{mutant.name: mutant for mutant in MUTANTS}}[name]
    other = write_sample(tmp_path / "other", CONFIG, "float32", batch=BATCH, mutant=mutant)
    comparison, found = told([base, other])
    [pair], [difference] = found.pairs, comparison.pairs
    assert (pair.a, pair.b, pair.dtype) == ("base", "other", "float32")
    assert pair.headline == difference.headline and pair.looks_like == difference.looks_like
    assert [tap.tap for tap in pair.taps] == [tap.tap for tap in difference.taps]
    assert found.passed == comparison.passed == (mutant is None)
    assert found.headline == pair.headline and found.config["rotary_dim"] == CONFIG.rotary_dim
    assert name != "rotary sign" or pair.looks_like == "rotary sign"
    born = {tap.tap for taps in comparison.born.values() for tap in taps}
    assert {tap.tap for tap in pair.taps if tap.born} == born


def test_each_two_of_a_run_are_a_pair_too(base, tmp_path):
    """One wrong of three: its pairs differ at the same value, the pair of the other two holds, and all are mapped."""
    others = [write_sample(tmp_path / name, CONFIG, "float32", batch=BATCH, mutant=mutant)
              for name, mutant in (("pt", None), ("tf", next(m for m in MUTANTS if m.name == "rotary sign")),
                                   ("flax", None))]  # fmt: skip
    inside = compare_traces([base, *others], between=True)
    assert len(inside.pairs) == 3 and not compare_traces([base, *others]).between
    measure = Measure("tf", "oracle", "every value", 0.5, 0.1)
    report = ParityReport("float32", ("pt", "tf", "flax"), (measure,), (), (), 9.0, inside=inside)
    found = findings_of_report(report)
    assert [(pair.a, pair.b, pair.right) for pair in found.pairs] == [
        ("base", "pt", True), ("base", "tf", False), ("base", "flax", True),
        ("pt", "tf", False), ("pt", "flax", True), ("tf", "flax", False),
    ]  # fmt: skip
    assert {pair.looks_like for pair in found.pairs if not pair.right} == {"rotary sign"}
    wrong = found.pairs[3]
    assert "first differs from pt in block 0, rotated q: born there" in wrong.headline and len(wrong.taps) == 34
    page = render("html", found)
    assert page.count("<title>Heat map") == 6 and page.count("by what leaves each block</title>") == 6
    assert page.count("Map, depth and values") == 3
    assert page.count("<details open><summary>Map, depth and values") == 2, "folded where all holds"


@pytest.mark.parametrize("name", ["rotary sign", None])
def test_the_traces_of_a_run_are_its_pairs(base, tmp_path, name):
    mutant = {None: None, **{mutant.name: mutant for mutant in MUTANTS}}[name]
    other = write_sample(tmp_path / "pt", CONFIG, "float32", batch=BATCH, mutant=mutant)
    inside = compare_traces([base, other])
    planted = Sensitivity(
        "pt", "float32",
        (PlantedMistake("rotary sign", "h.0.q_rotated", 1.0, 0.1), PlantedMistake("none", "ln_f", 0.0, 1.0)),
        (SmallestChange("epsilon", "h.0.ln_1", float("inf"), "h.0.ln_1"),),
    )  # fmt: skip
    measure = Measure("pt", "oracle", "every value", 0.5 if mutant else 0.0, 0.1)
    report = ParityReport("float32", ("pt",), (measure,), (), (), 9.0, inside=inside, sensitivity=(planted,))
    found = findings_of_report(report)
    again = Findings.from_json(found.to_json())
    assert again.passed == (mutant is None)
    [pair] = again.pairs
    assert (pair.b, pair.dtype, len(pair.taps)) == ("pt", "float32", 34)
    assert pair.looks_like == inside.pairs[0].looks_like
    assert [(one.mutant, one.caught, one.expected) for one in again.sensitivity] == [
        ("rotary sign", True, "q_rotated"),
        ("none", False, "ln_f"),
    ]
    assert [(one.what, one.change, one.tap) for one in again.smallest] == [("epsilon", float("inf"), "h.0.ln_1")]


def texts(tokens: list[int], margin: float) -> dict[str, np.ndarray]:
    """One prompt's text."""
    seconds = [9] * len(tokens)
    logits = np.stack([np.full(len(tokens), 2.0), np.full(len(tokens), 2.0 - margin)], -1)
    return {
        "generated.prompt_ids": np.array([[1, 2]]), "generated.prompt_mask": np.array([[1, 1]]),
        "generated.token_ids": np.array([tokens]), "generated.top_ids": np.stack([tokens, seconds], -1)[None],
        "generated.top_logits": logits.astype(np.float32)[None],
    }  # fmt: skip


def with_extras(path, extras: dict[str, np.ndarray], dtype: str) -> Trace:
    write_trace(path, recorded_taps(CONFIG, BATCH, dtype), facts_of(CONFIG, dtype), inputs=inputs_of(BATCH),
                extras=extras)  # fmt: skip
    return open_trace(path)


@pytest.mark.parametrize(("margin", "right"), [(1e-7, True), (0.5, False)])
def test_texts_that_part_are_there_with_whether_that_is_a_tie(tmp_path, margin, right):
    traces = [with_extras(tmp_path / "a", texts([3, 4, 5], margin), "float64"),
              with_extras(tmp_path / "b", texts([3, 6, 7], margin), "float32")]  # fmt: skip
    comparison, found = told(traces)
    [text], [difference] = found.texts, comparison.texts
    assert (text.a, text.b, text.prompt, text.tokens, text.first_difference) == ("a", "b", 0, 3, 1)
    assert text.bound == difference.bound and text.errors == difference.errors and text.tie is right
    assert found.passed is comparison.passed is right
    if not right:
        assert found.headline == str(difference) and "part at new token 1" in found.headline


def test_texts_that_are_the_same_hold(tmp_path):
    traces = [with_extras(tmp_path / name, texts([3, 4], 0.5), "float32") for name in "ab"]
    _, found = told(traces)
    assert found.passed and found.texts[0].first_difference is None and found.texts[0].right


@pytest.mark.parametrize("wrong", [1.0, 1.5, np.nan])
def test_gradients_are_rows_of_the_matrix(tmp_path, wrong):
    values = {f"grad.{name}": value for name, value in revealing_weights(CONFIG).items() if "ln_f" in name}
    other = {name: value * np.float32(wrong if name.endswith("bias") else 1) for name, value in values.items()}
    traces = [with_extras(tmp_path / "a", values, "float64"), with_extras(tmp_path / "b", other, "float32")]
    comparison, found = told(traces)
    assert [(row.backend, row.against, row.what) for row in found.matrix] == [
        ("b", "gradient against a", one.parameter) for one in comparison.gradients
    ]
    assert found.passed == comparison.passed == (wrong == 1.0)
    assert [row.holds for row in found.matrix] == [one.holds for one in comparison.gradients]


def test_two_folders_are_a_pair_and_a_rung_for_each_backend(base, tmp_path):
    weights = {**revealing_weights(CONFIG)}
    weights["transformer.h.1.mlp.fc_out.weight"] = weights["transformer.h.1.mlp.fc_out.weight"] * np.float32(1.5)
    tuned = write_sample(tmp_path / "tuned", CONFIG, "float32", batch=BATCH, weights=weights)
    far = [compare_two(backend, base, tuned) for backend in ("pt", "tf")]
    found = Findings.from_json(findings_of_folders(far, "models/base", "models/tuned").to_json())
    assert not found.passed and "tuned first differs from base in block 1, fc_out" in found.headline
    assert [(pair.a, pair.b) for pair in found.pairs] == [("base in pt", "tuned in pt"), ("base in tf", "tuned in tf")]
    assert [(rung.backend, rung.rung, rung.kl, rung.top1) for rung in found.ladder] == [
        (one.backend, "tuned", one.divergence[0], one.agreement) for one in far
    ]
    assert "What stands as precisions is models/tuned against models/base." in found.notes
    for kind in ("html", "junit", "markdown"):
        assert "models/tuned" in html.unescape(render(kind, found))


def test_two_folders_that_are_equal_hold(base, tmp_path):
    again = write_sample(tmp_path / "again", CONFIG, "float32", batch=BATCH)
    found = findings_of_folders([compare_two("pt", base, again)], "models/base", "models/again")
    assert found.passed and found.headline == "models/again equals models/base within rounding, in pt"
