"""Processes that compute one model together: which of how many this is, as the launcher's variables say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from gptj.errors import InputError, shown
from gptj.schema import TensorSpec

__all__ = ["Processes", "ReadTogether", "environment_place", "join_seconds"]


class Processes(NamedTuple):
    """Which of how many.

    Attributes:
        rank: this process' number, from 0.
        size: how many there are.
    """

    rank: int
    size: int


def environment_place(count_name: str, index_name: str) -> tuple[int | None, int | None]:
    """The number of processes and this one's own, as two environment variables say; None where neither is set.

    Raises:
        InputError: one is set without the other, or is no such number.
    """
    said = {name: os.environ.get(name) for name in (count_name, index_name)}
    if all(value is None for value in said.values()):
        return None, None
    numbers = []
    for name, value in said.items():
        if value is None or not value.isdecimal():
            raise InputError(
                "no number", where=f"environment: {name}", expected=f"one, beside {count_name} and {index_name}",
                found=shown(value),
            )  # fmt: skip
        numbers.append(int(value))
    count, index = numbers
    if index >= count:
        raise InputError("not among them", where=f"environment: {index_name}", expected=f"below {count}", found=index)
    return count, index


def join_seconds() -> int:
    """How long a process waits for the others to come: GPTJ_JOIN_SECONDS, or 30.

    Raises:
        InputError: it is no such number.
    """
    said = os.environ.get("GPTJ_JOIN_SECONDS", "30")
    if not said.isdecimal() or int(said) < 1:
        raise InputError("no number", where="environment: GPTJ_JOIN_SECONDS", expected="1 or more", found=shown(said))
    return int(said)


class ReadTogether:
    """Reads rows of a model that processes hold in parts: every process must read the same ones, in one order.

    Args:
        rows: all of them.
        read: gives a row's values; the others wait for each call.
    """

    def __init__(self, rows: Iterable[TensorSpec], read: Callable[[TensorSpec], NDArray[Any]]) -> None:
        self._left = {row.name: row for row in rows}
        self._read = read

    def __call__(self, row: TensorSpec) -> NDArray[Any]:
        """The row's values."""
        del self._left[row.name]
        return self._read(row)

    def finish(self) -> None:
        """Read what is left, whatever became of the first: the other processes wait for it."""
        for row in [*self._left.values()]:
            self(row)
