"""Sensitivity: which mistakes a trace would have shown, and how small a change of one number it would have.

A comparison that passes says little until it is known what it would have refused. Each known mistake
(`gptj.parity.mutants`) is planted into the trace that a backend recorded: its value there, plus what the mistake makes
of it, so that the backend's own rounding stays in. It is caught where that is beyond the bound of the operation, which
is what a comparison looks at. Nothing runs again, so the dtype, the sizes and the weights are the model's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import split_tap
from gptj.parity.comparison import spell_tap
from gptj.parity.mistaken import Expect, MistakenOperation, rotary
from gptj.parity.mutants import MISTAKES
from gptj.parity.operations import PRODUCTS, Expected, Missing, ReadWeight
from gptj.parity.trace import Trace, slices_of

__all__ = ["PlantedMistake", "Sensitivity", "SmallestChange", "measure_sensitivity"]

Array = NDArray[Any]

LARGEST_CHANGE = 2.0**20
SMALLEST_CHANGE = 2.0**-60
_STEPS = 40
"""Halvings of the exponent between them: a change is known within a ten-millionth of a per cent."""


@dataclasses.dataclass(frozen=True)
class PlantedMistake:
    """A known mistake, planted.

    Attributes:
        mutant: its name.
        tap: where.
        difference, bound: there, at the place where it is the largest share of the bound.
    """

    mutant: str
    tap: str
    difference: float
    bound: float

    @property
    def caught(self) -> bool:
        """Whether it is beyond what rounding explains."""
        return not self.difference <= self.bound

    @property
    def headline(self) -> str:
        """The mistake in a sentence."""
        size = f"{self.difference:.1e} where rounding explains {self.bound:.0e}"
        return f"{spell_tap(self.tap)}: {'born there, ' if self.caught else 'not caught, '}{size}"


@dataclasses.dataclass(frozen=True)
class SmallestChange:
    """The smallest relative change of one number that would have been caught.

    Attributes:
        what: "one weight", "one rotary angle" or "epsilon".
        tap: that shows it.
        change: relative; infinity where none up to 2^20 would.
        of: the number.
    """

    what: str
    tap: str
    change: float
    of: str


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The mistakes and changes that one backend's trace would show.

    Attributes:
        backend: whose, a trace's name.
        dtype: computed in.
        planted: every mistake that is one in this model.
        smallest: changes.
    """

    backend: str
    dtype: str
    planted: tuple[PlantedMistake, ...]
    smallest: tuple[SmallestChange, ...]

    @property
    def missed(self) -> tuple[PlantedMistake, ...]:
        """Mistakes that would have passed."""
        return tuple(one for one in self.planted if not one.caught)

    def lines(self, *, every: bool = False) -> Iterator[str]:
        """The sensitivity in words, a line each."""
        caught = len(self.planted) - len(self.missed)
        yield f"{self.backend} in {self.dtype} would have shown {caught} of {len(self.planted)} planted mistakes"
        for one in self.planted if every else self.missed:
            yield f"{one.mutant}: {one.headline}"
        for what in dict.fromkeys(change.what for change in self.smallest):
            least = min((change for change in self.smallest if change.what == what), key=lambda one: one.change)
            yield f"smallest change shown of {what}: {least.change:.0e}, in {spell_tap(least.tap)} ({least.of})"

    def as_dict(self) -> list[dict[str, Any]]:
        """A row a mistake, as the findings have them."""
        return [
            {
                "backend": self.backend, "mutant": one.mutant, "caught": one.caught, "headline": one.headline,
                "expected": split_tap(one.tap)[1],
            }
            for one in self.planted
        ]  # fmt: skip

    def smallest_as_dict(self) -> list[dict[str, Any]]:
        """A row a change; one that none would show is the text "inf"."""
        return [
            {"backend": self.backend, "dtype": self.dtype, **dataclasses.asdict(one),
             "change": one.change if math.isfinite(one.change) else "inf"}
            for one in self.smallest
        ]  # fmt: skip


def measure_sensitivity(
    trace: Trace, weights: ReadWeight | None, slices: Callable[[Trace, str], Iterator[slice]] = slices_of
) -> Sensitivity:
    """Plant every known mistake into a trace, and find the smallest changes that it would show.

    Args:
        trace: of a backend.
        weights: reads the model's weights; None leaves out mistakes of operations that have some.
        slices: of a tap's tokens, some at a time.
    """
    planted: list[PlantedMistake] = []
    for mistake in MISTAKES:
        for inner in mistake.taps:
            found = _plant(trace, inner, mistake.expect, weights, slices)
            if found is not None:
                tap, difference, bound = found
                planted.append(PlantedMistake(mistake.name, tap, difference, bound))
                break
    smallest = tuple(_smallest_changes(trace, weights, slices))
    return Sensitivity(trace.name, trace.facts.dtype, tuple(planted), smallest)


def _taps(trace: Trace, inner: str) -> list[str]:
    """The taps of this inner name: the first block's and the last's, since a mistake may leave the first as it is."""
    named = [tap for tap in trace.places if split_tap(tap)[1] == inner]
    return [*dict.fromkeys([*named[:1], *named[2:3], *named[-1:]])]


