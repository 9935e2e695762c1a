"""Operations with one step put otherwise, on the inputs that a trace recorded: of what known mistakes are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import split_tap
from gptj.config.labels import IGNORED_LABEL
from gptj.config.rotary import ROTARY_BASE, rotate_pairs
from gptj.config.schema import BASE_PREFIX
from gptj.parity import bounds
from gptj.parity.operations import PRODUCTS, Expected, Missing, OperationOf
from gptj.parity.oracle import token_losses

__all__ = ["Expect", "MistakenOperation", "Round", "rotary"]

Array = NDArray[Any]
Round = Callable[[Array], Array]


def _same(x: Array) -> Array:
    return x


def rotary(
    positions: Array, width: int, *, base: float = ROTARY_BASE, denominator: int | None = None, sign: int = 1,
    frequencies: Round = _same, angles: Round = _same, table: Round = _same, places: Round = _same,
) -> tuple[Array, Array]:  # fmt: skip
    """Sines and cosines (..., width / 2) of positions, each step rounded as asked."""
    frequency = frequencies(base ** (-np.arange(0, width, 2) / (denominator or width)))
    angle = angles(places(np.asarray(positions, np.float64))[..., None] * frequency)
    return sign * table(np.sin(angle)), table(np.cos(angle))


class MistakenOperation(OperationOf):
    """An operation with one step put otherwise: each method is the operation, and its arguments what is put otherwise.

    Without arguments they give what the operation gives.
    """

    @property
    def config(self) -> Any:
        """The model's."""
        return self._config

    @property
    def layer(self) -> int:
        """The block's number."""
        layer = split_tap(self._tap)[0]
        assert layer is not None
        return layer

    @property
    def inner(self) -> str:
        """The tap's name in its block."""
        return self._inner

    @property
    def keys(self) -> int:
        """s, the keys of the trace."""
        return self._trace.sizes["s"]

    @property
    def length(self) -> int:
        """t, the tokens of the trace."""
        return self._trace.sizes["t"]

    @property
    def rounding(self) -> bounds.Rounding:
        """The arithmetic of what was read so far."""
        return self._rounding

    def round_to(self, dtype: str) -> None:
        """Let the bounds be those of a dtype that is not recorded."""
        self._dtypes.add(dtype)

    def given(self, name: str) -> Array:
        """An argument of the model.

        Raises:
            Missing: the trace does not say.
        """
        values = self._trace.read_input(name)
        if values is None:
            raise Missing(name)
        return values

    def near(self, name: str, tokens: slice) -> Array:
        """Another tap of the block, float64."""
        return self._near(name, tokens)

    def entering(self, tokens: slice) -> Array:
        """The stream that enters the block, or ln_f."""
        return self._read(self._entering, tokens)

    def own(self, kind: str, *, name: str | None = None, layer: int | None = None) -> Array:
        """A weight or bias of the operation, of one called otherwise, or of another block."""
        name = name or PRODUCTS.get(self._inner, ("", self._inner))[1]
        if name in ("ln_f", "wte"):
            return self._weight(f"{BASE_PREFIX}{name}.{kind}")
        if name == "lm_head":
            tied = kind == "weight" and self._config.tie_word_embeddings
            return self._weight(f"{BASE_PREFIX}wte.weight" if tied else f"lm_head.{kind}")
        return self._weight(f"{BASE_PREFIX}h.{self.layer if layer is None else layer}.{name}.{kind}")

    def rotated(
        self, tokens: slice, *, positions: Array | None = None, order: Array | None = None,
        table: Callable[[Array, int], tuple[Array, Array]] | None = None, width: int | None = None,
    ) -> Expected:  # fmt: skip
        """x with its pairs turned.

        Args:
            tokens: which.
            positions: (b, t), of all tokens.
            order: (d,), which dimension stands where before pairs are made.
            table: the sines and cosines (b, t, width / 2) of positions.
            width: how many dimensions turn.
        """
        x = self._near(self._inner[0], tokens)
        order = np.arange(x.shape[-1]) if order is None else order
        width = self._config.rotary_width if width is None else width
        positions = self.given("position_ids") if positions is None else positions
        sin, cos = (values[:, None] for values in (table or rotary)(positions[:, tokens], width))
        x = x[..., order]
        back = np.argsort(order)
        bound = bounds.rounding_of_rotation(x, sin, cos, self._rounding)
        return Expected(rotate_pairs(x, sin, cos)[..., back], bound[..., back])

    def normed(
        self, tokens: slice, *, x: Array | None = None, mean: bool = True, spare: float = 0,
        epsilon: float | None = None, outside: bool = False, weight: Round | None = None, bias: Round | None = None,
        layer: int | None = None,
    ) -> Expected:  # fmt: skip
        """The layer norm.

        Args:
            tokens: which.
            x: in place of what enters.
            mean: whether it is taken off.
            spare: how many less the variance divides by.
            epsilon: in place of the config's.
            outside: whether epsilon is added to the root, not under it.
            weight, bias: what becomes of them.
            layer: the block whose they are.
        """
        x = self.entering(tokens) if x is None else x
        epsilon = self._config.layer_norm_epsilon if epsilon is None else epsilon
        scale, offset = (self.own(kind, layer=layer).astype(np.float64) for kind in ("weight", "bias"))
        scale, offset = scale if weight is None else weight(scale), offset if bias is None else bias(offset)
        centred = x - x.mean(-1, keepdims=True) if mean else x
        variance = (centred * centred).sum(-1, keepdims=True) / (x.shape[-1] - spare)
        root = np.sqrt(variance) + epsilon if outside else np.sqrt(variance + epsilon)
        value = centred / root * scale + offset
        bound = bounds.rounding_of_layer_norm(x, scale, offset, epsilon, self._rounding, parts=self._parts(tokens))
        return Expected(value, bound)

    def multiplied(
        self, tokens: slice, *, x: Array | None = None, weight: Array | None = None, bias: Round | None = None,
        layer: int | None = None,
    ) -> Expected:  # fmt: skip
        """The product with a weight.

        Args:
            tokens: which.
            x: in place of what enters.
            weight: in place of its own.
            bias: what becomes of it.
            layer: the block whose weights they are.
        """
        source, _, has_bias = PRODUCTS[self._inner]
        x = self._near(source, tokens) if x is None else x
        weight = self.own("weight", layer=layer) if weight is None else weight
        added = self.own("bias", layer=layer).astype(np.float64) if has_bias else None
        return self._product(x, weight, added if bias is None or added is None else bias(added))

    def scaled(self, tokens: slice, factor: float) -> Expected:
        """The operation's result times a factor."""
        right = self.expect(tokens)
        value = right.value * factor
        return Expected(value, right.bound * abs(factor) + 2 * self._rounding.unit * np.abs(value))

    def lost(self, *, ahead: int = 1, over: Callable[[Array], float] | None = None) -> Expected:
        """The loss.

        Args:
            ahead: how many positions before a label the logits are that predict it.
            over: what the sum is divided by, from the labels that are predicted (b, n); None is how many count.
        """
        right, labels = self.expect(slice(None)), self.given("labels")
        after = labels[:, ahead:]
        logits = self._read("logits", slice(0, after.shape[1]))
        counted = int((after != IGNORED_LABEL).sum())
        total = float(token_losses(logits, after).sum())
        value = total / max(1.0, counted if over is None else over(after))
        share = value / float(right.value) if right.value else 1.0
        return Expected(np.asarray(value), right.bound * max(1.0, abs(share)))

    def bound_of_sum(self, parts: list[Array]) -> Array:
        """The bound of a sum of these."""
        return bounds.rounding_of_sum(np.sum(np.abs(parts), axis=0), self._rounding)

    def softened(
        self, tokens: slice, *, added: Callable[[Array], Array | float] | None = None, axis: int = -1,
        empty: float | None = None,
    ) -> Expected:  # fmt: skip
        """The softmax.

        Args:
            tokens: which.
            added: to the scores of keys, from what is visible (b, 1, t, s); all then count. None lets no other count.
            axis: that is summed over.
            empty: the weight of each key where none is visible.
        """
        scores, off = self._scored(tokens)
        visible = np.broadcast_to(self._seen(tokens), scores.shape)
        counted = visible if added is None else np.ones_like(visible)
        masked = scores if added is None else scores + added(visible)
        below = np.where(counted, masked, np.finfo(np.float64).min)
        exponentials = np.where(counted, np.exp(below - below.max(axis, keepdims=True)), 0)
        value = exponentials / np.maximum(exponentials.sum(axis, keepdims=True), 1e-300)
        bound = bounds.rounding_of_softmax(masked, counted, value, self._rounding, off=off)
        if empty is not None:
            value = np.where(visible.any(-1, keepdims=True), value, empty)
            bound = np.where(visible.any(-1, keepdims=True), bound, self._rounding.unit * empty)
        return Expected(value, bound)


Expect = Callable[[MistakenOperation, slice], Expected]
