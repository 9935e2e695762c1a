"""How far rounding alone may take each tap: from the dtype, the lengths of the sums, and the float64 values.

Two questions, two answers.

**One operation on given inputs** (`rounding_of_product` and the others): a bound for each element, from a running error
analysis (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.3): the sum of the absolute values
that the operation adds up, times the unit roundoff, times a factor for the length of the sum. The worst case of n
additions is n roundings in one direction; rounding errors of mean zero stay below lambda sqrt(n) u with a probability
above 1 - 2 n exp(-lambda^2 / 2) (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815, theorem 3.1), which is what
is used where it is smaller, with lambda = 8. It holds for every order of summation.

**A whole forward pass** (`accumulate`): without the weights no bound of an error's way through the blocks can be
proven, so its size is estimated, a token at a time: each operation hands on the relative error of its inputs as it
hands on the values themselves, and adds its own; independent errors add up as squares do. `SAFETY` times that is the
bound. It tells where two traces part; whether an error was born there, the first answer tells.

Products of 16-bit numbers are summed in float32 by every framework, and rounded once. A recorded value may have been
rounded for the record alone, where a program computes on in a wider type; each input counts one rounding for that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import split_tap
from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype

__all__ = [
    "LAMBDA",
    "SAFETY",
    "Rounding",
    "TokenSizes",
    "accumulate",
    "rounding_of_activation",
    "rounding_of_layer_norm",
    "rounding_of_loss",
    "rounding_of_one_pass",
    "rounding_of_product",
    "rounding_of_rotation",
    "rounding_of_softmax",
    "rounding_of_sum",
    "shifted",
]

Array = NDArray[np.float64]

LAMBDA = 8.0
"""A sum of n = 10^5 leaves its bound with a probability below 2 n exp(-32) = 3e-9."""

SAFETY = 8.0
"""Times the estimated error of a whole pass: a token's largest of thousands of normal errors is near 4 deviations, and
heads or channels differ from the token's mean. Of 200 random models in three dtypes the worst tap took 3.4 of the 8."""

_ACTIVATION_ROUNDINGS = 8.0
"""Of |x|: tanh and erf within 5 units, three multiplications, and 1 + tanh, whose error is one of 1, not of the sum."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The arithmetic of a trace.

    Attributes:
        unit: the unit roundoff u: no rounding changes a value by more than this share of it.
        summing: that of the type that products are summed in.
        smallest: what a result may lose where it underflows.
        weights: the relative error of weights that were quantised, beside their root of the mean square.
    """

    unit: float
    summing: float
    smallest: float
    weights: float = 0.0

    @classmethod
    def of(cls, *dtypes: str) -> Rounding:
        """The coarsest of the dtypes that something was computed and stored in.

        >>> Rounding.of("float32").unit == 2.0**-24, Rounding.of("float32", "bfloat16").unit
        (True, 0.00390625)
        """
        infos = [ml_dtypes.finfo(numpy_dtype(dtype)) for dtype in dtypes]  # type: ignore[no-untyped-call]
        unit = max(float(info.eps) for info in infos) / 2
        # Processors that flush do so for float32 and wider; float16 alone would lose values that matter.
        lost = (info.smallest_subnormal if info.bits == 16 else info.smallest_normal for info in infos)
        return cls(unit, min(unit, 2.0**-24), max(map(float, lost)))

    def quantized(self) -> Rounding:
        """The same where weights were rounded to 8 bits with a scale a channel.

        Rounding to a grid of largest / 127 errs by its step over sqrt(12), and a channel's largest weight is some four
        times their root of the mean square: 4 / (127 sqrt(12)) = 0.009, near 2^-7.
        """
        return dataclasses.replace(self, weights=2.0**-7)

    def sum_of(self, length: int) -> float:
        """The share of the sum of absolute values by which a sum of so many products may be off."""
        return min(float(length), LAMBDA * math.sqrt(length)) * self.summing


# ---- one operation on given inputs


def rounding_of_product(absolute: Array, length: int, rounding: Rounding) -> Array:
    """The bound of a sum of products.

    Args:
        absolute: the same sum of absolute values, |a| |b|, with a bias' too.
        length: of the sum.
        rounding: the arithmetic.

    The five roundings are of both inputs as recorded, of a scale, of a bias that is added, and of the result.
    """
    return absolute * (rounding.sum_of(length) + 5 * rounding.unit) + rounding.smallest


