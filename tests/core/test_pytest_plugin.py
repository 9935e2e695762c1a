"""The pytest plugin: its fixture, its options, what it prints and writes, and that it costs nothing unasked."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from mutants import MUTANTS
from recorded import write_sample

import gptj.backends
import gptj.parity.differences
import gptj.parity.gather
import gptj.parity.ladder
import gptj.parity.matrix
import gptj.parity.report
import gptj.parity.reports.junit
import gptj.parity.reports.markdown
import gptj.parity.reports.page
import gptj.parity.run
import gptj.parity.trace
import gptj.parity.two_folders
from gptj.checkpoint import write_checkpoint
from gptj.parity.findings import Findings, LadderRung, MeasureFound
from gptj.parity.report import Divergence, Measure, ParityReport, TextMatch
from gptj.parity.revealing import revealing_config, revealing_fill

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
LOADED = ("-p", "gptj.command.pytest_plugin")
CONFIG = revealing_config(n_layer=1, n_positions=64)

COMPARES = """
    def test_right(gptj_parity):
        gptj_parity.compare("base", "right").raise_if_failed()

    def test_wrong(gptj_parity):
        gptj_parity.compare("base", "wrong", reference="model").raise_if_failed()
"""


def report(directory: str, backends: tuple[str, ...] | None, *, dtype: str = "float32", wrong: bool = False):
    names = tuple(backends or ("pt", "tf"))
    measures = tuple(
        Measure(name, "oracle", "logits", float("inf") if wrong else 1e-6, 2e-5, "row 0") for name in names
    )
    divergences = (Divergence(names[0], "block 2", 0.5, 1e-6, "row 1"),) if wrong else ()
    texts = (TextMatch("pt", "tf", "greedy", 31, 32),)
    return ParityReport(dtype, names, measures, divergences, texts, 9.0, {"pt": {"torch": "2.13.0"}}, str(directory))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Only what a run names is loaded: not what happens to be installed here, ours among it or not."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def traces(pytester):
    write_checkpoint(pytester.path / "model", CONFIG, revealing_fill())
    write_sample(pytester.path / "base", CONFIG)
    write_sample(pytester.path / "right", CONFIG, "float32")
    write_sample(
        pytester.path / "wrong", CONFIG, "float32", mutant=next(m for m in MUTANTS if m.name == "epsilon 1e-6")
    )
    pytester.makepyfile(COMPARES)
    return pytester.path


def test_what_could_not_be_judged_is_told_from_what_differs(pytester, traces):
    pytester.makepyfile("""
        def test_lost(gptj_parity):
            gptj_parity.compare("base", "nothing").raise_if_failed()

        def test_other(gptj_parity):
            gptj_parity("nowhere", backends=["pt"])
    """)  # fmt: skip
    done = pytester.runpytest_inprocess(*LOADED)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(
        ["*= gptj parity =*", "not judged: base, nothing: *no such file*", "not judged: nowhere*: *"]
    )
    done.stdout.no_fnmatch_line("differs: *")
    done.stdout.fnmatch_lines(
        [">*gptj_parity.compare(*", "E *MissingFileError: nothing*", ">*gptj_parity(*", "E *Error: *"]
    )
    assert "gptj/" not in done.stdout.str().split("short test summary")[0], "a frame of ours"


def test_traces_are_compared_and_the_summary_says_how_it_ended(pytester, traces):
    done = pytester.runpytest_inprocess(*LOADED, "--gptj-report", "r.html", "--gptj-report", "r.xml")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        ["*= gptj parity =*", "holds: right agrees with base*", "differs: model: wrong first differs from base*ln_1*",
         "written: r.html", "written: r.xml"]
    )  # fmt: skip
    done.stdout.fnmatch_lines(["E *ParityError: model: wrong first differs from base in block 0, ln_1: born there*"])
    assert (traces / "r.html").read_text(encoding="utf-8").count("<article>") == 2


def test_the_frameworks_are_compared_as_the_options_say(pytester, monkeypatch):
    asked = []

    def run_parity(directory, backends, **options):
        asked.append((backends, options))
        return report(directory, backends, **options)

    monkeypatch.setattr(gptj.parity.run, "run_parity", run_parity)
    write_checkpoint(pytester.path / "model", CONFIG, revealing_fill())
    pytester.makepyfile("""
        def test_default(gptj_parity):
            found = gptj_parity("model")
            assert found.passed and found.config["n_layer"] == 1 and found.versions["pt"] == {"torch": "2.13.0"}
            assert "pt and tf wrote 31 of 32 greedy tokens alike." in found.notes

        def test_named(gptj_parity):
            assert gptj_parity("model", backends=["pt"], dtype="bfloat16").headline.startswith("pt agrees")
    """)
    pytester.runpytest_inprocess(*LOADED, "--gptj-backends", "tf, flax").assert_outcomes(passed=2)
    assert asked == [(("tf", "flax"), {}), (["pt"], {"dtype": "bfloat16"})]
    pytester.runpytest_inprocess(*LOADED).assert_outcomes(passed=2)
    assert asked[2] == (None, {})


def test_the_matrix_and_the_ladder_are_found_where_they_are_asked_for(pytester, monkeypatch):
    asked = []

    def found(what, **part):
        def run(directory, backends, **options):
            asked.append((what, tuple(backends), options["seed"], sorted(options.get("folders", ()))))
            return Findings("differs", f"{what} differs", str(directory), **part)

        return run

    monkeypatch.setattr(gptj.backends, "choose_backend", str)  # none is installed here
    monkeypatch.setattr(gptj.parity.run, "run_parity", report)
    wrong = MeasureFound("pt", "cached against whole", "logits", 1.0, 0.1, False)
    monkeypatch.setattr(gptj.parity.matrix, "run_matrix", found("matrix", matrix=(wrong,)))
    monkeypatch.setattr(gptj.parity.ladder, "run_ladder", found("ladder", ladder=(LadderRung("pt", "int8"),)))
    write_checkpoint(pytester.path / "model", CONFIG, revealing_fill())
    pytester.makepyfile("""
        def test_both(gptj_parity):
            found = gptj_parity("model", backends=["pt"], matrix=True, ladder=True)
            assert not found.passed and found.headline == "matrix differs"
            assert len(found.matrix) == len(found.ladder) == 1 and len(found.measures) == 1

        def test_neither(gptj_parity):
            assert gptj_parity("model", backends=["pt"]).passed

        def test_other(gptj_parity):
            gptj_parity("model", "model", matrix=True)

        def test_weights(gptj_parity):
            gptj_parity("model", weights="model.safetensors", ladder=True)
    """)
    done = pytester.runpytest_inprocess(*LOADED)
    done.assert_outcomes(passed=2, failed=2)
    done.stdout.fnmatch_lines(["*other: not beside matrix*", "*weights: not beside ladder*"])
    assert [one[:3] for one in asked] == [("matrix", ("pt",), 0), ("ladder", ("pt",), 0)] and "bin" in asked[0][3]


def test_two_folders_are_compared(pytester, monkeypatch, traces):
    asked = []

    def compare_folders(*arguments, **options):
        asked.append((arguments, options))
        opened = [gptj.parity.trace.open_trace(pytester.path / name) for name in ("base", "wrong")]
        return [gptj.parity.two_folders.compare_two("pt", *opened)]

    monkeypatch.setattr(gptj.parity.two_folders, "compare_folders", compare_folders)
    pytester.makepyfile("""
        def test_it(gptj_parity):
            found = gptj_parity("mine", "yours", backends=["pt"], way="int8")
            assert not found.passed and found.ladder[0].rung == "wrong"
    """)
    done = pytester.runpytest_inprocess(*LOADED)
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["differs: yours: pt: wrong first differs from base in block 0, ln_1*"])
    assert asked == [(("mine", "yours", ["pt"]), {"way": "int8"})]


def test_a_difference_fails_the_test_that_asks_for_it(pytester, monkeypatch):
    monkeypatch.setattr(gptj.parity.run, "run_parity", lambda *a, **options: report(*a, wrong=True))
    write_checkpoint(pytester.path / "model", CONFIG, revealing_fill())
    pytester.makepyfile("""
        def test_it(gptj_parity):
            found = gptj_parity("model")
            assert not found.passed
            found.raise_if_failed()
    """)
    done = pytester.runpytest_inprocess(*LOADED, "--gptj-report=f.json")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["differs: model: pt first differs in block 2: 5.0e-01 where rounding explains 1e-06*"])
    assert Findings.from_file(pytester.path / "f.json").measures[0].difference == float("inf")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gptj-backends", "torch"], "*--gptj-backends: no such backend: 'torch'; there are pt, tf, flax"),
        (["--gptj-backends", "pt,pt"], "*--gptj-backends: names pt twice"),
        (["--gptj-backends", ""], "*--gptj-backends: no such backend: ''*"),
        (["--gptj-report", "r.txt"], "*--gptj-report: *r.txt*not the suffix of a report*"),
    ],
)
def test_options_are_checked_before_any_test_runs(pytester, words, said):
    pytester.makepyfile("def test_it(): raise SystemExit(9)")
    done = pytester.runpytest_inprocess(*LOADED, *words)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([said])


def test_a_report_that_cannot_be_written_is_said_and_fails_the_session(pytester, traces):
    done = pytester.runpytest_inprocess(*LOADED, "-k", "right", "--gptj-report", "no/r.html")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["not written: no/r.html: its folder is not there"])


def test_a_report_of_nothing_is_not_written(pytester):
    pytester.makepyfile("def test_it(): pass")
    done = pytester.runpytest_inprocess(*LOADED, "--gptj-report", "r.html")
    assert done.ret == 0 and not (pytester.path / "r.html").exists()
    done.stdout.fnmatch_lines(["not written: r.html: nothing was compared"])


def test_who_does_not_ask_sees_nothing(pytester):
    pytester.makepyfile("def test_it(): pass")
    done = pytester.runpytest_inprocess(*LOADED, "-p", "no:cacheprovider")
    assert done.ret == 0
    done.stdout.no_fnmatch_line("*gptj*")
    done = pytester.runpytest_inprocess(*LOADED, "-p", "no:terminal")
    assert done.ret == 0


def test_workers_of_xdist_send_what_they_compared(pytester, traces):
    done = pytester.runpytest_subprocess(*LOADED, "-p", "xdist", "-n", "2", "--gptj-report", "r.json")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*= gptj parity =*", "written: r.json", "written: r-2.json"])
    verdicts = {Findings.from_file(traces / name).verdict for name in ("r.json", "r-2.json")}
    assert verdicts == {"holds", "differs"}


def test_loading_it_imports_nothing_heavy_and_strict_settings_hold(pytester):
    pytester.makeini("[pytest]\naddopts = --strict-config --strict-markers\nfilterwarnings = error\n")
    pytester.makepyfile("""
        import sys

        def test_it(pytestconfig):
            heavy = {"numpy", "torch", "tensorflow", "keras", "jax", "flax", "rich", "click", "ml_dtypes"}
            assert not heavy & set(sys.modules)
            ours = {name for name in sys.modules if name.partition(".")[0] == "gptj"}
            own = {"gptj.backends", "gptj.errors", "gptj.command", "gptj.command.pytest_plugin"}
            assert ours <= {"gptj"} | own, ours
    """)
    pytester.runpytest_subprocess(*LOADED).assert_outcomes(passed=1)


def test_the_fixture_and_the_options_are_in_pytests_own_help(pytester):
    done = pytester.runpytest_inprocess(*LOADED, "--help")
    done.stdout.fnmatch_lines(["*GPT-J in several frameworks:", "*--gptj-backends=NAMES*", "*--gptj-report=FILE*"])
    done = pytester.runpytest_inprocess(*LOADED, "--fixtures")
    done.stdout.fnmatch_lines(["*gptj_parity*session scope*", "*Compares the frameworks on a model*"])


def test_the_page_names_every_option():
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    source = (ROOT / "src" / "gptj" / "command" / "pytest_plugin.py").read_text(encoding="utf-8")
    options = set(re.findall(r"addoption\(\s*\"(--[a-z-]+)", source))
    assert len(options) == 2 and all(f"`{option} " in page for option in options)


def test_it_is_declared_as_a_plugin_and_loaded_where_the_package_is_installed(pytestconfig):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"pytest11": {"gptj": "gptj.command.pytest_plugin"}}
    installed = [entry.name for entry in entry_points(group="pytest11") if entry.value == "gptj.command.pytest_plugin"]
    assert pytestconfig.pluginmanager.hasplugin("gptj") == bool(installed)


def test_a_run_that_goes_wrong_without_a_stage_has_its_first_failure_as_headline():
    bare = dataclasses.replace(report("", ("pt",), wrong=True), divergences=(), checkpoint=None)
    headline = gptj.parity.gather.findings_of_report(bare).headline
    said = "pt and oracle disagree on logits: inf, of 2.0e-05 allowed, at row 0; 1 of 1 measures fail in float32"
    assert headline == said
