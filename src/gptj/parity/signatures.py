"""A known mistake that explains a wrong tap, tried on the trace's own inputs; named where it does, never guessed.

A mistake explains a tap where, computed again as if it had been made, every value is within what rounding does to that
computation; and where the right computation is off by several times as much somewhere, so that the two can be told
apart. Mistakes without a number of their own come first (`gptj.parity.mutants`); only where none explains the tap are
those tried whose number is fitted to it: a factor, an epsilon, positions, a bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.dtypes import numpy_dtype
from gptj.parity.mistaken import Expect, MistakenOperation, rotary
from gptj.parity.mutants import mistakes_at
from gptj.parity.operations import PRODUCTS, Expected, Missing, ReadWeight
from gptj.parity.trace import Trace, slices_of
from gptj.taps import split_tap

__all__ = ["find_signature"]

Array = NDArray[Any]
Slices = Callable[[Trace, str], Iterator[slice]]

APART = 4.0
"""How many bounds of the mistaken computation the right one must be off by, somewhere: two of them are in doubt."""

_MOST = 3
"""Mistakes that are named where several explain the tap alike."""


def find_signature(
    trace: Trace, tap: str, weights: ReadWeight | None, slices: Callable[[Trace, str], Iterator[slice]] = slices_of
) -> str | None:
    """The mistakes that explain a tap, "rotary sign" or "scale left at 1 or no norm"; None where none does.

    Args:
        trace: which holds the tap, and its operation's inputs.
        tap: that is not what its operation gives.
        weights: reads the model's; None leaves operations that need them unexplained.
        slices: of the tokens, some at a time.
    """
    tried = _Tried(trace, tap, weights, slices)
    inner = split_tap(tap)[1]
    for among in _padding_or_all(trace):
        known = [mistake.name for mistake in mistakes_at(inner) if tried.explains(mistake.expect, among)]
        if known:
            return " or ".join(known[:_MOST]) + (" or others" if len(known) > _MOST else "")
        for fit in _FITS:
            name = fit(tried, inner, among)
            if name is not None:
                return name
    return None


def _padding_or_all(trace: Trace) -> Iterator[Array | None]:
    """All tokens, and then those that are not padding, which may hold anything: (b, t) or None for all."""
    yield None
    mask = trace.read_input("attention_mask")
    if mask is not None and mask.shape[1] == trace.sizes["t"] and (mask == 0).any() and (mask == 1).any():
        yield mask == 1


@dataclasses.dataclass(frozen=True)
class _Tried:
    """A tap for which explanations are tried."""

    trace: Trace
    tap: str
    weights: ReadWeight | None
    slices: Slices

    def operation(self) -> MistakenOperation:
        return MistakenOperation(self.trace, self.tap, self.weights)

    def found(self, tokens: slice) -> Array:
        values = self.trace.read(self.tap, tokens)
        return np.asarray(values, np.float64)

    def axes(self) -> str:
        return self.trace.places[self.tap].axes

    def first(self) -> slice:
        return next(self.slices(self.trace, self.tap))

    def explains(self, expect: Expect, among: Array | None, *, operation: MistakenOperation | None = None) -> bool:
        """Whether every value is what a mistake gives, and somewhere by far not what is right."""
        operation = self.operation() if operation is None else operation
        apart = 0.0
        try:
            for tokens in self.slices(self.trace, self.tap):
                with np.errstate(all="ignore"):
                    share = self._share(operation, expect, tokens, among)
                if share is None:
                    return False
                apart = max(apart, share)
        except (Missing, KeyError, ValueError, AssertionError):
            return False
        return apart >= APART

    def _share(self, operation: MistakenOperation, expect: Expect, tokens: slice, among: Array | None) -> float | None:
        """How many bounds lie between what was found and what is right; None where the mistake does not explain it."""
        found = self.found(tokens)
        mistaken, right = expect(operation, tokens), operation.expect(tokens)
        value = np.broadcast_to(mistaken.value, found.shape).astype(np.float64)
        counted = self._counted(among, tokens, found.shape)
        bound = np.broadcast_to(mistaken.bound, found.shape)
        off = np.abs(found - value)
        both = ~np.isfinite(found) & ~np.isfinite(value)
        if not ((off <= bound) | both | ~counted).all():
            return None
        away = np.where(counted, np.abs(found - right.value.astype(np.float64)), 0)
        return _largest_share(away, bound)

    def _counted(self, among: Array | None, tokens: slice, shape: tuple[int, ...]) -> Array:
        axes = self.axes()
        if among is None or "t" not in axes or "b" not in axes:
            return np.ones(shape, bool)
        sizes = [size if axis in "bt" else 1 for axis, size in zip(axes, shape, strict=True)]
        return np.broadcast_to(among[: sizes[0], tokens].reshape(sizes), shape)


def _largest_share(away: Array, bound: Array) -> float:
    """The largest difference in bounds; what is not finite is none."""
    away = np.where(np.isfinite(away), away, 0)
    share = np.where(bound > 0, away / np.where(bound > 0, bound, 1), np.where(away > 0, np.inf, 0))
    return float(share.max(initial=0.0))


# ---- mistakes with a number of their own

Fit = Callable[[_Tried, str, "Array | None"], "str | None"]


def _fit(measure: Callable[[_Tried, str, Array | None], str | None]) -> Fit:
    """The same, None where an input is not there."""

    def fit(tried: _Tried, inner: str, among: Array | None) -> str | None:
        try:
            with np.errstate(all="ignore"):
                return measure(tried, inner, among)
        except (Missing, ValueError, np.linalg.LinAlgError):
            return None

    return fit


@_fit
def _sixteen_bits(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """Values that 16 bits hold exactly, in a trace of more, and within what 16 bits explain."""
    if inner == "visible" or {tried.trace.facts.dtype, tried.trace.places[tried.tap].tensor.dtype} & _NARROW:
        return None
    for dtype in ("bfloat16", "float16"):
        values = [tried.found(tokens) for tokens in tried.slices(tried.trace, tried.tap)]
        if not all((part.astype(numpy_dtype(dtype)).astype(np.float64) == part).all() for part in values):
            continue
        narrow, right = tried.operation(), tried.operation()
        narrow.round_to(dtype)
        near, far = True, 0.0
        for tokens, part in zip(tried.slices(tried.trace, tried.tap), values, strict=True):
            off = np.abs(part - right.expect(tokens).value)
            near = near and bool((off <= narrow.expect(tokens).bound).all())
            far = max(far, _largest_share(off, np.broadcast_to(right.expect(tokens).bound, off.shape)))
        if near and far >= APART:
            return f"computed in {dtype}"
    return None


_NARROW = {"bfloat16", "float16"}


def _value(expected: Expected) -> Array:
    return expected.value.astype(np.float64)


@_fit
def _recorded_after_the_mask(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """Scores that are right where a key is visible, and far below elsewhere."""
    if inner != "scores":
        return None

    def masked(op: MistakenOperation, tokens: slice) -> Expected:
        right, found = op.expect(tokens), tried.found(tokens)
        hidden = ~np.broadcast_to(op.near("visible", tokens), found.shape) & (found <= -1e3)
        return Expected(np.where(hidden, found, right.value), right.bound)

    return "recorded after the mask" if tried.explains(masked, among) else None


@_fit
def _factor(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """A multiple of what is right."""
    if inner == "visible":
        return None
    right, found = _value(tried.operation().expect(tried.first())), tried.found(tried.first())
    factor = float((found * right).sum() / (right * right).sum())
    if not np.isfinite(factor) or not factor:
        return None
    explained = tried.explains(lambda op, tokens: op.scaled(tokens, factor), among)
    return f"a factor of {factor:.4g}" if explained else None


@_fit
def _variance(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """A layer norm whose deviation alone is off: by another epsilon, or by a variance that was made in one pass."""
    if inner not in ("ln_1", "ln_f"):
        return None
    operation, tokens = tried.operation(), tried.first()
    x, found = operation.entering(tokens), tried.found(tokens)
    scale, offset = (operation.own(kind).astype(np.float64) for kind in ("weight", "bias"))
    normal = (x - x.mean(-1, keepdims=True)) * scale
    inverse = ((found - offset) * normal).sum(-1) / (normal * normal).sum(-1)
    variance = inverse**-2.0
    extra = variance - x.var(-1)
    epsilon = float(np.median(extra))
    if epsilon > 0 and tried.explains(lambda op, at: op.normed(at, epsilon=epsilon), among):
        return f"epsilon {epsilon:.2g}"
    square = (x * x).mean(-1)
    one_pass = np.abs(extra - operation.config.layer_norm_epsilon) <= 64 * 2.0**-24 * square
    right = operation.expect(tokens)
    fitted = normal * inverse[..., None] + offset
    close = (np.abs(found - fitted) <= right.bound).all()
    wrong = (np.abs(found - right.value) > right.bound).any(-1)
    large = square >= 64 * x.var(-1)  # only there does one pass lose what two keep
    explained = wrong.any() and close and one_pass.all() and large[wrong].all()
    return "variance in one pass, as by Flax's fast variance" if explained else None


@_fit
def _positions(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """Other positions: those at which the pairs' turns come nearest to what was found."""
    if inner not in ("q_rotated", "k_rotated"):
        return None
    operation = tried.operation()
    given, config = operation.given("position_ids"), operation.config
    width, at = config.rotary_width, np.arange(config.n_positions)
    x, found = operation.near(inner[0], slice(None)), tried.found(slice(None))
    pairs = [values[..., 0:width:2] + 1j * values[..., 1:width:2] for values in (x, found)]
    turns = (pairs[1] * pairs[0].conj()).sum(1)  # b t pairs, over heads
    sin, cos = rotary(at, width)
    scores = np.einsum("btw,pw->btp", turns.real, cos) + np.einsum("btw,pw->btp", turns.imag, sin)
    best = scores.argmax(-1)
    if (best == given).all() or not tried.explains(lambda op, tokens: op.rotated(tokens, positions=best), among):
        return None
    return _spell_positions(np.broadcast_to(given, best.shape), best)


