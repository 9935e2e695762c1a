"""A bounded slice of the fuzzer; `python tests/conversion/fuzz.py` is the whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[1] / "data" / "fuzz"
_SPEC = importlib.util.spec_from_file_location("gptj_fuzz", Path(__file__).parent / "fuzz.py")
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_no_mutant_crashes_a_reader(reader):
    accepted, refused, crashes = fuzz.fuzz(reader, 1500, seed=20261123)
    assert crashes == [] and refused > 0 and accepted + refused == 1500


def test_a_crash_would_be_noticed(monkeypatch):
    def crash(path):
        if path.read_bytes() != b"good file":
            raise IndexError("a bug")

    monkeypatch.setitem(fuzz.READERS, "broken", (lambda: b"good file", crash))
    assert len(fuzz.fuzz("broken", 10, seed=0)[2]) > 0


@pytest.mark.parametrize("case", sorted(CORPUS.glob("*/*")), ids=lambda case: f"{case.parent.name}/{case.name}")
def test_what_a_fuzzer_once_found_is_read_or_refused(case):
    """In a process of its own: what was found may be an endless loop in a library."""
    command = [sys.executable, Path(__file__).parent / "fuzz.py", "replay", case.parent.name, case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_no_changed_byte_of_an_h5_goes_unnoticed():
    """In a process of its own, which forks."""
    command = [sys.executable, Path(__file__).parent / "h5_bytes.py", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " refused" in done.stdout and " equal" in done.stdout, done.stdout + done.stderr