def rounding_of_rotation(x: Array, sin: Array, cos: Array, rounding: Rounding) -> Array:
    """The bound of turned pairs, of x's shape: |x0 cos| + |x1 sin|, four roundings; 0 where nothing turns.

    Args:
        x: (b, h, t, d).
        sin, cos: of the angles, (b, 1, t, width / 2).
        rounding: the arithmetic; the table is float32 at least, and rounded once.
    """
    width, bound = 2 * sin.shape[-1], np.zeros_like(x)
    even, odd = np.abs(x[..., 0:width:2]), np.abs(x[..., 1:width:2])
    share = 4 * rounding.unit + rounding.summing
    bound[..., 0:width:2] = share * (even * np.abs(cos) + odd * np.abs(sin)) + rounding.smallest
    bound[..., 1:width:2] = share * (odd * np.abs(cos) + even * np.abs(sin)) + rounding.smallest
    return bound


def rounding_of_softmax(
    scores: Array, visible: NDArray[np.bool_], weights: Array, rounding: Rounding, *, off: Array | float = 0.0
) -> Array:
    """The bound of attention weights; exactly 0 where a key cannot be seen.

    Args:
        scores, visible, weights: (b, h, t, s).
        rounding: the arithmetic.
        off: what the scores may be off by, where they were not recorded.

    An exponential hands the absolute error of its argument on as a relative one: of the score as recorded, of the
    subtraction of the largest, of the function itself. The sum does so for all keys, by their weights.
    """
    seen = np.where(visible, scores, 0)
    below = np.abs(seen - np.where(visible, scores, -np.inf).max(-1, keepdims=True, initial=np.finfo(np.float64).min))
    own = rounding.unit * (2 * np.where(visible, below, 0) + np.abs(seen) + 8) + np.where(visible, off, 0)
    share = own + (weights * own).sum(-1, keepdims=True) + rounding.sum_of(scores.shape[-1])
    bound: Array = np.where(visible, weights * np.expm1(share) + rounding.smallest, 0)
    return bound


def shifted(probability: Array, off: Array | float) -> tuple[Array, Array]:
    """Between which two a probability lies whose softmax' scores are each off by `off` at most.

    The lowest is where what it is of fell by that and all else rose, the highest the other way round.

    >>> shifted(np.asarray(0.5), 0.0), [round(float(end), 3) for end in shifted(np.asarray(0.5), 0.1)]
    ((np.float64(0.5), np.float64(0.5)), [0.45, 0.55])
    """
    with np.errstate(over="ignore"):
        odds = np.exp(-2 * np.asarray(off, np.float64))
    return probability * odds / (probability * odds + (1 - probability)), probability / (
        probability + (1 - probability) * odds
    )


def rounding_of_activation(name: str, x: Array, rounding: Rounding) -> Array:
    """The bound of an activation function (one of `gptj.config.ACTIVATIONS`) of x, a token's along the last axis.

    x is a product and a bias, which may nearly cancel; a fused program rounds neither before it goes on. How large they
    are is not recorded; the token's root of the mean square stands for it, for each of the two.
    """
    roundings = 1.0 if name == "relu" else _ACTIVATION_ROUNDINGS
    recorded = rounding.unit * np.sqrt((x * x).mean(-1, keepdims=True))
    bound: Array = np.abs(x) * (roundings * rounding.unit) + 2 * recorded + rounding.smallest
    return bound


def rounding_of_sum(absolute: Array, rounding: Rounding) -> Array:
    """The bound of a sum of three, whose absolute values' sum is given: two additions, the records, the result."""
    return absolute * (4 * rounding.unit) + rounding.smallest


def rounding_of_layer_norm(
    x: Array, weight: Array, bias: Array, epsilon: float, rounding: Rounding, *, parts: Array | None = None
) -> Array:
    """The bound of a layer norm with its variance in two passes.

    Args:
        x: (b, t, m), as recorded.
        weight, bias, epsilon: of the layer norm.
        rounding: the arithmetic.
        parts: the sum of the absolute values of what x is the sum of. They may nearly cancel; a fused program goes on
            with a sum that was not rounded. None takes the token's root of the mean square for it.

    What is centred is off by its channel's own roundings, by the mean of all channels', which are independent, and by
    the mean's sum; the deviation is off by the root of the mean square of that. A variance in one pass loses more,
    where the mean is large, and is a mistake.
    """
    length = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    deviation = np.sqrt(variance + epsilon)
    summed = np.sqrt((x * x).mean(-1, keepdims=True)) if parts is None else parts
    rounded = 2 * rounding.unit * (np.abs(x) + summed)
    mean_off = min(1.0, LAMBDA / math.sqrt(length)) * np.sqrt((rounded * rounded).mean(-1, keepdims=True))
    off = rounded + mean_off + rounding.sum_of(length) * np.abs(x).mean(-1, keepdims=True)
    scale_off = np.sqrt((off * off).mean(-1, keepdims=True)) / deviation + rounding.sum_of(length) / 2
    normal = np.abs(centred / deviation * weight)
    share = scale_off + 4 * rounding.unit
    bound: Array = np.abs(weight) * off / deviation + normal * share + rounding.unit * np.abs(bias)
    return bound + rounding.smallest


