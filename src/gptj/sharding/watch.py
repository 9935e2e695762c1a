"""Notices that a process of several is silent: it was stopped, or its host is gone, and nothing would ever say so.

One that ended without taking leave, where the system tells it or the names are gone, is waited for a few signs alone.
Each gives a sign of life a second to the first process, which answers all of them when it has everyone's. What counts
the seconds is a thread that waits, not a clock, so that all of them may be stopped for a while and go on together.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
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
        end: called once with the number of a process, and what is known of it: "silent", "failed" or "ended".
        bound_s: for how long it may be.
        pause_s: between two signs.
    """

    _LATER = 5
    """Pauses for which the others wait longer than the first process, so that it can say who it is.

    So many it waits for one that ended itself: what needs it may notice meanwhile, and knows more to say.
    """

    def __init__(
        self, place: Processes, make_keys: Callable[[], Keys], end: Callable[[int, str], object], *, bound_s: float,
        pause_s: float = 1.0,
    ) -> None:  # fmt: skip
        self._rank, self._size = place
        self._keys, self._loud, self._end = make_keys(), make_keys(), end
        self._pause_s, self._most = pause_s, bound_s / pause_s
        self._leaving, self._hurry, self._gone = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._present = [*range(1, self._size)]
        self._silent, self._answered, self._parting = 0, 0, ""
        self._process, self._has_ended = _own_process(), dict[int, Callable[[], bool]]()

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
        try:
            self._meet()
            while not self._gone.is_set():
                one_round(_name_of(self._answered))
                self._answered += 1
                self._hurry.wait(self._pause_s)
        except Exception:  # the names are gone, which the first process keeps
            if self._rank:
                self._has_ended[0] = lambda: True
        self._gone.set()

    def _meet(self) -> None:
        """Learn which of the system's processes the first is, which learns it of all."""
        self._keys.set(f"gptj.process.{self._rank}", self._process)
        for other in [0] if self._rank else self._present:
            self._silent = other
            self._has_ended[other] = _end_of(self._keys.get(f"gptj.process.{other}"))

    def _report(self, name: str) -> None:
        """Another process' round: its sign, and the first's answer."""
        parting = self._parting
        self._keys.set(f"{name}.{self._rank}", parting)
        if parting:
            self._gone.set()
        elif answer := self._keys.get(name):
            how, number = answer.split()
            self._end_once(int(number), how)

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
            self._end_once(failed, "failed")

    def _count(self) -> None:
        """Count the pauses without an answer, and end where they are too many."""
        pauses, seen = 0.0, (-1, -1)
        while not self._leaving.wait(self._pause_s):
            now = self._answered, self._silent
            pauses, seen = (pauses + 1, seen) if seen == now else (0, now)
            has_ended = self._has_ended.get(now[1])
            how = "ended" if has_ended is not None and has_ended() else "silent"
            later = self._most + (self._LATER if self._rank else 0)
            if pauses >= (self._LATER if how == "ended" else later):
                self._say_missing(now[1], how)
                return

    def _say_missing(self, number: int, how: str) -> None:
        if self._rank == 0:
            answer = (_name_of(self._answered), f"{how} {number}")
            said = threading.Thread(target=lambda: self._loud.set(*answer), daemon=True)
            said.start()
            said.join(self._pause_s)  # its keeper may be the silent one
        self._end_once(number, how)

    def _end_once(self, number: int, how: str) -> None:
        if self._ending.acquire(blocking=False):
            self._end(number, how)


def _name_of(number: int) -> str:
    """The name of a round's answer."""
    return f"gptj.sign.{number}"


def _own_process() -> str:
    """This process' number, and by which system's counting; that is empty where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        counting = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        counting = ""
    return f"{os.getpid()} {counting}"


def _end_of(process: str) -> Callable[[], bool]:
    """Whether a process of this system ended, each time it is asked; of another system's it is never known."""
    number, _, counting = process.partition(" ")
    if not counting or counting != _own_process().partition(" ")[2]:
        return lambda: False
    try:
        asked = select.poll()
        asked.register(os.pidfd_open(int(number)), select.POLLIN)
    except ProcessLookupError:
        return lambda: True
    except (AttributeError, OSError):  # an older system
        return lambda: False
    return lambda: bool(asked.poll(0))
