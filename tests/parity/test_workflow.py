"""The workflow of docs/ci.md, run as far as a shell can: three environments of one framework each, one of none.

An environment is a folder of links to what is installed here, without the other frameworks, which is all that a Python
without `site` sees. Installing is left out, and the actions that carry files are copies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from workflow_steps import Step, jobs_of_page

from gptj.parity.findings import Findings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ci.md"
FRAMEWORKS = {"pt": ("torch",), "tf": ("tensorflow", "keras"), "flax": ("jax", "flax")}
OURS = [path for path in sys.path if Path(path, "gptj").is_dir() or Path(path, "gptj_conversion").is_dir()]


def environment_of(folder: Path, backend: str | None) -> dict[str, str]:
    """The environment variables of a Python that has one framework or none, and a `gptj` that runs in it."""
    absent = {name for other, names in FRAMEWORKS.items() if other != backend for name in names} | {"transformers"}
    packages, programs = folder / "packages", folder / "bin"
    packages.mkdir(parents=True)
    programs.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name not in absent and entry.name.partition("-")[0] not in absent:
            (packages / entry.name).symlink_to(entry)
    (programs / "gptj").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -P -m gptj "$@"\n')
    (programs / "gptj").chmod(0o755)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("GITHUB", "PYTEST"))}
    path = os.pathsep.join([str(packages), *(place for place in OURS if "site-packages" not in place)])
    return own | {"PYTHONPATH": path, "PATH": f"{programs}{os.pathsep}{own['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}


def run_steps(steps: list[Step], folder: Path, environment: dict[str, str]) -> list[tuple[str, int]]:
    """What the shell's steps ended with, under the rules of a job: after a failure only those of `if: always()`."""
    ended: list[tuple[str, int]] = []
    for step in steps:
        if step.run is None or step.run.startswith("python -m pip install "):
            continue
        if any(status for _, status in ended) and not step.always:
            continue
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step.run], cwd=folder, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        ended.append((step.run.split("\n")[0], done.returncode))
    return ended


@pytest.fixture(scope="module")
def traces(backend_names, tmp_path_factory) -> Path:
    """The traces that the recording jobs upload, one for each backend."""
    carried = tmp_path_factory.mktemp("artifacts")
    steps = jobs_of_page(PAGE)["record"]
    for backend in backend_names:
        folder = tmp_path_factory.mktemp(backend)
        environment = environment_of(folder / "environment", backend) | {"BACKEND": backend}
        for other, modules in FRAMEWORKS.items():
            code = f"import importlib.util as u; print([m for m in {modules} if u.find_spec(m)])"
            seen = subprocess.run(
                [sys.executable, "-S", "-P", "-c", code], env=environment, capture_output=True, text=True
            )
            assert (seen.stdout.strip() != "[]") == (other == backend), seen
        work = folder / "work"
        work.mkdir()
        assert [status for _, status in run_steps(steps, work, environment)] == [0, 0]
        [upload] = [step for step in steps if step.uses and step.uses.startswith("actions/upload-artifact")]
        shutil.copy(work / upload.given["path"].replace("${{ matrix.backend }}", backend), carried)
    return carried


def compare(tmp_path: Path, traces: Path) -> tuple[list[tuple[str, int]], Path]:
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(traces, work / "traces")
    environment = environment_of(tmp_path / "environment", None) | {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    (tmp_path / "summary").write_text("before\n")
    return run_steps(jobs_of_page(PAGE)["compare"], work, environment), work


def test_the_four_jobs_agree_and_show_it(tmp_path, traces):
    ended, work = compare(tmp_path, traces)
    assert [status for _, status in ended] == [0, 0, 0]
    found = Findings.from_file(work / "parity.json")
    assert found.passed and [pair.b for pair in found.pairs] == ["tf.safetensors", "flax.safetensors"]
    summary = (tmp_path / "summary").read_text(encoding="utf-8")
    assert summary.startswith("before\n## ✓ holds") and (work / "parity.html").stat().st_size > 10_000
    assert ET.fromstring((work / "parity.xml").read_text(encoding="utf-8")).get("failures") == "0"


def test_a_wrong_trace_fails_the_job_and_is_shown_all_the_same(tmp_path, traces):
    broken = tmp_path / "broken"
    shutil.copytree(traces, broken)
    path = sorted(broken.iterdir())[-1]
    with safe_open(path, "np") as stream:
        facts = stream.metadata()
    tensors = load_file(path)
    tensors["h.1.q_rotated"] = np.ascontiguousarray(-tensors["h.1.q_rotated"])
    save_file(tensors, path, metadata=facts)
    ended, work = compare(tmp_path, broken)
    assert [status for _, status in ended] == [0, 1, 0]
    found = Findings.from_file(work / "parity.json")
    assert not found.passed and "block 1, rotated q: born there" in found.headline
    summary = (tmp_path / "summary").read_text(encoding="utf-8")
    assert "✗ differs" in summary and "✗●" in summary
    assert ET.fromstring((work / "parity.xml").read_text(encoding="utf-8")).get("failures") != "0"


def test_what_is_installed_is_what_the_package_offers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [step.run for steps in jobs_of_page(PAGE).values() for step in steps if step.run and "pip" in step.run]
    assert lines == ['python -m pip install "gptj-multibackend[$BACKEND]"', "python -m pip install gptj-multibackend"]
    assert "backend: [pt, tf, flax]" in PAGE.read_text() and {*FRAMEWORKS} <= {*extras}
