"""Processes that compute one model together: which of how many this is, as the launcher's variables say."""

from __future__ import annotations

import os
from typing import NamedTuple

from gptj.errors import InputError, shown

__all__ = ["Processes", "environment_place"]


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
