"""`--html`, `--junit`, `--markdown`, `--json FILE`, `gptj parity report`: what is written and refused, how it ends."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import finding_samples
import pytest
from click.testing import CliRunner
from mutants import MUTANTS
from recorded import write_sample

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import FormatError, WriteError
from gptj.parity.findings import Findings
from gptj.parity.gather import compare_files
from gptj.parity.revealing import revealing_config, revealing_fill

CONFIG = revealing_config(n_layer=2, n_positions=512)
FILES = {"--html": "r.html", "--junit": "r.xml", "--markdown": "r.md", "--json": "r.json"}


def run(*arguments: object):
    return CliRunner().invoke(gptj_command, ["parity", *map(str, arguments)])


def asked(folder: Path) -> list[object]:
    return [word for name, file in FILES.items() for word in (name, folder / file)]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    write_checkpoint(folder / "model", CONFIG, revealing_fill())
    write_sample(folder / "base", CONFIG)
    write_sample(folder / "right", CONFIG, "float32")
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "epsilon 1e-6")
    write_sample(folder / "wrong", CONFIG, "float32", mutant=mutant)
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "found.json"
    path.write_text(finding_samples.full().to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize(("other", "status"), [("right", 0), ("wrong", 1)])
def test_a_comparison_writes_all_four_and_ends_as_without_them(traces, tmp_path, other, status):
    words = ["compare", traces / "base", traces / other, "--reference", traces / "model"]
    bare, done = run(*words), run(*words, *asked(tmp_path))
    assert (bare.exit_code, done.exit_code) == (status, status)
    assert done.stdout == bare.stdout and done.stderr.count(": written") == 4
    found = Findings.from_file(tmp_path / "r.json")
    assert found.passed == (status == 0) and found.config["n_layer"] == 2
    [pair] = found.pairs
    assert (pair.a, pair.b, pair.dtype, len(pair.taps)) == ("base", other, "float32", 34)
    root = ET.fromstring((tmp_path / "r.xml").read_text(encoding="utf-8"))
    assert (int(root.get("failures", "")) > 0) == (status == 1)
    sign = "✗ differs" if status else "✓ holds"
    for name in ("r.html", "r.md"):
        assert sign in (tmp_path / name).read_text(encoding="utf-8")


def test_the_tap_that_an_error_was_born_in_is_told_with_its_own_size(traces):
    found = compare_files([traces / "base", traces / "wrong"], reference=traces / "model")
    born = [tap for tap in found.pairs[0].taps if tap.born]
    assert [tap.tap for tap in born] == ["h.0.ln_1", "h.1.ln_1", "ln_f"]
    assert all(tap.local is not None and tap.local_bound is not None and tap.local > tap.local_bound for tap in born)
    assert "on its inputs in wrong: row" in born[0].where and found.headline == found.pairs[0].headline
    untold = compare_files([traces / "base", traces / "wrong"]).pairs[0].taps
    assert next(tap for tap in untold if not tap.holds).born is None


def test_two_folders_are_reported_too(traces, tmp_path, monkeypatch):
    from gptj.parity import two_folders
    from gptj.parity.trace import open_trace

    far = two_folders.compare_two("pt", open_trace(traces / "base"), open_trace(traces / "wrong"))
    monkeypatch.setattr(two_folders, "compare_folders", lambda *arguments, **options: [far])
    done = run(traces / "model", traces / "model", *asked(tmp_path))
    assert done.exit_code == 1 and "pt: wrong first lies beyond rounding from base" in done.stdout
    assert Findings.from_file(tmp_path / "r.json").ladder[0].kl == far.divergence[0]
    assert "✗ differs" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_saved_findings_make_the_same_reports_again(saved, tmp_path):
    (tmp_path / "again").mkdir()
    done = run("report", saved, *asked(tmp_path / "again"))
    assert done.exit_code == 1 and "✗ differs: models/tiny: tf first differs" in done.stdout
    assert (tmp_path / "again" / "r.json").read_bytes() == saved.read_bytes()
    once = (tmp_path / "again" / "r.html").read_bytes()
    assert run("report", tmp_path / "again" / "r.json", "--html", tmp_path / "more.html").exit_code == 1
    assert (tmp_path / "more.html").read_bytes() == once
    (tmp_path / "good.json").write_text(finding_samples.holding().to_json())
    assert run("report", tmp_path / "good.json").exit_code == 0


def test_json_prints_where_no_file_is_named(saved, traces, tmp_path):
    assert json.loads(run("report", saved, "--json").stdout)["findings"] == 1
    before = {*traces.iterdir()}
    for words in (["--json", traces / "base", traces / "right"], [traces / "base", "--json", traces / "right"]):
        assert json.loads(run("compare", *words).stdout)["passed"] is True
    assert {*traces.iterdir()} == before
    done = run("compare", traces / "base", traces / "right", f"--json={tmp_path / 'of another name'}")
    assert done.exit_code == 0 and Findings.from_file(tmp_path / "of another name").passed


@pytest.mark.parametrize("option", FILES)
def test_nothing_is_replaced_unasked_and_that_is_said_before_the_work(saved, tmp_path, option):
    there = tmp_path / FILES[option]
    there.write_text("mine")
    for words in (["report", saved], ["compare", "no", "trace"], ["no model"]):
        done = run(*words, option, there)
        assert isinstance(done.exception, WriteError) and FILES[option] in str(done.exception)
    assert there.read_text() == "mine"
    assert run("report", saved, option, there, "--overwrite").exit_code == 1
    assert there.read_text(encoding="utf-8") != "mine"


def test_a_place_that_cannot_be_written_is_named(saved, tmp_path):
    done = run("report", saved, "--html", tmp_path / "no" / "r.html")
    assert isinstance(done.exception, WriteError) and "its folder is not there" in str(done.exception)


@pytest.mark.parametrize(
    "words",
    [["--html", "a.html", "--junit", "a.html"], ["--html", "a.html", "--markdown", "./a.html"], ["--html"],
     ["--html", ""], ["--junit=", "x"], ["--nothing", "x"]],
)  # fmt: skip
def test_misuse_ends_with_2(saved, words):
    assert run("report", saved, *words).exit_code == 2


def test_findings_that_are_none_are_refused(tmp_path):
    (tmp_path / "f.json").write_text('{"findings": 1, "verdict": "holds", "headline": "", "pairs": [{}]}')
    done = run("report", tmp_path / "f.json")
    assert isinstance(done.exception, FormatError) and "f.json: pairs[0].a: is missing" in str(done.exception)


def test_the_help_says_all_of_it():
    for words in ([], ["compare"], ["report"]):
        text = run(*words, "--help").output
        assert all(option in text for option in FILES) and "[FILE]" in text
    assert "gptj parity report --help" in " ".join(run("--help").output.split())


def test_a_headline_is_harmless_in_a_terminal(tmp_path):
    (tmp_path / "f.json").write_text(finding_samples.hostile().to_json())
    assert "\x1b" not in run("report", tmp_path / "f.json").stdout
