"""The oracle with errors as large as rounding's put in at every step: how far rounding takes each answer of a model.

A bound of a whole pass that needs no weights (`gptj.parity.bounds.accumulate`) has to take every operation at its
worst. Whoever has the weights can try: rounding errors are drawn at random, independent, where an arithmetic makes
them, and what they do to the answers is measured (stochastic arithmetic, as in CESTAC: Vignes 1993, Math. Comput.
Simul. 35, 233-261). Beside the exact rows of a batch lie its perturbed ones, so that weights are read once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.parity.bounds import SAFETY, Rounding, shifted
from gptj.parity.oracle import Oracle, token_losses

__all__ = ["Bounded", "PerturbedPass"]

Array = NDArray[Any]

SAMPLES = 2
"""Perturbed copies of a batch: a token has hundreds of values, of which the root of the mean square is taken."""


_OF_ACTIVATION = 4.0
"""Units: half of the eight roundings that `gptj.parity.bounds` counts at worst."""


class Bounded:
    """An answer in float64, and how far rounding may take it.

    Args:
        value: the answer.
        bound: of the absolute difference, of a shape that broadcasts to the value's.
    """

    def __init__(self, value: Array, bound: Array) -> None:
        self.value = value
        self.bound = bound


class _PerturbedOracle(Oracle):
    """An oracle whose rows from a number on are off, at every step, by errors drawn as large as rounding's.

    A rounding to the nearest is off by 0.4 units at most in the root of the mean square; one unit stands for the three
    that a step may have. A sum of n products is off by sqrt(n) roundings of the type that it is summed in.
    """

    def __init__(self, oracle: Oracle, rounding: Rounding, exact: int) -> None:
        self.__dict__.update(oracle.__dict__)
        self._rounding, self._exact = rounding, exact
        self._random = np.random.Generator(np.random.Philox(0))

    def _off(self, x: Array, length: int = 0, *, roundings: float = 1.0) -> Array:
        x = np.array(x)
        part = x[self._exact :]
        size = np.abs(part) * (roundings * self._rounding.unit)
        if length:
            rms = np.sqrt((part * part).mean(-1, keepdims=True))
            size = size + math.sqrt(length) * self._rounding.summing * rms
        part += size * self._random.standard_normal(part.shape)
        return x

    def layer_norm(self, name: str, x: Array) -> Array:
        """The same of an input that was rounded, rounded."""
        return self._off(super().layer_norm(name, self._off(x)), x.shape[-1])

    def linear(self, name: str, x: Array, *, bias: bool = False) -> Array:
        """The same of an input that was rounded, rounded; an activation is made of several steps."""
        given = self._off(x, roundings=_OF_ACTIVATION if name.endswith("fc_out") else 1.0)
        return self._off(super().linear(name, given, bias=bias), x.shape[-1])

    def block(
        self, layer: int, x: Array, visible: Array, positions: Array, factors: Array | None
    ) -> tuple[Array, Array]:
        """The same, its sum rounded."""
        found, weights = super().block(layer, x, visible, positions, factors)
        return self._off(found), weights

    def rotate(self, x: Array, positions: Array) -> Array:
        """The same, rounded."""
        return self._off(super().rotate(x, positions))

    def scores(self, q: Array, k: Array) -> Array:
        """The same, rounded."""
        return self._off(super().scores(q, k), q.shape[-1])

    def attention_weights(self, scores: Array, visible: Array) -> Array:
        """The same, rounded."""
        return self._off(super().attention_weights(scores, visible))

    def lm_head(self, hidden: Array) -> Array:
        """The same of an input that was rounded, rounded."""
        return self._off(super().lm_head(self._off(hidden)), hidden.shape[-1])


class PerturbedPass:
    """One forward pass of the oracle, exact and perturbed.

    Args:
        oracle: in float64.
        rounding: the arithmetic whose errors are drawn.
        ids: (b, t).
        mask, positions: (b, t) or None, as in `Oracle.forward`.
    """

    def __init__(
        self, oracle: Oracle, rounding: Rounding, ids: Array, mask: Array | None = None, positions: Array | None = None
    ) -> None:
        self._rounding, self._rows = rounding, len(ids)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: np.tile(x, (1 + SAMPLES, 1)) for name, x in given.items() if x is not None}
        self._taps = _PerturbedOracle(oracle, rounding, self._rows).taps(**inputs)

    def value(self, tap: str) -> Array:
        """A tap without errors."""
        return self._taps[tap][: self._rows]

    def bound(self, values: Array, axes: tuple[int, ...]) -> Array:
        """How far rounding takes values (all rows, t, ...): a multiple of the root of the mean square, over some axes.

        No token's is below that of half of all tokens, since few values may by chance be off by little.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            off = (values[self._rows :] - np.tile(values[: self._rows], (SAMPLES, *[1] * (values.ndim - 1)))) ** 2
            rms: Array = np.sqrt(
                off.reshape(SAMPLES, self._rows, *values.shape[1:]).mean((0, *(axis + 1 for axis in axes)))
            )
        found: Array = SAFETY * np.maximum(rms, np.median(rms)) + self._rounding.smallest
        return found

    def of(self, tap: str) -> Bounded:
        """A tap with axes (b, t, ...)."""
        return Bounded(self.value(tap), self.bound(self._taps[tap], (2,))[..., None])

    def attention(self, block: int) -> Bounded:
        """A block's attention weights (b, h, t, s): each moves as far as its scores' error and its own size let it."""
        weights, visible = (self._taps[f"h.{block}.{name}"] for name in ("weights", "visible"))
        scores = np.where(visible, self._taps[f"h.{block}.scores"], 0)
        seen = visible.mean(-1)[: self._rows]  # hidden keys' scores, put at 0, are off by nothing
        off = self.bound(scores, (3,)) / np.sqrt(np.maximum(seen, 1 / scores.shape[-1]))
        exact = weights[: self._rows]
        unit, peak = self._rounding.unit, np.abs(scores[: self._rows]).max(-1)
        low, high = shifted(exact, (off + 4 * unit * peak)[..., None])
        own = exact * (8 * unit + self._rounding.sum_of(exact.shape[-1])) + self._rounding.smallest
        return Bounded(exact, np.maximum(exact - low, high - exact) + np.where(exact > 0, own, 0))

    def losses(self, labels: Array) -> tuple[Bounded, Bounded]:
        """The loss of each token (b, t - 1), and their mean, whose rows' errors are independent."""
        target = np.tile(labels[:, 1:], (1 + SAMPLES, 1))
        losses = token_losses(self._taps["logits"][:, :-1], target)
        counted = labels[:, 1:] >= 0
        each = self.bound(losses, ()) + self._rounding.unit * np.abs(losses[: self._rows])
        mean = (losses[: self._rows] * counted).sum() / max(1, counted.sum())
        off = np.sqrt((each[counted] ** 2).mean()) if counted.any() else np.zeros(())
        return Bounded(losses[: self._rows], each), Bounded(np.asarray(mean), np.asarray(off / math.sqrt(self._rows)))
