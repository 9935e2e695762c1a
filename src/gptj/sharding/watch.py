"""Notices that a process of several is silent: it was stopped, or its host is gone, and nothing would ever say so.

Each gives a sign of life a second to the first process, which answers all of them when it has everyone's. What counts
the seconds is a thread that waits, not a clock, so that all of them may be stopped for a while and go on together.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple

from gptj.sharding.processes import Processes, seconds_of

__all__ = ["Keys", "Watch", "silence_seconds"]


def silence_seconds() -> int:
    """Seconds for which a process may be silent before the others end: GPTJ_SILENCE_SECONDS, or 45.

    Raises:
        InputError: it is no such number.
    """
    return seconds_of("GPTJ_SILENCE_SECONDS", 45)


class Keys(NamedTuple):
    """Texts by names, which the processes tell each other: a name is written once.

    Attributes:
        set: writes a name's text.
        get: gives it, when it is there.
        delete: forgets it.
    """

    set: Callable[[str, str], object]
    get: Callable[[str], str]
    delete: Callable[[str], object]


class Watch:
    """Signs of life between this process and the others, from threads of its own.

    Args:
        place: this process'.
        make_keys: gives a connection to the names, which one thread uses.
        end: called once with the number of a process that is silent, or that failed, and whether it did.
        bound_s: for how long it may be.
        pause_s: between two signs.
    """

    _LATER = 5
    """Pauses for which the others wait longer than the first process, so that it can say who it is."""

    def __init__(
        self, place: Processes, make_keys: Callable[[], Keys], end: Callable[[int, bool], object], *, bound_s: float,
        pause_s: float = 1.0,
    ) -> None:  # fmt: skip
        self._rank, self._size = place
        self._keys, self._loud, self._end = make_keys(), make_keys(), end
        self._pause_s, self._most = pause_s, bound_s / pause_s
        self._leaving, self._hurry, self._gone = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._present = [*range(1, self._size)]
        self._silent, self._answered, self._parting = 0, 0, ""

    def start(self) -> None:
        """Begin to give signs, and to wait for the others'."""
        for work in (self._give_signs, self._count):
            threading.Thread(target=work, daemon=True).start()

    def leave(self) -> None:
        """Say that this process is done: the others wait for no more signs of it, and it for none of theirs."""
        self._part("leaves")
        if self._rank:  # the first answers the others until it ends
            self._gone.wait(self._most * self._pause_s)

    def fail(self) -> None:
        """Say that this process failed, which ends the others."""
        self._part("failed")

    def _part(self, how: str) -> None:
        self._parting = how
        self._leaving.set()
        if self._rank or how == "failed":
            self._hurry.set()

    def _give_signs(self) -> None:
        one_round = self._ask_all if self._rank == 0 else self._report
        with contextlib.suppress(Exception):  # the keeper of the names is gone: whoever needs it is told by it
            while not self._gone.is_set():
                one_round(_name_of(self._answered))
                self._answered += 1
                self._hurry.wait(self._pause_s)
        self._gone.set()

    def _report(self, name: str) -> None:
        """Another process' round: its sign, and the first's answer."""
        parting = self._parting
        self._keys.set(f"{name}.{self._rank}", parting)
        if parting:
            self._gone.set()
        elif answer := self._keys.get(name):
            how, number = answer.split()
            self._end_once(int(number), how == "failed")

    def _ask_all(self, name: str) -> None:
        """The first process' round: everybody's sign, and the answer to all."""
        failed = 0 if self._parting == "failed" else None
        for other in [*self._present] if failed is None else ():
            self._silent = other
            sign = self._keys.get(f"{name}.{other}")
            self._keys.delete(f"{name}.{other}")
            if sign:
                self._present.remove(other)
            if sign == "failed":
                failed = other
                break
        self._keys.set(name, "" if failed is None else f"failed {failed}")
        if self._answered > 1:  # all have given a sign since it was answered
            self._keys.delete(_name_of(self._answered - 2))
        if failed is not None:
            self._gone.set()
        if failed:
            self._end_once(failed, True)

    def _count(self) -> None:
        """Count the pauses without an answer, and end where they are too many."""
        pauses, seen = 0.0, -1
        most = self._most + (self._LATER if self._rank else 0)
        while not self._leaving.wait(self._pause_s):
            pauses, seen = (pauses + 1, seen) if seen == self._answered else (0, self._answered)
            if pauses >= most:
                self._say_silent()
                return

    def _say_silent(self) -> None:
        silent = self._silent
        if self._rank == 0:
            answer = (_name_of(self._answered), f"silent {silent}")
            said = threading.Thread(target=lambda: self._loud.set(*answer), daemon=True)
            said.start()
            said.join(self._pause_s)  # its keeper may be the silent one
        self._end_once(silent, False)

    def _end_once(self, number: int, failed: bool) -> None:
        if self._ending.acquire(blocking=False):
            self._end(number, failed)


def _name_of(number: int) -> str:
    """The name of a round's answer."""
    return f"gptj.sign.{number}"
