"""Backends' processes: how many run at once, what is said of them, and that none is left where one ends it all."""

from __future__ import annotations

import _thread
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from gptj.parity import processes
from gptj.parity.processes import BackendProcessError, Job, child_environment, memory_of, run_in_process
from gptj.parity.revealing import revealing_config

TASK = """
import os, pathlib, signal, sys, threading
name, *words = sys.argv[1:]
pathlib.Path(name).write_text(str(os.getpid()))
for word in words:
    if word == "wait":
        threading.Event().wait()
    elif word.startswith("meet="):
        while not pathlib.Path(word[5:]).exists():
            threading.Event().wait(0.01)
    elif word.startswith("kill="):
        os.kill(os.getpid(), int(word[5:]))
    elif word.startswith("fail="):
        print("noise", file=sys.stderr)
        sys.exit(word[5:])
    else:
        print(word, flush=True)
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Makes a job of the little program above, whose process leaves its number in a file of its name."""
    (tmp_path / "gptj_task.py").write_text(TASK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "processors", lambda: 2)
    monkeypatch.setattr(processes, "memory", lambda: (None, None))
    return lambda name, *words, **more: Job(name, ["gptj_task", name, *words], "pt", **more)


def is_gone(name: str) -> bool:
    """Whether the process that left its number in a file runs no more, and nobody has to wait for it."""
    return not Path(f"/proc/{Path(name).read_text()}").exists()


def test_two_jobs_of_one_name_run_side_by_side(task):
    jobs = [task("a", "one", "meet=b"), task("b", "two", "meet=a")]
    object.__setattr__(jobs[1], "name", "a")
    assert processes.run_side_by_side(jobs, progress=lambda words: None) == ["one\n", "two\n"]


def test_what_each_says_comes_back_in_order_and_is_told_while_it_runs(task):
    told: list[str] = []
    said = processes.run_side_by_side([task("a", "one", "meet=b", "two"), task("b", "three")], progress=told.append)
    assert said == ["one\ntwo\n", "three\n"]
    assert told[0] == "a; 0 of 2 done" and "a (one)" in "".join(told)
    assert told[-1] in ("a (two); 1 of 2 done", "b (three); 1 of 2 done"), "either may end last"


def test_they_run_beside_each_other(task):
    processes.run_side_by_side([task("a", "meet=b"), task("b", "meet=a")], timeout_s=20)


@pytest.mark.parametrize(("free", "many", "at_once"), [
    (2**33, 4, 3), (2**33, 2, 2), (2**33, 1, 1), (4_600_000_000, 4, 2), (2**30, 4, 1), (None, 4, 3),
])  # fmt: skip
def test_how_many_run_at_once_follows_from_memory_and_processors(task, monkeypatch, free, many, at_once):
    monkeypatch.setattr(processes, "processors", lambda: many)
    monkeypatch.setattr(processes, "memory", lambda: (free, free))
    full, lock, running, most = threading.Barrier(at_once, timeout=20), threading.Lock(), [0], [0]

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
            meets = int(command[-1]) < at_once  # the first ones are all there before one of them ends
        if meets:
            full.wait()
        with lock:
            running[0] -= 1
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(processes, "run_command", run)
    needed = memory_of(revealing_config(), "float32")
    processes.run_side_by_side([task(f"{n}", f"{n}", nbytes=needed) for n in range(3)])
    assert most == [at_once]


def test_one_that_fails_ends_the_others_and_is_named_with_its_last_words(task):
    started = time.monotonic()
    with pytest.raises(BackendProcessError, match=r"^b: .*exit status 1: SchemaError: x"):
        processes.run_side_by_side([task("a", "wait"), task("b", "meet=a", "fail=SchemaError: x"), task("c")],
                                   timeout_s=30)  # fmt: skip
    assert is_gone("a") and not Path("c").exists() and time.monotonic() - started < 20


def test_an_interrupt_ends_all(task):
    def interrupt(words: str) -> None:
        if "a (ready)" in words and "b (ready)" in words:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        processes.run_side_by_side([task("a", "ready", "wait"), task("b", "ready", "wait")], progress=interrupt,
                                   timeout_s=20)  # fmt: skip
    assert is_gone("a") and is_gone("b")


@pytest.mark.parametrize(("signal", "words"), [
    (15, r"a: .*signal 15: it said nothing$"), (9, r"signal 9: it said nothing.*Is the memory enough\?"),
])  # fmt: skip
def test_a_process_that_was_ended_is_named_with_the_signal(task, signal, words):
    with pytest.raises(BackendProcessError, match=words):
        processes.run_side_by_side([task("a", f"kill={signal}")])


def test_a_process_that_takes_too_long_is_ended(task):
    with pytest.raises(BackendProcessError, match=r"a: .*took too long \(expected at most 1 s\)"):
        processes.run_side_by_side([task("a", "wait")], timeout_s=1)
    assert not Path("a").exists() or is_gone("a")  # a busy machine may not have come so far


def test_the_real_recorder_says_what_is_wrong_in_its_last_line(tmp_path):
    words = ["--backend", "pt", "--probe", str(tmp_path / "p"), "--out", str(tmp_path / "o")]
    with pytest.raises(BackendProcessError, match=r"exit status 2: MissingFileError: .*p: no such file"):
        run_in_process(["gptj.parity.record", "model", *words], "pt")


class TestChildEnvironment:
    def test_what_the_caller_left_unsaid_is_said_for_the_child_alone(self, monkeypatch):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
        environment = child_environment("float32")
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["TF_CPP_MIN_LOG_LEVEL"] == "0"
        assert "OMP_WAIT_POLICY" not in os.environ

    def test_float64_needs_64_bits_in_jax(self, monkeypatch):
        monkeypatch.setenv("JAX_ENABLE_X64", "0")
        assert child_environment("float64")["JAX_ENABLE_X64"] == "1"
        assert child_environment("float32")["JAX_ENABLE_X64"] == "0"
