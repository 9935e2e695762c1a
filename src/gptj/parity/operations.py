"""Each tap computed again in float64 from its operation's recorded inputs: was an error born there, or did it come in?

An operation that has no parameters (rotation, scores, softmax, mix, activation, sum, loss) needs the trace alone; the
others need the model's weights. Some tokens are computed at a time, and the result comes with the bound of what
rounding may have done to it (`gptj.parity.bounds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import split_tap
from gptj.config import GPTJConfig
from gptj.config.labels import IGNORED_LABEL
from gptj.config.rotary import rotary_rows, rotate_pairs
from gptj.config.schema import BASE_PREFIX
from gptj.parity import bounds
from gptj.parity.bounds import Rounding
from gptj.parity.oracle import activation, token_losses
from gptj.parity.trace import Trace

__all__ = ["Expected", "Missing", "OperationOf"]

Array = NDArray[Any]
ReadWeight = Callable[[str, str], Array]
"""From a tensor's name and a dtype to its values, rounded to that dtype."""

PRODUCTS = {
    "q": ("ln_1", "attn.q_proj", False),
    "k": ("ln_1", "attn.k_proj", False),
    "v": ("ln_1", "attn.v_proj", False),
    "out_proj": ("mixed", "attn.out_proj", False),
    "fc_in": ("ln_1", "mlp.fc_in", True),
    "fc_out": ("activation", "mlp.fc_out", True),
    "logits": ("ln_f", "lm_head", True),
}
"""Taps that are products with a weight: of which tap, with which weight of the block, and whether it has a bias."""

_ROWS = 2**21  # elements of a weight that are float64 at a time, and once more as absolute values