def rounding_of_one_pass(square: Array, length: int, rounding: Rounding) -> Array:
    """How far a variance may be off that is the mean of the squares less the square of the mean: a deviation, thrice.

    Args:
        square: the mean of the squares, which the square of the mean is no larger than.
        length: of what they are means of.
        rounding: the arithmetic.

    A sum of n roundings of a root of the mean square of u / sqrt(3), of partial sums a third as large in the mean
    square, is off by sqrt(n) u / 3; the mean's is there twice over in its square. Each is rounded as it is squared,
    divided and subtracted. It is no bound but what is expected: to tell this variance from others, not to allow it.
    """
    return square * (3 * math.sqrt(length) + 8) * rounding.summing


def rounding_of_loss(largest: float, loss: float, count: int, vocabulary: int, rounding: Rounding) -> float:
    """The bound of a mean cross entropy over `count` tokens whose largest logit is `largest`.

    The logits as recorded and the subtraction of their largest; the exponentials, their sum, its logarithm; the mean.
    """
    wide = rounding.summing  # frameworks compute it in float32 at least
    share = rounding.sum_of(vocabulary) + 8 * wide
    return 2 * (rounding.unit + 2 * wide) * largest + share + (rounding.sum_of(count) + 4 * wide) * abs(loss)


# ---- a whole forward pass


@dataclasses.dataclass(frozen=True)
class TokenSizes:
    """The size of a tap's values, an entry a token (b, t); one entry () where it has no tokens.

    Attributes:
        rms: the root of the mean square.
        peak: the largest absolute value.
        spread: the root of the mean square of what differs from the token's mean.
    """

    rms: Array
    peak: Array
    spread: Array

    @classmethod
    def of(cls, values: Array, axes: str) -> TokenSizes:
        """The sizes of a tap, or of some tokens of it, whose axes are named."""
        kept = [axes.index(letter) for letter in "bt" if letter in axes]
        flat = np.moveaxis(values, kept, range(len(kept))).reshape(*(values.shape[axis] for axis in kept), -1)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is judged elsewhere
            square = (flat * flat).mean(-1)
            mean = flat.mean(-1, keepdims=True)
            spread = ((flat - mean) ** 2).mean(-1)
        return cls(np.sqrt(square), np.abs(flat).max(-1), np.sqrt(spread))

    @classmethod
    def join(cls, parts: list[TokenSizes]) -> TokenSizes:
        """The sizes of parts that follow each other along the tokens."""
        if len(parts) == 1:
            return parts[0]
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts], -1) for name in names))


MOST = 0.45
"""The largest share of a token's peak that is ever put down to rounding.

Two traces together thus stay below the value itself, which the estimate, as it grows with each block, would pass in a
deep model. Measured is 1.3e-2 of the largest logit, in bfloat16 at 28 blocks (`gptj.parity.tolerance`).
"""

_FREE = frozenset({"scores", "weights", "mixed", "loss"})
"""Taps that may truly lie further off: terms cancel in scores and loss, and a sharp softmax turns with its scores."""


def accumulate(
    sizes: Mapping[str, TokenSizes], config: GPTJConfig, rounding: Rounding, *, keys: int
) -> dict[str, Array]:
    """How far rounding in all of a forward pass up to each tap takes it from float64: a bound a token.

    Args:
        sizes: of the more exact values, by tap, in the order of the computation; taps may be missing.
        config: of the model.
        rounding: the arithmetic.
        keys: s, how many keys a query has.

    Returns:
        Bounds of the largest absolute difference, (b, t) or ().
    """
    walk = _Walk(sizes, config, rounding, keys)

    def bound(tap: str, size: TokenSizes) -> Array:
        share = SAFETY * walk.enter(tap)
        free = split_tap(tap)[1] in _FREE
        return np.asarray((share if free else np.minimum(share, MOST)) * size.peak)  # NaN stays

    with np.errstate(invalid="ignore", over="ignore"):  # a bound that is no number lets nothing pass
        return {tap: bound(tap, size) for tap, size in sizes.items()}


