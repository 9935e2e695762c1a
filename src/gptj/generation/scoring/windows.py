"""A sequence in windows that a model has positions for, such that each of its tokens is scored once.

The windows are those of EleutherAI's lm-evaluation-harness (`get_rolling_token_windows`, `make_disjoint_window`, and
the cut from the left of `HFLM`): the first one scores as many tokens as it can, each further one the next `stride`, and
every window reads as much as fits before the tokens that it scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import InputError, shown

__all__ = ["Limits", "Window", "limits_of", "windows_of"]


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens that are read together, and those of them that are scored.

    Attributes:
        token_ids: the tokens that are read.
        targets: the tokens that follow the last `len(targets)` of them, one each.
    """

    token_ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes of windows.

    Attributes:
        max_length: the most tokens that a window reads.
        stride: the most tokens that a window after the first scores; the others of it are read again, as context.
    """

    max_length: int
    stride: int


def limits_of(config: GPTJConfig, max_length: int | None = None, stride: int | None = None) -> Limits:
    """The limits that are asked for; None is the model's positions, and windows that score as much as they can.

    Raises:
        InputError: a window longer than the model's positions, or a stride longer than a window.
    """
    most = config.n_positions
    length = _whole(max_length, "max_length", most, f"n_positions = {most}")
    return Limits(length, _whole(stride, "stride", length, f"max_length = {length}"))


def _whole(value: int | None, where: str, most: int, said: str) -> int:
    if value is None:
        return most
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError("out of range", where=where, expected=f"a whole number, 1 to {said}", found=shown(value))
    return value


def windows_of(sequence: Sequence[int] | NDArray[np.int64], first: int, limits: Limits) -> Iterator[Window]:
    """The windows that score the tokens of a sequence from place `first` on.

    Args:
        sequence: token ids: what is read before, and what is scored.
        first: the place of the first token that is scored, at least 1: nothing can be said of a token after none.
        limits: their sizes.

    >>> for window in windows_of([9, 0, 1, 2, 3, 4, 5], 1, Limits(max_length=4, stride=4)):
    ...     print(window.token_ids, window.targets)
    (9, 0, 1, 2) (0, 1, 2, 3)
    (1, 2, 3, 4) (4, 5)
    """
    scored, end = first, min(len(sequence), first + limits.max_length)
    while scored < end:
        begin = max(0, end - 1 - limits.max_length)
        read = np.asarray(sequence[begin:end]).tolist()
        yield Window(tuple(read[:-1]), tuple(read[scored - begin :]))
        scored, end = end, min(len(sequence), end + limits.stride)