class Missing(Exception):
    """An input of an operation that the trace does not hold, or weights that were not given."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """The result of an operation in float64, and how much of it rounding may change.

    Attributes:
        value: of the tap, or of some tokens of it.
        bound: on the absolute difference, of the same shape.
    """

    value: Array
    bound: Array


class OperationOf:
    """Computes one tap of a trace again, some tokens at a time.

    Args:
        trace: the recorded values.
        tap: its full name.
        weights: reads the model's; None where there are none.

    Raises:
        Missing: an input is not there.
    """

    def __init__(self, trace: Trace, tap: str, weights: ReadWeight | None = None) -> None:
        self._trace = trace
        self._tap = tap
        self._weights = weights
        self._config: GPTJConfig = trace.facts.config
        block, inner = split_tap(tap)
        self._block = "" if block is None else f"h.{block}."
        self._inner = inner
        entering = self._config.n_layer if block is None else block
        self._entering = f"h.{entering - 1}.sum" if entering else "embedding"
        self._dtypes = {trace.facts.dtype, trace.places[tap].tensor.dtype} - {"bool"}
        self._kept: dict[str, Array] = {}

    def expect(self, tokens: slice) -> Expected:
        """The tap's values at some tokens, and their bound.

        Raises:
            Missing: an input is not there.
        """
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # what is not finite came in, and is judged
            if self._inner == "loss":
                return self._loss()
            return _OPERATIONS.get(self._inner, OperationOf._linear)(self, tokens)

    # ---- what is read

    def _read(self, name: str, tokens: slice | None) -> Array:
        place = self._trace.places.get(name)
        if place is None:
            raise Missing(name)
        self._dtypes |= {place.tensor.dtype} - {"bool"}
        values = self._trace.read(name, tokens)
        return values if values.dtype == bool else values.astype(np.float64)

    def _near(self, name: str, tokens: slice | None) -> Array:
        """A tap of the same block."""
        return self._read(self._block + name, tokens)

    def _whole(self, name: str) -> Array:
        """A tap of the same block with all its tokens, read once."""
        if name not in self._kept:
            self._kept[name] = self._near(name, None)
        return self._kept[name]

    def _weight(self, name: str) -> Array:
        if self._weights is None:
            raise Missing("weights")
        if self._trace.facts.path == "int8":
            raise Missing("the weights as they were quantised")
        if name not in self._kept:
            self._kept[name] = self._weights(name, self._trace.facts.dtype)
        return self._kept[name]

    @property
    def _rounding(self) -> Rounding:
        return Rounding.of(*sorted(self._dtypes))

    def _require_no_cache(self) -> None:
        """Make sure that the trace holds all keys, not the new tokens' alone."""
        if self._trace.sizes["s"] != self._trace.sizes["t"]:
            raise Missing("the cache's keys and values")

    # ---- the operations

    def _embedding(self, tokens: slice) -> Expected:
        ids = self._trace.read_input("input_ids")
        if ids is None:
            raise Missing("input_ids")
        value = self._weight(f"{BASE_PREFIX}wte.weight")[ids[:, tokens]].astype(np.float64)
        return Expected(value, self._rounding.unit * np.abs(value))

    def _layer_norm(self, tokens: slice) -> Expected:
        x = self._read(self._entering, tokens)
        name = f"{BASE_PREFIX}{self._tap}"
        weight, bias = (self._weight(f"{name}.{kind}").astype(np.float64) for kind in ("weight", "bias"))
        epsilon = self._config.layer_norm_epsilon
        centred = x - x.mean(-1, keepdims=True)
        value = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * weight + bias
        parts = self._parts(tokens)
        return Expected(value, bounds.rounding_of_layer_norm(x, weight, bias, epsilon, self._rounding, parts=parts))

    def _parts(self, tokens: slice) -> Array | None:
        """The absolute values of what the entering values are the sum of, added up; None where not recorded."""
        block = split_tap(self._entering)[0]
        if block is None:
            return None
        before = f"h.{block - 1}.sum" if block else "embedding"
        names = (f"h.{block}.out_proj", f"h.{block}.fc_out", before)
        if any(name not in self._trace.places for name in names):
            return None
        parts: Array = sum(np.abs(self._read(name, tokens)) for name in names)  # type: ignore[assignment]
        return parts

    def _rotation(self, tokens: slice) -> Expected:
        x = self._near(self._inner[0], tokens)
        positions = self._trace.read_input("position_ids")
        if positions is None:
            raise Missing("position_ids")
        width = self._config.rotary_width
        sin, cos = (table[:, None] for table in rotary_rows(positions[:, tokens], width, "float64"))
        return Expected(rotate_pairs(x, sin, cos), bounds.rounding_of_rotation(x, sin, cos, self._rounding))

    def _scores(self, tokens: slice) -> Expected:
        self._require_no_cache()
        q, k = self._near("q_rotated", tokens), np.swapaxes(self._whole("k_rotated"), -1, -2)
        root = math.sqrt(self._config.head_dim)
        absolute = np.abs(q) @ np.abs(k) / root
        bound = bounds.rounding_of_product(absolute, self._config.head_dim, self._rounding)
        return Expected(q @ k / root, bound)

    def _visible(self, tokens: slice) -> Expected:
        """Causal, and without the padding."""
        t, s = self._trace.sizes["t"], self._trace.sizes["s"]
        causal = np.tril(np.ones((t, s), bool), s - t)[None, None, tokens]
        mask = self._trace.read_input("attention_mask")
        if mask is None:
            raise Missing("attention_mask")
        value = causal & mask.astype(bool)[:, None, None, :]
        return Expected(value, np.zeros(value.shape))

    def _scored(self, tokens: slice) -> tuple[Array, Array | float]:
        """The scores and what they may be off by: computed again where the trace has queries and keys alone."""
        if self._block + "scores" in self._trace.places:
            return self._near("scores", tokens), 0.0
        products = self._scores(tokens)
        return products.value, products.bound

    def _seen(self, tokens: slice) -> Array:
        """The keys that are visible, by the mask where the trace does not say."""
        recorded = self._block + "visible" in self._trace.places
        return self._near("visible", tokens) if recorded else self._visible(tokens).value

    def _softmax(self, tokens: slice) -> Expected:
        scores, off = self._scored(tokens)
        visible = np.broadcast_to(self._seen(tokens), scores.shape)
        below = np.where(visible, scores, np.finfo(np.float64).min)
        exponentials = np.exp(below - below.max(-1, keepdims=True))
        value = np.where(visible, exponentials / exponentials.sum(-1, keepdims=True), 0)
        return Expected(value, bounds.rounding_of_softmax(scores, visible, value, self._rounding, off=off))

    def _mix(self, tokens: slice) -> Expected:
        self._require_no_cache()
        weights, v = self._near("weights", tokens), self._whole("v")
        shape = (len(weights), weights.shape[2], self._config.n_embd)
        value, absolute = (
            np.swapaxes(a @ b, 1, 2).reshape(shape) for a, b in ((weights, v), (np.abs(weights), np.abs(v)))
        )
        return Expected(value, bounds.rounding_of_product(absolute, weights.shape[-1], self._rounding))

    def _activation(self, tokens: slice) -> Expected:
        x, name = self._near("fc_in", tokens), self._config.activation_function
        return Expected(activation(name, x), bounds.rounding_of_activation(name, x, self._rounding))

    def _sum(self, tokens: slice) -> Expected:
        parts = [self._near("out_proj", tokens), self._near("fc_out", tokens), self._read(self._entering, tokens)]
        absolute = sum(np.abs(part) for part in parts)
        assert not isinstance(absolute, int)
        return Expected(parts[0] + parts[1] + parts[2], bounds.rounding_of_sum(absolute, self._rounding))

    def _linear(self, tokens: slice) -> Expected:
        """x W' + bias; W is float64 some rows at a time."""
        source, name, has_bias = PRODUCTS[self._inner]
        full = name if self._inner == "logits" else f"{BASE_PREFIX}{self._block}{name}"
        tied = self._inner == "logits" and self._config.tie_word_embeddings
        weight = self._weight(f"{BASE_PREFIX}wte.weight" if tied else f"{full}.weight")
        bias = self._weight(f"{full}.bias").astype(np.float64) if has_bias else None
        return self._product(self._near(source, tokens), weight, bias)

    def _product(self, x: Array, weight: Array, bias: Array | None) -> Expected:
        """x W' + bias, with heads where the tap has them."""
        value, absolute = (np.empty((*x.shape[:-1], len(weight))) for _ in range(2))
        rows = max(1, _ROWS // weight.shape[1])
        for start in range(0, len(weight), rows):
            near = weight[start : start + rows].astype(np.float64).T
            value[..., start : start + rows] = x @ near
            absolute[..., start : start + rows] = np.abs(x) @ np.abs(near)
        if bias is not None:
            value, absolute = value + bias, absolute + np.abs(bias)
        if self._inner in ("q", "k", "v"):
            value, absolute = self._split_heads(value), self._split_heads(absolute)
        return Expected(value, bounds.rounding_of_product(absolute, x.shape[-1], self._rounding))

    def _split_heads(self, x: Array) -> Array:
        return np.swapaxes(x.reshape(*x.shape[:2], self._config.n_head, self._config.head_dim), 1, 2)

    def _loss(self) -> Expected:
        """The mean over the labels, each predicted from the position before it."""
        labels = self._trace.read_input("labels")
        if labels is None:
            raise Missing("labels")
        total, largest, t = 0.0, 0.0, labels.shape[1]
        count = int((labels[:, 1:] != IGNORED_LABEL).sum())
        step = max(1, _ROWS // (len(labels) * self._config.vocab_size))
        for start in range(0, t - 1, step):
            stop = min(start + step, t - 1)
            logits = self._read("logits", slice(start, stop))
            total += float(token_losses(logits, labels[:, start + 1 : stop + 1]).sum())
            largest = max(largest, float(np.abs(logits).max()))
        loss = total / max(count, 1)
        bound = bounds.rounding_of_loss(largest, loss, max(count, 1), self._config.vocab_size, self._rounding)
        return Expected(np.asarray(loss), np.asarray(bound))


_OPERATIONS: dict[str, Callable[[OperationOf, slice], Expected]] = {
    "embedding": OperationOf._embedding,
    "ln_1": OperationOf._layer_norm,
    "ln_f": OperationOf._layer_norm,
    "q_rotated": OperationOf._rotation,
    "k_rotated": OperationOf._rotation,
    "scores": OperationOf._scores,
    "visible": OperationOf._visible,
    "weights": OperationOf._softmax,
    "mixed": OperationOf._mix,
    "activation": OperationOf._activation,
    "sum": OperationOf._sum,
}
"""Of the taps that are no products with weights. Bound methods in an instance would hold its weights in a circle."""