def _spell_positions(given: Array, found: Array) -> str:
    off = found - given
    moved = np.flatnonzero((off != 0).any(0))
    start = int(moved[0])
    late = off[:, start:]
    since = "" if start == 0 else f" from token {start} on"
    if (late == late.flat[0]).all():
        return f"positions off by {int(late.flat[0]):+d}{since}"
    row, token = (int(index) for index in np.argwhere(off != 0)[0])
    return f"other positions{since}: {int(found[row, token])} for {int(given[row, token])}"


@_fit
def _another_bias(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """The same vector too much at every token."""
    if inner not in (*PRODUCTS, "ln_1", "ln_f", "sum", "embedding"):
        return None
    off = tried.found(tried.first()) - _value(tried.operation().expect(tried.first()))
    axes = tuple(number for number, axis in enumerate(tried.axes()) if axis in "bt")
    tokens = int(np.prod([off.shape[axis] for axis in axes]))
    if tokens < 3:
        return None
    vector = np.median(off, axes, keepdims=True)

    def shifted(op: MistakenOperation, at: slice) -> Expected:
        right = op.expect(at)
        return Expected(right.value + vector, right.bound)

    return "another bias" if tried.explains(shifted, among) else None


@_fit
def _one_row(tried: _Tried, inner: str, among: Array | None) -> str | None:
    """One channel alone: a row of the weight."""
    if inner not in (*PRODUCTS, "ln_1", "ln_f"):
        return None
    operation, wrong = tried.operation(), None
    for tokens in tried.slices(tried.trace, tried.tap):
        right = operation.expect(tokens)
        beyond = ~(np.abs(tried.found(tokens) - right.value) <= right.bound)
        axes = tuple(number for number, axis in enumerate(tried.axes()) if axis in "bt")
        wrong = beyond.any(axes) if wrong is None else wrong | beyond.any(axes)
    if wrong is None or wrong.size < 4 or int(wrong.sum()) != 1:
        return None
    place = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return f"row {int(np.ravel_multi_index(place, wrong.shape))} alone of its weight"


_FITS: tuple[Fit, ...] = (
    _sixteen_bits, _recorded_after_the_mask, _positions, _variance, _factor, _another_bias, _one_row,
)  # fmt: skip
