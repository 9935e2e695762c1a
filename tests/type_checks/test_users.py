"""What type checkers make of users' scripts: they know every type that is named, and find each mistake, and no other.

The scripts stand beside this file. A line with `# wrong` must be an error, every other line none. They are checked
against the installed frameworks, as a user's checker does: their types end in torch.Tensor and jax.Array. TensorFlow
ships no types, so mypy takes its tensors for Any.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parent.glob("user_*.py"))


def wrong_lines(script: Path) -> set[int]:
    return {number for number, line in enumerate(script.read_text().splitlines(), 1) if "# wrong" in line}


def checked(command: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a configuration, where mypy keeps what it has found out."""
    return tmp_path_factory.mktemp("user")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_mypy_finds_the_mistakes_and_no_other(script: Path, empty: Path) -> None:
    said = checked(["mypy", "--no-error-summary", "--hide-error-context", str(script)], empty)
    errors = [line.split(":", 3) for line in said.splitlines() if f"{script.name}:" in line and ": error:" in line]
    assert {int(number) for _, number, *_ in errors} == wrong_lines(script), said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pyright_finds_the_mistakes_and_no_other(script: Path, empty: Path) -> None:
    said = checked(["pyright", "--outputjson", "--pythonpath", sys.executable, str(script)], empty)
    errors = [one for one in json.loads(said)["generalDiagnostics"] if one["severity"] == "error"]
    assert {one["range"]["start"]["line"] + 1 for one in errors} == wrong_lines(script), said
