"""Mistakes with a number of their own, fitted to a wrong tap, whole, and then held to it as any other mistake is.

Sums for a fit are added up over slices of the tokens, as the values themselves are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config.dtypes import numpy_dtype
from gptj.parity import bounds
from gptj.parity.explanation import APART, WrongTap, largest_share
from gptj.parity.mistaken import MistakenOperation, rotary
from gptj.parity.operations import PRODUCTS, Expected, Missing
from gptj.parity.spread import Spread

__all__ = ["FITS", "Fit", "spell_place"]

Array = NDArray[Any]
Fit = Callable[[WrongTap, str], "str | None"]

_NORMS = ("ln_1", "ln_f")
_NARROW = {"bfloat16", "float16"}


def _fit(measure: Fit) -> Fit:
    """The same, None where an input is not there."""

    @functools.wraps(measure)
    def fit(wrong: WrongTap, inner: str) -> str | None:
        try:
            with np.errstate(all="ignore"):
                return measure(wrong, inner)
        except (Missing, KeyError, ValueError, np.linalg.LinAlgError):
            return None

    return fit


@_fit
def _sixteen_bits(wrong: WrongTap, inner: str) -> str | None:
    """Values that 16 bits hold exactly, in a trace of more, and within what 16 bits explain."""
    if inner == "visible" or {wrong.trace.facts.dtype, wrong.trace.places[wrong.tap].tensor.dtype} & _NARROW:
        return None
    for dtype in ("bfloat16", "float16"):
        narrow, far = wrong.operation(), 0.0
        narrow.round_to(dtype)
        for part in wrong.parts():
            held = part.found.astype(numpy_dtype(dtype)).astype(np.float64) == part.found
            off = np.where(part.counted, np.abs(part.found - part.value), 0)
            if not (held | ~part.counted).all() or not (off <= narrow.expect(part.tokens).bound).all():
                break
            far = max(far, largest_share(off, part.bound))
        else:
            if far >= APART:
                return f"computed in {dtype}"
    return None


@_fit
def _recorded_after_the_mask(wrong: WrongTap, inner: str) -> str | None:
    """Scores that are right where a key is visible, and far below elsewhere."""
    if inner != "scores":
        return None

    def masked(op: MistakenOperation, tokens: slice) -> Expected:
        right, found = op.expect(tokens), wrong.found(tokens)
        hidden = ~np.broadcast_to(op.near("visible", tokens), found.shape) & (found <= -1e3)
        return Expected(np.where(hidden, found, right.value), right.bound)

    return "recorded after the mask" if wrong.explains(masked) else None


@_fit
def _factor(wrong: WrongTap, inner: str) -> str | None:
    """A multiple of what is right."""
    if inner in ("visible", "loss"):  # any one number is a multiple of another
        return None
    both, own = 0.0, 0.0
    for part in wrong.parts():
        both += float((part.found * part.value).sum(where=part.counted))
        own += float((part.value * part.value).sum(where=part.counted))
    factor = both / own if own else 0.0
    if not np.isfinite(factor) or not factor:
        return None
    return f"a factor of {factor:.4g}" if wrong.explains(lambda op, tokens: op.scaled(tokens, factor)) else None


_DROPPED_AT = ("embedding", "weights", "out_proj", "fc_out")


@_fit
def _dropout(wrong: WrongTap, inner: str) -> str | None:
    """Some values gone, and the others larger by what makes up for them."""
    if inner not in _DROPPED_AT:
        return None
    gone, all_of_them, both, own = 0, 0, 0.0, 0.0
    for part in wrong.parts():
        some = part.counted & (np.abs(part.value) > APART * part.bound)
        left = some & (part.found != 0)
        gone, all_of_them = gone + int((some & ~left).sum()), all_of_them + int(some.sum())
        both += float((part.found * part.value).sum(where=left))
        own += float((part.value * part.value).sum(where=left))
    if not 0 < gone < all_of_them:
        return None
    factor, share = both / own, gone / all_of_them
    dropped = 1 - 1 / factor
    doubt = 5 * np.sqrt(share * (1 - share) / all_of_them)
    if not abs(dropped - share) <= doubt:
        return None

    def dropping(op: MistakenOperation, tokens: slice) -> Expected:
        scaled = op.scaled(tokens, factor)
        return Expected(np.where(wrong.found(tokens) == 0, 0, scaled.value), scaled.bound)

    return f"dropout of {dropped:.2g} left on" if wrong.explains(dropping) else None


@_fit
def _variance(wrong: WrongTap, inner: str) -> str | None:
    """A layer norm whose deviation alone is off: another epsilon, a multiple, or a variance made in one pass."""
    if inner not in _NORMS:
        return None
    operation = wrong.operation()
    scale, offset = (operation.own(kind).astype(np.float64) for kind in ("weight", "bias"))
    own = operation.config.layer_norm_epsilon
    shifts, factors, one_pass, seen = [], [], True, False
    for part in wrong.parts(operation):
        x, tokens = operation.entering(part.tokens), part.counted.any(-1)
        centred = x - x.mean(-1, keepdims=True)
        spread = (centred * centred).mean(-1)
        fitted = _fitted_variance(part.found, centred * scale, offset, part.bound)
        shifts.append((fitted.variance - spread)[tokens])
        factors.append(((fitted.variance - own) / spread)[tokens])
        square = (x * x).mean(-1)
        allowed = bounds.rounding_of_one_pass(square, x.shape[-1], operation.rounding) + fitted.doubt
        bad = part.wrong.any(-1)
        # One pass loses what two keep only where the mean is large.
        fits = fitted.close & (np.abs(fitted.variance - spread - own) <= allowed) & (~bad | (square >= 64 * spread))
        one_pass, seen = one_pass and bool((fits | ~tokens).all()), seen or bool(bad.any())
    epsilon, factor = (float(np.median(np.concatenate(values))) for values in (shifts, factors))
    if epsilon > 0 and wrong.explains(lambda op, at: op.normed(at, epsilon=epsilon)):
        return f"epsilon {epsilon:.2g}"
    if factor > 0 and wrong.explains(lambda op, at: op.normed(at, spare=len(scale) * (1 - 1 / factor))):
        return f"variance times {factor:.4g}"
    return "variance in one pass, as by Flax's fast variance" if one_pass and seen else None


class _FittedVariance:
    """The variance, epsilon with it, by which tokens' centred values were divided.

    Attributes:
        variance: (b, t), that explains what was found best.
        doubt: (b, t), by how much rounding may have moved it.
        close: (b, t), whether it explains it.
    """

    def __init__(self, variance: Array, doubt: Array, close: Array) -> None:
        self.variance, self.doubt, self.close = variance, doubt, close


def _fitted_variance(found: Array, scaled: Array, offset: Array, bound: Array) -> _FittedVariance:
    square = (scaled * scaled).sum(-1)
    inverse = ((found - offset) * scaled).sum(-1) / square
    variance = inverse**-2.0
    share = (bound * np.abs(scaled)).sum(-1) / square / inverse
    close = (np.abs(found - scaled * inverse[..., None] - offset) <= bound).all(-1) & (inverse > 0)
    return _FittedVariance(variance, 2 * share * variance, close)


@_fit
def _positions(wrong: WrongTap, inner: str) -> str | None:
    """Other positions: those at which the pairs' turns come nearest to what was found."""
    if inner not in ("q_rotated", "k_rotated"):
        return None
    operation = wrong.operation()
    given, config = operation.given("position_ids"), operation.config
    width, at = config.rotary_width, np.arange(config.n_positions)
    x, found = operation.near(inner[0], slice(None)), wrong.found(slice(None))
    pairs = [values[..., 0:width:2] + 1j * values[..., 1:width:2] for values in (x, found)]
    turns = (pairs[1] * pairs[0].conj()).sum(1)  # b t pairs, over heads
    sin, cos = rotary(at, width)
    scores = np.einsum("btw,pw->btp", turns.real, cos) + np.einsum("btw,pw->btp", turns.imag, sin)
    best = scores.argmax(-1)
    if (best == given).all() or not wrong.explains(lambda op, tokens: op.rotated(tokens, positions=best)):
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
def _another_bias(wrong: WrongTap, inner: str) -> str | None:
    """The same vector too much at every token."""
    if inner not in (*PRODUCTS, *_NORMS, "sum", "embedding"):
        return None
    axes = tuple(number for number, axis in enumerate(wrong.axes) if axis in "bt")
    tokens, total, room = 0, np.zeros(()), np.zeros(())
    low, high = np.asarray(np.inf), np.asarray(-np.inf)
    for part in wrong.parts():
        total = total + (part.found - part.value).sum(axes, where=part.counted, keepdims=True)
        tokens += int(part.counted.any(tuple(n for n in range(part.counted.ndim) if n not in axes)).sum())
        low = np.minimum(low, part.value.min(axes, keepdims=True))
        high = np.maximum(high, part.value.max(axes, keepdims=True))
        room = np.maximum(room, part.bound.max(axes, keepdims=True))
    if tokens < 3 or not (high - low > APART * room).any():  # of tokens that are all the same nothing can be said
        return None
    vector = total / tokens

    def shifted(op: MistakenOperation, at: slice) -> Expected:
        right = op.expect(at)
        return Expected(right.value + vector, right.bound)

    if not wrong.explains(shifted):
        return None
    moved = np.flatnonzero(np.abs(vector) > room)
    return "another bias" if len(moved) > 1 else f"another bias, in row {int(moved[0])} alone"