def _plant(
    trace: Trace, inner: str, expect: Expect, weights: ReadWeight | None,
    slices: Callable[[Trace, str], Iterator[slice]],
) -> tuple[str, float, float] | None:  # fmt: skip
    """The tap, the difference and its bound, where the mistake is one; None where it changes nothing."""
    for tap in _taps(trace, inner):
        operation = MistakenOperation(trace, tap, weights)
        worst, changed = (-1.0, 0.0, 0.0), False
        try:
            for tokens in slices(trace, tap):
                with np.errstate(all="ignore"):
                    right, wrong = operation.expect(tokens), expect(operation, tokens)
                    planted = _planted(trace, tap, tokens, right, wrong.value)
                    changed = changed or bool((np.asarray(wrong.value) != np.asarray(right.value)).any())
                worst = max(worst, _largest(planted, right))
        except (Missing, KeyError, ValueError):
            continue
        if changed:
            return tap, worst[1], worst[2]
    return None


def _planted(trace: Trace, tap: str, tokens: slice, right: Expected, wrong: Array) -> Array:
    """The recorded values with what a mistake makes of them."""
    found = np.asarray(trace.read(tap, tokens), np.float64)
    return found + (np.asarray(wrong, np.float64) - np.asarray(right.value, np.float64))


def _largest(planted: Array, right: Expected) -> tuple[float, float, float]:
    """The largest share of the bound, with its difference and bound."""
    away = np.abs(planted - np.asarray(right.value, np.float64))
    away, bound = np.broadcast_arrays(np.where(np.isfinite(away), away, np.inf), right.bound)
    share = np.where(bound > 0, away / np.where(bound > 0, bound, 1), np.where(away > 0, np.inf, 0))
    at = np.unravel_index(int(share.argmax()), share.shape)
    return float(share[at]), float(away[at]), float(bound[at])


# ---- the smallest changes


def _smallest_changes(
    trace: Trace, weights: ReadWeight | None, slices: Callable[[Trace, str], Iterator[slice]]
) -> Iterator[SmallestChange]:
    """Those of one weight of each product, of one rotary angle and of each epsilon."""
    tries: list[tuple[str, str, Callable[[MistakenOperation, slice, float], Array], str]] = []
    for inner in (*PRODUCTS, "q_rotated", "k_rotated", "ln_1", "ln_f"):
        for tap in _taps(trace, inner)[:1]:
            if inner in PRODUCTS:
                tries.append(("one weight", tap, _one_weight, "row 0, the weight of median size"))
            elif inner in ("ln_1", "ln_f"):
                tries.append(("epsilon", tap, _another_epsilon, f"{trace.facts.config.layer_norm_epsilon:g}"))
            else:
                tries.append(("one rotary angle", tap, _one_angle, "the last token's first pair"))
    for what, tap, change, of in tries:
        operation = MistakenOperation(trace, tap, weights)
        try:
            found = _bisect(functools.partial(_shows, operation, change, [*slices(trace, tap)]))
        except (Missing, KeyError):
            continue
        yield SmallestChange(what, tap, found, of)


def _shows(
    operation: MistakenOperation, change: Callable[[MistakenOperation, slice, float], Array], parts: Sequence[slice],
    by: float,
) -> bool:  # fmt: skip
    """Whether a relative change alone, without the backend's rounding, is beyond the bound."""
    with np.errstate(all="ignore"):
        for tokens in parts:
            right = operation.expect(tokens)
            if _largest(change(operation, tokens, by), right)[0] > 1:
                return True
    return False


def _bisect(shows: Callable[[float], bool]) -> float:
    """The smallest change that shows; infinity where none does."""
    low, high = math.log2(SMALLEST_CHANGE), math.log2(LARGEST_CHANGE)
    if not shows(2.0**high):
        return math.inf
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if shows(2.0**middle) else (middle, high)
    return float(2.0**high)


def _one_weight(operation: MistakenOperation, tokens: slice, by: float) -> Array:
    """Row 0's weight of median size, changed: what the first channel gets more."""
    right = np.array(operation.expect(tokens).value, np.float64)
    row = operation.own("weight")[0].astype(np.float64)
    column = int(np.argsort(np.abs(row))[len(row) // 2])
    added = operation.near(PRODUCTS[operation.inner][0], tokens)[..., column] * row[column] * by
    if operation.inner in ("q", "k", "v"):
        right[:, 0, :, 0] += added
    else:
        right[..., 0] += added
    return right


def _another_epsilon(operation: MistakenOperation, tokens: slice, by: float) -> Array:
    value: Array = operation.normed(tokens, epsilon=operation.config.layer_norm_epsilon * (1 + by)).value
    return value


def _one_angle(operation: MistakenOperation, tokens: slice, by: float) -> Array:
    """The angle of the last token's first pair, changed by a share of itself."""
    last = operation.length - 1

    def table(positions: Array, width: int) -> tuple[Array, Array]:
        sin, cos = (np.array(part) for part in rotary(positions, width))
        _, stop, _ = tokens.indices(operation.length)
        if stop == last + 1:
            angle = positions[:, -1] * (1 + by)
            sin[:, -1, 0], cos[:, -1, 0] = np.sin(angle), np.cos(angle)
        return sin, cos

    value: Array = operation.rotated(tokens, table=table).value
    return value
