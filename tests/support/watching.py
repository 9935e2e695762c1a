"""The bytes that are read and the words of a refusal, for tests and for the processes that they start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gptj.errors import InputError


@contextlib.contextmanager
def count_reads(module: Any) -> Iterator[list[int]]:
    """While this is open, the bytes of each call of a module's `read_into`, in a list that grows."""
    counted: list[int] = []
    real = module.read_into

    def count(stream: Any, out: Any, *rest: Any, **named: Any) -> None:
        counted.append(len(out))
        real(stream, out, *rest, **named)

    module.read_into = count
    try:
        yield counted
    finally:
        module.read_into = real


def refusal_of(act: Callable[[], object]) -> str:
    """The message of the InputError that an act raises, "" where it raises none."""
    try:
        act()
    except InputError as error:
        return str(error)
    return ""
