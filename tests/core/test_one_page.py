"""`gptj parity DIR --dtype A,B --matrix --ladder`: one page, and all reports, hold it all; no framework runs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from recorded import small_batch, write_sample

from gptj.checkpoint import write_checkpoint
from gptj.command import invariance, one_folder
from gptj.command.main import gptj_command
from gptj.parity.differences import compare_traces
from gptj.parity.findings import Findings, LadderRung, MeasureFound
from gptj.parity.gather import join_findings
from gptj.parity.oracle import Oracle
from gptj.parity.report import Measure, ParityReport
from gptj.parity.reports.page import render_page
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.trace_record import texts_of

CONFIG = revealing_config(n_layer=1, n_positions=64)
SECTIONS = (
    "Where computations part",
    "Along generated tokens",
    "Measures",
    "Invariances",
    "Precisions against float64",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("one") / "model", CONFIG, revealing_fill())


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """An oracle's trace and a float32 one, both with greedy texts, compared."""
    folder = tmp_path_factory.mktemp("traces")
    batch = small_batch(CONFIG)
    traces = []
    for name, dtype in (("oracle", "float64"), ("pt", "float32")):
        oracle = Oracle(CONFIG, revealing_weights(CONFIG), dtype=dtype)
        ids, mask = batch.input_ids[:, :4], np.ones_like(batch.input_ids[:, :4])
        made, logits = oracle.generate(ids, mask, max_new_tokens=5)
        trace = write_sample(folder / name, CONFIG, dtype, batch=batch, extras=texts_of(ids, mask, made[:, 4:], logits))
        traces.append(dataclasses.replace(trace, name=name))
    return compare_traces(traces)


