"""The part of a tensor that is wrong: all, or one row, token, head, channel or key alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AXES", "Spread"]

AXES = {"b": "row", "h": "head", "t": "token", "s": "key", "d": "channel", "m": "channel", "f": "channel",
        "v": "vocabulary"}  # fmt: skip
"""A word for each axis of a tap."""

_SPREAD = 0.5
"""The least share of an axis' indices with something wrong at which it is called wrong all along. A mask leaves some
out, and a token that sees one key alone has the weight 1 whatever the scores."""


class Spread:
    """The indices of each axis that hold something wrong, added up over slices of the tokens.

    Args:
        axes: of the tap, a letter each.
        shape: of the whole tap.
    """

    def __init__(self, axes: str, shape: Sequence[int]) -> None:
        self._axes = axes
        self._wrong = [np.zeros(size, bool) for size in shape]

    def add(self, wrong: NDArray[np.bool_], start: int) -> None:
        """Note what is wrong at some tokens.

        Args:
            wrong: of the tap's axes.
            start: the first of the tokens.
        """
        for number, (axis, noted) in enumerate(zip(self._axes, self._wrong, strict=True)):
            found = np.asarray(wrong.any(tuple(other for other in range(wrong.ndim) if other != number)))
            first = start if axis == "t" else 0
            noted[first : first + len(found)] |= found

    @property
    def places(self) -> dict[str, int]:
        """The one index of each axis that has several and is wrong at one alone; empty where another is neither.

        An axis is wrong all along where at least half of its indices are. Where all axes have one index, it is one
        value, of which nothing can be said.
        """
        found: dict[str, int] = {}
        along = False
        for axis, noted in zip(self._axes, self._wrong, strict=True):
            if len(noted) == 1:
                continue
            count = int(noted.sum())
            if count == 1:
                found[axis] = int(noted.argmax())
            elif count >= _SPREAD * len(noted):
                along = True
            else:
                return {}
        return found if along else {}

    def spell(self, mask: NDArray[Any] | None = None) -> str | None:
        """The places in words, "row 1, key 3 alone"; None where there are none.

        Args:
            mask: (b, t) or (b, s): whether the one row is the only one with padding is said, as that may be why.
        """
        places = self.places
        if not places:
            return None
        words = ", ".join(f"{AXES[axis]} {index}" for axis, index in places.items()) + " alone"
        padded = np.zeros(0, np.int64) if mask is None else np.flatnonzero((mask == 0).any(1))
        return f"{words}, which is padded" if padded.tolist() == [places.get("b")] else words
