"""A wrong tap, and whether a mistake explains it: every value of it, whole, some tokens at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.parity.mistaken import Expect, MistakenOperation
from gptj.parity.operations import Expected, Missing, ReadWeight
from gptj.parity.trace import Trace

__all__ = ["APART", "Part", "Slices", "WrongTap", "largest_share"]

Array = NDArray[Any]
Slices = Callable[[Trace, str], Iterator[slice]]

APART = 4.0
"""How many bounds of the mistaken computation the right one must be off by, somewhere: two of them are in doubt."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a wrong tap.

    Attributes:
        tokens: which.
        found: as recorded, float64.
        right: as its operation gives it.
        counted: the elements that are looked at, of the same shape.
    """

    tokens: slice
    found: Array
    right: Expected
    counted: Array

    @property
    def value(self) -> Array:
        """The right values, float64, of the shape of those that were found."""
        return np.broadcast_to(self.right.value, self.found.shape).astype(np.float64)

    @property
    def bound(self) -> Array:
        """Of rounding, of that shape."""
        return np.broadcast_to(self.right.bound, self.found.shape)

    @property
    def wrong(self) -> Array:
        """The counted elements that rounding does not explain."""
        beyond: Array = ~(np.abs(self.found - self.value) <= self.bound) & self.counted
        return beyond


@dataclasses.dataclass(frozen=True)
class WrongTap:
    """A tap for which explanations are tried.

    Attributes:
        trace, tap: which.
        weights: reads the model's; None where there are none.
        slices: of a tap's tokens, some at a time.
        among: the tokens (b, t) that are looked at; None is all.
    """

    trace: Trace
    tap: str
    weights: ReadWeight | None
    slices: Slices
    among: Array | None = None

    def operation(self) -> MistakenOperation:
        """The tap's operation."""
        return MistakenOperation(self.trace, self.tap, self.weights)

    @property
    def axes(self) -> str:
        """A letter each."""
        return self.trace.places[self.tap].axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tap."""
        return tuple(self.trace.shape(self.tap))

    def found(self, tokens: slice) -> Array:
        """Some tokens as recorded, float64."""
        return np.asarray(self.trace.read(self.tap, tokens), np.float64)

    def parts(self, operation: MistakenOperation | None = None) -> Iterator[Part]:
        """All tokens, some at a time, beside what is right."""
        operation = self.operation() if operation is None else operation
        for tokens in self.slices(self.trace, self.tap):
            found = self.found(tokens)
            yield Part(tokens, found, operation.expect(tokens), self._counted(tokens, found.shape))

    def explains(self, expect: Expect) -> bool:
        """Whether every value is what a mistake gives, and somewhere by far not what is right."""
        operation, apart = self.operation(), 0.0
        try:
            with np.errstate(all="ignore"):
                for part in self.parts(operation):
                    share = _share(part, expect(operation, part.tokens))
                    if share is None:
                        return False
                    apart = max(apart, share)
        except (Missing, KeyError, ValueError, AssertionError):
            return False
        return apart >= APART

    def _counted(self, tokens: slice, shape: tuple[int, ...]) -> Array:
        if self.among is None or "t" not in self.axes or "b" not in self.axes:
            return np.ones(shape, bool)
        sizes = [size if axis in "bt" else 1 for axis, size in zip(self.axes, shape, strict=True)]
        return np.broadcast_to(self.among[: sizes[0], tokens].reshape(sizes), shape)


def _share(part: Part, mistaken: Expected) -> float | None:
    """How many bounds lie between what was found and what is right; None where the mistake does not explain it."""
    value = np.broadcast_to(mistaken.value, part.found.shape).astype(np.float64)
    bound = np.broadcast_to(mistaken.bound, part.found.shape)
    both = ~np.isfinite(part.found) & ~np.isfinite(value)
    if not ((np.abs(part.found - value) <= bound) | both | ~part.counted).all():
        return None
    return largest_share(np.where(part.counted, np.abs(part.found - part.value), 0), bound)


def largest_share(away: Array, bound: Array) -> float:
    """The largest difference in bounds; what is not finite is none."""
    away = np.where(np.isfinite(away), away, 0)
    share = np.where(bound > 0, away / np.where(bound > 0, bound, 1), np.where(away > 0, np.inf, 0))
    return float(share.max(initial=0.0))