@pytest.fixture
def asked(folder, inside, monkeypatch):
    """What was run, with stand-ins for what starts processes."""
    runs: list[tuple] = []

    def run_parity(directory, backends, *, dtype, **options):
        runs.append((dtype, tuple(backends), options["check_manifest"]))
        measures = (Measure("pt", "oracle", "logits", 1e-6, 2e-5, "row 0"),)
        versions = {"pt": {"torch": "2.13.0"}}
        return ParityReport(dtype, ("pt",), measures, (), (), 9.0, versions, str(directory), "checked", inside)

    def run_matrix(directory, backends, *, dtype, **_):
        runs.append(("matrix", tuple(backends), dtype))
        row = MeasureFound("pt", "cached", "logits", 1e-7, 2e-6, True)
        return Findings("holds", "all 1 rows hold", str(directory), CONFIG.to_dict(), {}, ("a note",), matrix=(row,))

    def run_ladder(directory, backends, **_):
        runs.append(("ladder", tuple(backends)))
        return Findings("holds", "1 rung", str(directory), ladder=(LadderRung("pt", "int8", 0.1, 1e-5, 0.9, 0.8, 8),))

    for place in (invariance, one_folder):
        monkeypatch.setattr(place, "installed_backends", lambda: ("pt",))
    monkeypatch.setattr(invariance.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("gptj.parity.run.run_parity", run_parity)
    monkeypatch.setattr("gptj.parity.matrix.run_matrix", run_matrix)
    monkeypatch.setattr("gptj.parity.ladder.run_ladder", run_ladder)
    monkeypatch.setattr("gptj_conversion.round_trip.through_formats", lambda *_: ({}, []))
    return runs


def run(*words):
    return CliRunner().invoke(gptj_command, ["parity", *map(str, words)])


def test_one_command_gives_one_page_and_every_report_holds_its_parts(folder, asked, tmp_path):
    files = {kind: tmp_path / f"all.{kind}" for kind in ("html", "junit", "markdown", "json")}
    options = [word for kind, path in files.items() for word in (f"--{kind}={path}",)]
    done = run(folder, "--dtype", "float32,bfloat16", "--matrix", "--ladder", *options)
    assert done.exit_code == 0, done.output
    assert asked == [("float32", ("pt",), True), ("bfloat16", ("pt",), False), ("matrix", ("pt",), "float32"),
                     ("ladder", ("pt",))]  # fmt: skip
    found = Findings.from_file(files["json"])
    assert [(pair.b, pair.dtype) for pair in found.pairs] == [("pt", "float32"), ("pt", "bfloat16")]
    assert {measure.backend for measure in found.measures} == {"pt float32", "pt bfloat16"}
    assert [text.b for text in found.texts] == ["pt float32"] * 2 + ["pt bfloat16"] * 2
    assert all(len(text.errors) == 5 and max(text.errors) > 0 for text in found.texts)
    assert len(found.matrix) == len(found.ladder) == 1 and found.config["n_layer"] == 1 and "a note" in found.notes
    assert found.headline.endswith("; all 1 rows hold; 1 rung") and found.versions == {"pt": {"torch": "2.13.0"}}
    page = files["html"].read_text(encoding="utf-8")
    assert page == render_page(found) and page.count('class="heat"') == 2
    assert page.count('class="chart"') == 2 + 2 * 2, "depth of each dtype; of each, a chart for each of two prompts"
    for title in SECTIONS:
        assert page.count(title) == 2, title  # the link and the heading
    for kind in ("junit", "markdown"):
        text = files[kind].read_text(encoding="utf-8")
        assert (
            "cached" in text
            and "int8" in text
            and "bfloat16" in text
            and "prompt 1" in text.replace("| 1 |", "prompt 1")
        )
    assert (
        "Invariances" in done.output and "Against float64" in done.output and "all agree: pt in bfloat16" in done.output
    )


def test_json_on_stdout_has_the_parts_too(folder, asked):
    one = json.loads(run(folder, "--ladder", "--json").output)
    assert one["passed"] and one["dtype"] == "float32" and one["ladder"][0]["rung"] == "int8" and "matrix" not in one
    several = json.loads(run(folder, "--dtype", "float64,float16", "--matrix", "--json").output)
    assert several["passed"] and [report["dtype"] for report in several["reports"]] == ["float64", "float16"]
    assert several["matrix"][0]["row"] == "cached" and ("matrix", ("pt",), "float64") in asked


def test_a_row_that_differs_is_the_verdict_of_all(folder, asked, monkeypatch, tmp_path):
    wrong = Findings("differs", "a row differs", matrix=(MeasureFound("pt", "cached", "logits", 1.0, 0.1, False),))
    monkeypatch.setattr("gptj.parity.matrix.run_matrix", lambda *_, **__: wrong)
    done = run(folder, "--matrix", "--html", tmp_path / "p.html", "--json")
    assert done.exit_code == 1 and '"passed": false' in done.output
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "✗ differs" in page and "a row differs" in page and "pt, cached: logits" in page


@pytest.mark.parametrize("words", [
    ["DIR", "--matrix", "--weights", "model.safetensors"], ["DIR", "--ladder", "--adapter", "a"],
    ["DIR", "DIR", "--matrix"], ["DIR", "DIR", "--ladder"], ["DIR", "DIR", "--dtype", "float32,float64"],
    ["DIR", "--dtype", "float32,float32"], ["DIR", "--dtype", "float32,"],
])  # fmt: skip
def test_what_cannot_be_asked_together_is_refused_before_anything_runs(folder, asked, words):
    done = run(*(folder if word == "DIR" else word for word in words))
    assert done.exit_code == 2 and not asked and "Error: " in done.output


def test_findings_are_joined_under_the_headline_of_the_first_that_differs():
    right = Findings("holds", "right", "a", notes=("one",), versions={"pt": {"torch": "1"}})
    wrong = Findings("differs", "wrong", notes=("one", "two"), versions={"pt": {"torch": "2"}, "tf": {}})
    found = join_findings(right, wrong, right)
    assert (found.verdict, found.headline, found.folder, found.notes) == ("differs", "wrong", "a", ("one", "two"))
    assert found.versions == {"pt": {"torch": "1"}, "tf": {}}
    assert join_findings(right, right).headline == "right; right"


@pytest.mark.parametrize("words", [["DIR"], ["DIR", "DIR"], ["matrix", "DIR"], ["ladder", "DIR"]])
def test_without_a_framework_nothing_holds(folder, monkeypatch, words):
    for place in ("command.invariance", "command.one_folder", "parity.run", "parity.two_folders"):
        monkeypatch.setattr(f"gptj.{place}.installed_backends", lambda: ())
    done = run(*(folder if word == "DIR" else word for word in words))
    assert done.exit_code == 1 and "no framework is installed" in str(done.exception)  # main makes 2 of it
    assert done.exception.exit_status == 2
