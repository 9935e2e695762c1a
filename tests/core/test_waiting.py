"""What a person sees while a command works: nothing if it is quick or nobody looks, else what it is doing."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from gptj.command.waiting import QUICK_S, waiting


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=60)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_quick_work_is_silent():
    console = terminal()
    with waiting("loading a model", console):
        pass
    assert said(console) == "" and QUICK_S == 2


def test_long_work_says_what_it_is_and_goes_away():
    console = terminal()
    with waiting("loading [a] model", console, after_s=0.01):
        until = time.monotonic() + 10
        while "loading [a] model" not in said(console) and time.monotonic() < until:
            time.sleep(0.01)
    assert "loading [a] model" in said(console)
    assert not any(isinstance(one, threading.Timer) and one.is_alive() for one in threading.enumerate())


def test_a_file_gets_nothing():
    console = Console(file=io.StringIO(), width=60)
    with waiting("loading", console, after_s=0.0):
        time.sleep(0.05)
    assert said(console) == ""


def test_an_error_passes_through():
    with pytest.raises(ZeroDivisionError), waiting("dividing", terminal(), after_s=0.0):
        raise ZeroDivisionError