class _Walk:
    """The estimated error of each tap so far, relative to the token's root mean square."""

    def __init__(self, sizes: Mapping[str, TokenSizes], config: GPTJConfig, rounding: Rounding, keys: int) -> None:
        self._sizes = sizes
        self._config = config
        self._rounding = rounding
        self._keys = keys
        self._relative: dict[str, Any] = {}
        self._last: Any = np.float64(rounding.unit)

    def enter(self, tap: str) -> Any:
        """The relative error of the next tap."""
        block, _, inner = tap.rpartition(".")
        before = f"h.{int(block[2:]) - 1}.sum" if block and block != "h.0" else "embedding"
        entering = before if block else f"h.{self._config.n_layer - 1}.sum"
        error = self._of(inner, f"{block}." if block else "", entering)
        if error.ndim == 2:
            self._last = error if self._last.ndim == 0 else np.maximum(self._last, error)
        self._relative[tap] = error
        return error

    def _from(self, tap: str) -> Any:
        """The relative error of an input; where the trace does not hold it, the largest of what was before.

        Between that and the input stand two products with weights at most.
        """
        found = self._relative.get(tap)
        return np.hypot(self._last, 2 * self._rounding.weights) if found is None else found

    def _sum(self, length: int) -> float:
        return math.sqrt(length) * self._rounding.summing + 3 * self._rounding.unit

    def _of(self, inner: str, block: str, entering: str) -> Any:
        config, unit = self._config, self._rounding.unit
        lengths = {"fc_in": config.n_embd, "fc_out": config.inner_width, "logits": config.n_embd}
        sources = {"fc_in": "ln_1", "fc_out": "activation", "out_proj": "mixed", "logits": "ln_f"}
        if inner == "embedding":
            return np.full_like(self._sizes[inner].rms, unit)
        if inner in ("ln_1", "ln_f"):
            return self._of_layer_norm(entering)
        if inner in ("q_rotated", "k_rotated"):
            return np.hypot(self._from(block + inner[0]), 3 * unit)
        if inner == "scores":
            return self._of_scores(block)
        if inner == "visible":
            return np.zeros_like(self._sizes[block + inner].rms)
        if inner == "weights":
            return self._of_weights(block)
        if inner == "mixed":
            values = _most(self._from(f"{block}v"))
            return np.hypot(np.hypot(values, self._from(f"{block}weights")), self._sum(self._keys))
        if inner == "activation":
            return 2 * np.hypot(self._from(f"{block}fc_in"), 3 * unit)
        if inner == "sum":
            return self._of_sum(block, entering)
        if inner == "loss":
            return 2 * np.asarray(_most(self._from("logits"))).max() * self._logits_over_loss() + 3 * unit
        source = sources.get(inner, "ln_1")
        own = math.hypot(self._sum(lengths.get(inner, config.n_embd)), self._rounding.weights)
        return np.hypot(self._from(block + source), own)

    def _of_layer_norm(self, entering: str) -> Any:
        size, length = self._sizes.get(entering), self._config.n_embd
        if size is None:
            return np.hypot(self._from(entering), self._sum(length))
        deviation = np.sqrt(size.spread**2 + self._config.layer_norm_epsilon)
        return np.hypot(self._from(entering), self._sum(length)) * size.rms / deviation + self._sum(length)

    def _of_scores(self, block: str) -> Any:
        """Errors of q and k, in the size of their products, over the scores'."""
        q, k, scores = (self._sizes.get(block + name) for name in ("q_rotated", "k_rotated", "scores"))
        relative = np.hypot(self._from(f"{block}q_rotated"), _most(self._from(f"{block}k_rotated")))
        relative = np.hypot(relative, self._sum(self._config.head_dim))
        if q is None or k is None or scores is None:
            return relative
        products = q.rms * _most(k.rms)  # sqrt(d) of independent products over sqrt(d)
        return relative * np.maximum(1, _over(products, scores.rms))

    def _of_weights(self, block: str) -> Any:
        """The relative error of a weight is the absolute one of its score, and its own."""
        scores = self._sizes.get(f"{block}scores")
        peak = np.float64(1) if scores is None else scores.peak
        own = self._rounding.unit * (3 * peak + 8) / 4 + self._sum(self._keys)
        return np.minimum(np.hypot(self._from(f"{block}scores") * peak, own), 1 / SAFETY)

    def _of_sum(self, block: str, entering: str) -> Any:
        size = self._sizes[f"{block}sum"]
        total: Any = np.zeros_like(size.rms)
        for tap in (f"{block}out_proj", f"{block}fc_out", entering):
            part = self._sizes.get(tap, size)
            total = np.hypot(total, np.hypot(self._from(tap), 3 * self._rounding.unit) * part.rms)
        return _over(total, size.rms)

    def _logits_over_loss(self) -> Any:
        logits, loss = self._sizes.get("logits"), self._sizes["loss"]
        return np.float64(1) if logits is None else _over(logits.peak.max(), loss.peak)


def _most(values: Any) -> Any:
    """The largest of a row's tokens: what attention may take from any."""
    return values.max(-1, keepdims=True) if values.ndim else values


def _over(a: Any, b: Any) -> Any:
    """a / b, and 0 where both are 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=np.asarray(b) != 0)