@_fit
def _one_row(wrong: WrongTap, inner: str) -> str | None:
    """One channel alone, which another row of the weight explains."""
    if inner == "embedding":
        return _one_token_id(wrong)
    if inner not in (*PRODUCTS, *_NORMS):
        return None
    spread = _spread(wrong)
    channel_axes = [axis for axis in wrong.axes if axis not in "bt"]
    places = spread.places
    if [*places] != [axis for axis, size in zip(wrong.axes, wrong.shape, strict=True)
                     if axis in channel_axes and size > 1]:  # fmt: skip
        return None
    sizes = {axis: wrong.shape[wrong.axes.index(axis)] for axis in channel_axes}
    row = int(np.ravel_multi_index([places.get(axis, 0) for axis in channel_axes], [*sizes.values()]))
    if int(np.prod([*sizes.values()])) < 4:
        return None
    expects = _norm_with_row(wrong, row) if inner in _NORMS else _products_with_row(wrong, row, inner)
    return f"row {row} alone of its weight" if any(map(wrong.explains, expects)) else None


def _of_row(wrong: WrongTap, values: Array, row: int) -> Array:
    """A channel's values of every token, (b t,)."""
    if "h" in wrong.axes:
        return np.asarray(values[:, row // values.shape[-1], :, row % values.shape[-1]]).reshape(-1)
    return np.asarray(values[..., row]).reshape(-1)


def _put(values: Array, row: int, value: Any) -> Array:
    """Another row; 16 bits would round it, and all in float64 is much of a large weight."""
    changed = np.array(values, np.float64 if values.ndim == 1 or values.dtype == np.float64 else np.float32)
    changed[row] = value
    return changed


def _norm_with_row(wrong: WrongTap, row: int) -> list[Any]:
    """The layer norm with a scale and an offset of that channel that fit it best."""
    operation = wrong.operation()
    columns, found = [], []
    for part in wrong.parts(operation):
        normal = operation.normed(part.tokens, weight=np.ones_like, bias=np.zeros_like).value
        kept = _of_row(wrong, part.counted, row)
        columns.append(_of_row(wrong, normal, row)[kept])
        found.append(_of_row(wrong, part.found, row)[kept])
    scale, offset = _line(np.concatenate(columns), np.concatenate(found))
    return [lambda op, at: op.normed(at, weight=lambda w: _put(w, row, scale), bias=lambda b: _put(b, row, offset))]


def _products_with_row(wrong: WrongTap, row: int, inner: str) -> list[Any]:
    """The product with a multiple of that row and another bias; and with the row that fits it best.

    The latter can be told from anything else only where there are more tokens than the row has weights.
    """
    operation = wrong.operation()
    source, _, has_bias = PRODUCTS[inner]
    weight = operation.own("weight")
    xs, rights, found = [], [], []
    for part in wrong.parts(operation):
        kept = _of_row(wrong, part.counted, row)
        xs.append(operation.near(source, part.tokens).reshape(-1, weight.shape[1])[kept])
        rights.append(xs[-1] @ weight[row].astype(np.float64))
        found.append(_of_row(wrong, part.found, row)[kept])
    x, right, values = (np.concatenate(each) for each in (xs, rights, found))
    factor, added = _line(right, values) if has_bias else (float(right @ values / (right @ right)), 0.0)
    changes = [(factor * weight[row].astype(np.float64), added)]
    if len(x) >= weight.shape[1] + 1 + _SPARE_TOKENS:
        columns = np.concatenate([x, np.ones((len(x), 1))], 1) if has_bias else x
        best = np.linalg.lstsq(columns, values, rcond=None)[0]
        changes.append((best[: weight.shape[1]], best[-1] if has_bias else 0.0))

    def with_row(values: Array, bias: float) -> Any:
        changed = _put(weight, row, values)
        return lambda op, at: op.multiplied(at, weight=changed, bias=lambda b: _put(b, row, bias))

    return [with_row(*change) for change in changes]


_SPARE_TOKENS = 8
"""More than a row's weights: each is one more chance to see that no row explains a channel."""


def _line(x: Array, y: Array) -> tuple[float, float]:
    """The slope and offset that fit y best."""
    slope, offset = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    return float(slope), float(offset)


def _one_token_id(wrong: WrongTap) -> str | None:
    """A token that is wrong wherever it stands, several times and alike, and no other is."""
    ids = wrong.operation().given("input_ids")
    bad, rows = np.zeros(ids.shape, bool), []
    for part in wrong.parts():
        bad[:, part.tokens] = part.wrong.any(-1)
    of = np.unique(ids[bad])
    counted = np.ones(ids.shape, bool) if wrong.among is None else wrong.among
    if len(of) != 1 or int((occurs := (ids == of[0]) & counted).sum()) < 2 or not (bad == occurs).all():
        return None
    for part in wrong.parts():
        rows.append(part.found[occurs[:, part.tokens]])
    row = np.concatenate(rows)[0]

    def with_row(op: MistakenOperation, tokens: slice) -> Expected:
        right = op.expect(tokens)
        here = occurs[:, tokens, None]
        bound = np.where(here, np.maximum(right.bound, op.bound_of_sum([np.abs(row)])), right.bound)
        return Expected(np.where(here, row, right.value), bound)

    return f"row {int(of[0])} alone of its weight" if wrong.explains(with_row) else None


def _spread(wrong: WrongTap) -> Spread:
    """The elements at which the tap is wrong."""
    spread = Spread(wrong.axes, wrong.shape)
    for part in wrong.parts():
        spread.add(part.wrong, part.tokens.indices(max(1, wrong.trace.sizes.get("t", 1)))[0])
    return spread


@_fit
def spell_place(wrong: WrongTap, inner: str) -> str | None:
    """The one row, token, head, channel or key in which a tap is wrong; None where it is wrong in several."""
    if inner == "loss":
        return None
    spread = _spread(wrong)
    away = max((largest_share(np.where(part.counted, np.abs(part.found - part.value), 0), part.bound)
                for part in wrong.parts()), default=0.0)  # fmt: skip
    return spread.spell(wrong.trace.read_input("attention_mask")) if away >= APART else None


FITS: tuple[Fit, ...] = (
    _sixteen_bits, _recorded_after_the_mask, _positions, _variance, _factor, _dropout, _another_bias, _one_row,
)  # fmt: skip
