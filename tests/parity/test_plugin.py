"""`gptj_parity` in a test of somebody's own, over a framework that is installed here, whose process it starts."""

from __future__ import annotations

import pytest

from gptj.parity.findings import Findings

pytest_plugins = ["pytester"]


def test_the_fixture_runs_the_frameworks_that_an_option_names(pytester, monkeypatch, checkpoint, backend_names):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(f"""
        def test_it(gptj_parity):
            gptj_parity({str(checkpoint)!r}, dtype="float64", seed=3).raise_if_failed()
    """)
    words = ["-p", "gptj.command.pytest_plugin", "--gptj-backends", backend_names[0], "--gptj-report", "found.json"]
    done = pytester.runpytest_subprocess(*words)
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines([f"holds: *: {backend_names[0]} agrees with the oracle in float64: all * measures*"])
    found = Findings.from_file(pytester.path / "found.json")
    assert {measure.backend for measure in found.measures} == {backend_names[0]} and found.versions
