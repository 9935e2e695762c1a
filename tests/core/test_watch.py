"""Signs of life between processes: one that is silent ends the others, each told which, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from gptj.sharding import Keys, Processes, Watch


class Names:
    """The names of several watches in one process."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, name: str, text: str) -> None:
        with self.changed:
            self.texts[name] = text
            self.changed.notify_all()

    def get(self, name: str) -> str:
        with self.changed:
            self.changed.wait_for(lambda: name in self.texts)
            return self.texts[name]

    def keys(self, deaf: threading.Event) -> Keys:
        """A connection that does nothing while `deaf` is set, as that of a process which was stopped."""

        def when_awake(act: Callable[..., Any]) -> Callable[..., Any]:
            def wait(*words: str) -> Any:
                while deaf.is_set():
                    time.sleep(0.001)
                return act(*words)

            return wait

        return Keys(when_awake(self.set), when_awake(self.get), lambda name: self.texts.pop(name, None))


def watches(count: int, pause_s: float, bound: int = 5, processes: dict[int, int] | None = None):
    names, silent = Names(), {rank: threading.Event() for rank in range(count)}
    told: dict[int, tuple[int, str]] = {}
    made = []
    for rank in range(count):
        watch = Watch(
            Processes(rank, count), lambda rank=rank: names.keys(silent[rank]),
            lambda *who, rank=rank: told.update({rank: who}), bound_s=bound * pause_s, pause_s=pause_s,
        )  # fmt: skip
        if rank in (processes or {}):
            watch._process = watch._process.replace(str(os.getpid()), str(processes[rank]), 1)
        watch.start()
        made.append(watch)
    return names, silent, told, made


def wait_for(true) -> bool:
    latest = time.monotonic() + 20
    while not true() and time.monotonic() < latest:
        time.sleep(0.005)
    return true()


def test_the_others_are_told_which_process_is_silent():
    for victim in (2, 0):
        _, silent, told, _ = watches(4, 0.1)
        silent[victim].set()
        others = {0, 1, 2, 3} - {victim}
        assert wait_for(lambda told=told, others=others: others <= told.keys())
        assert {told[rank] for rank in others} == {(victim, "silent")}


def test_one_that_fails_ends_the_others_at_once():
    for failed in (2, 0):
        _, _, told, made = watches(4, 0.05)
        made[failed].fail()
        others = {0, 1, 2, 3} - {failed}
        assert wait_for(lambda told=told, others=others: others <= told.keys())
        assert {told[rank] for rank in others} == {(failed, "failed")} and failed not in told


def test_those_that_leave_at_times_of_their_own_are_not_missed():
    names, _, told, made = watches(3, 0.02)
    assert wait_for(lambda: len(names.texts) > 1)
    made[2].leave()  # and the first goes on for several times the bound
    time.sleep(0.5)
    made[0].leave()
    time.sleep(0.5)
    made[1].leave()
    assert told == {} and len(names.texts) < 12  # names of rounds that are over are forgotten


def test_one_that_ended_is_not_waited_for_as_one_that_is_silent():
    for victim in (2, 0):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            _, silent, told, _ = watches(4, 0.05, bound=10**6, processes={victim: process.pid})
            time.sleep(0.5)
            silent[victim].set()
            time.sleep(0.8)  # longer than one that ended is waited for
            assert told == {}
            process.kill()
            others = {0, 1, 2, 3} - {victim}
            assert wait_for(lambda told=told, others=others: others <= told.keys())
            assert {told[rank] for rank in others} == {(victim, "ended")}


def test_the_others_are_told_where_the_first_is_gone_with_the_names():
    names, _, told, _ = watches(3, 0.05, bound=10**6)
    assert wait_for(lambda: "gptj.sign.1" in names.texts)
    names.texts = None
    assert wait_for(lambda: {1, 2} <= told.keys())
    assert told[1] == told[2] == (0, "ended")
