"""The classic mistakes of GPT-J ports, each planted into the oracle, so that the catcher can be seen to catch.

A parity test that passes says little until it is known what it would have refused. Each mutant here is one
mistake that ports really make; several were shipped. `tests/core/test_oracle_mutants.py` proves
that on the revealing checkpoint every one moves the logits of `revealing_batch` by more than `VISIBLE`, twenty
times the tolerance that float32 backends are held to; and that what must change nothing changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj import GPTJConfig
from gptj.parity.oracle import Oracle, activation, positions_of_mask
from gptj.parity.revealing import revealing_config, revealing_weights

Array = NDArray[Any]
Weights = dict[str, Array]

VISIBLE = 4e-4
"""How far a mistake must move some logit: 20 times the float32 tolerance of 2e-5, 230 times float32's own rounding."""

FAR = 1_900
"""Where the batch's positions begin: bfloat16 holds whole numbers exactly only to 256, float16 to 2,048."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of a call in which every mistake has room to show: rows whole, padded left, right and within."""

    input_ids: Array
    attention_mask: Array
    position_ids: Array


def revealing_batch(config: GPTJConfig, *, first_position: int = FAR) -> Batch:
    """Five rows of 24 tokens: whole, 5 padded left, 7 padded right, a hole within, and one token alone."""
    rows, length = 5, 24
    ids = np.random.Generator(np.random.Philox(7)).integers(0, config.vocab_size - 2, (rows, length))
    mask = np.ones((rows, length), np.int64)
    mask[1, :5] = 0
    mask[2, -7:] = 0
    mask[3, 8:11] = 0
    mask[4, :-1] = 0
    return Batch(ids, mask, first_position + positions_of_mask(mask))


def logits_of(oracle: Oracle, batch: Batch) -> Array:
    logits = oracle.forward(batch.input_ids, batch.attention_mask, batch.position_ids).logits
    assert logits is not None
    return logits


# ---- mistakes in the computation


class RotarySign(Oracle):
    def rotary(self, positions: Array) -> tuple[Array, Array]:
        sin, cos = super().rotary(positions)
        return -sin, cos


class RotaryHalfSplit(Oracle):
    def rotate(self, x: Array, positions: Array) -> Array:
        width = self.config.rotary_width
        half = width // 2
        sin, cos = self.rotary(positions)
        first, second = x[..., :half], x[..., half:width]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., width:]], -1)


class RotaryWithTable(Oracle):
    """Its own table: another base, another exponent, another rounding."""

    base = 10_000.0
    denominator: int | None = None
    round_positions = round_table = staticmethod(lambda x: x)

    def rotary(self, positions: Array) -> tuple[Array, Array]:
        width = self.config.rotary_width
        frequency = self.base ** (-np.arange(0, width, 2) / (self.denominator or width))
        angle = self.round_positions(np.asarray(positions, float))[..., None] * frequency
        sin, cos = (self.round_table(f(angle)).astype(self.dtype)[:, None] for f in (np.sin, np.cos))
        return sin, cos


class RotaryBase(RotaryWithTable):
    base = 1_000.0


class RotaryExponentOfHead(RotaryWithTable):
    denominator = 12  # the revealing head_dim, where 8 rotate


class RotaryTableBfloat16(RotaryWithTable):
    round_table = staticmethod(lambda x: x.astype(ml_dtypes.bfloat16))


class RotaryTableFloat16(RotaryWithTable):
    round_table = staticmethod(lambda x: x.astype(np.float16))


class RotaryPositionsBfloat16(RotaryWithTable):
    round_positions = staticmethod(lambda x: x.astype(ml_dtypes.bfloat16).astype(float))


class RotaryLastDimensions(Oracle):
    def rotate(self, x: Array, positions: Array) -> Array:
        return super().rotate(x[..., ::-1], positions)[..., ::-1]


class RotaryOnlyQueries(Oracle):
    def attention(self, name: str, h: Array, visible: Array, positions: Array, factors: Array | None) -> Any:
        self.turn = 0
        return super().attention(name, h, visible, positions, factors)

    def rotate(self, x: Array, positions: Array) -> Array:
        self.turn += 1
        return super().rotate(x, positions) if self.turn == 1 else x


class RotaryNone(Oracle):
    def rotate(self, x: Array, positions: Array) -> Array:
        return x


class StepPositionOffByOne(Oracle):
    """The tokens after a prefill of 16 are stepped with position = past + 1."""

    def rotary(self, positions: Array) -> tuple[Array, Array]:
        return super().rotary(positions + (np.arange(positions.shape[1]) >= 16))


class StepPositionRestarts(Oracle):
    """The tokens after a prefill of 16 begin at the first position again, the past forgotten."""

    def rotary(self, positions: Array) -> tuple[Array, Array]:
        return super().rotary(positions - 16 * (np.arange(positions.shape[1]) >= 16))


class NoScale(Oracle):
    def scores(self, q: Array, k: Array) -> Array:
        return super().scores(q, k) * self.config.head_dim**0.5


class ScaleOfModelWidth(Oracle):
    def scores(self, q: Array, k: Array) -> Array:
        return super().scores(q, k) / self.config.n_head**0.5


class SerialResidual(Oracle):
    def block(self, layer: int, x: Array, visible: Array, positions: Array, factors: Array | None) -> Any:
        name = f"transformer.h.{layer}."
        h = self.layer_norm(f"{name}ln_1", x)
        attended, weights = self.attention(f"{name}attn.", h, visible, positions, factors)
        x = x + attended
        return x + self.mlp(f"{name}mlp.", self.layer_norm(f"{name}ln_1", x)), weights


class MlpReadsTheStream(Oracle):
    def block(self, layer: int, x: Array, visible: Array, positions: Array, factors: Array | None) -> Any:
        name = f"transformer.h.{layer}."
        h = self.layer_norm(f"{name}ln_1", x)
        attended, weights = self.attention(f"{name}attn.", h, visible, positions, factors)
        return attended + self.mlp(f"{name}mlp.", x) + x, weights


class NoResidual(Oracle):
    def block(self, layer: int, x: Array, visible: Array, positions: Array, factors: Array | None) -> Any:
        y, weights = super().block(layer, x, visible, positions, factors)
        return y - x, weights


class NoFinalNorm(Oracle):
    def layer_norm(self, name: str, x: Array) -> Array:
        return x if name.endswith("ln_f") else super().layer_norm(name, x)


class NormWithoutMean(Oracle):
    def layer_norm(self, name: str, x: Array) -> Array:
        normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        return normal * self.read(f"{name}.weight") + self.read(f"{name}.bias")


class NormUnbiasedVariance(Oracle):
    def layer_norm(self, name: str, x: Array) -> Array:
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True, ddof=1) + self.config.layer_norm_epsilon
        )
        return normal * self.read(f"{name}.weight") + self.read(f"{name}.bias")


class MaskShowsTheNextToken(Oracle):
    def visible_keys(self, t: int, mask: Array | None) -> Array:
        seen = np.tril(np.ones((t, t), bool), 1)[None, None]
        return seen if mask is None else seen & mask[:, None, None, :]


class MaskHidesTheTokenItself(Oracle):
    def visible_keys(self, t: int, mask: Array | None) -> Array:
        return super().visible_keys(t, mask) & np.tril(np.ones((t, t), bool), -1)


class MaskShowsTheFuture(Oracle):
    def visible_keys(self, t: int, mask: Array | None) -> Array:
        return np.broadcast_to(super().visible_keys(t, mask)[:, :, -1:, :], (1 if mask is None else len(mask), 1, t, t))


class MaskShowsPadding(Oracle):
    def visible_keys(self, t: int, mask: Array | None) -> Array:
        return super().visible_keys(t, None)


class MaskOfQueries(Oracle):
    """The padding mask laid along the queries in place of the keys."""

    def visible_keys(self, t: int, mask: Array | None) -> Array:
        causal = super().visible_keys(t, None)
        return causal if mask is None else causal & mask[:, None, :, None]


class MaskTooWeak(Oracle):
    """-10 in place of the dtype's least number: hidden tokens leak a little."""

    def attention_weights(self, scores: Array, visible: Array) -> Array:
        return super().attention_weights(np.where(visible, scores, scores - 10.0), np.ones_like(visible))


class MaskedRowAttendsEvenly(Oracle):
    """A query that sees no key attends evenly to every slot, as a bare softmax does."""

    def attention_weights(self, scores: Array, visible: Array) -> Array:
        weights = super().attention_weights(scores, visible)
        return np.where(visible.any(-1, keepdims=True), weights, 1 / scores.shape[-1])


class SoftmaxOverQueries(Oracle):
    def attention_weights(self, scores: Array, visible: Array) -> Array:
        exponentials = np.where(visible, np.exp(scores - scores.max()), 0)
        return exponentials / np.maximum(exponentials.sum(-2, keepdims=True), 1e-30)


class HeadsInterleaved(Oracle):
    def split_heads(self, x: Array) -> Array:
        b, t, _ = x.shape
        return x.reshape(b, t, self.config.head_dim, self.config.n_head).transpose(0, 3, 1, 2)


class EmbeddingScaled(Oracle):
    def embed(self, ids: Any) -> Array:
        return super().embed(ids) * self.config.n_embd**0.5


class QuickGelu(Oracle):
    def mlp(self, name: str, h: Array) -> Array:
        inner = self.linear(f"{name}fc_in", h, bias=True)
        return self.linear(f"{name}fc_out", activation("silu", 1.702 * inner) / 1.702, bias=True)


# ---- mistakes in the weights


def _each(weights: Weights, ending: str, change: Callable[[Array], Array]) -> Weights:
    changed = {name: change(value) if name.endswith(ending) else value for name, value in weights.items()}
    assert any(name.endswith(ending) for name in weights), ending
    return changed


def _swapped(weights: Weights, one: str, other: str) -> Weights:
    def partner(name: str) -> str:
        return name.replace(one, other) if one in name else name.replace(other, one)

    return {name: weights[partner(name)] for name in weights}


def _lexicographic(weights: Weights) -> Weights:
    """Layer n of the file is the n-th of "0", "1", "10", "11", "2": a sorted tree read as if in order."""
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    order = sorted(layers)
    changed = dict(weights)
    for name in weights:
        if name.startswith("transformer.h."):
            parts = name.split(".")
            changed[name] = weights[".".join([*parts[:2], order[int(parts[2])], *parts[3:]])]
    return changed


# ---- the list


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what the test is called.
        plant: makes the mistaken oracle from a config and the right weights.
        n_layer: how many layers it takes to show.
    """

    name: str
    plant: Callable[[GPTJConfig, Weights], Oracle]
    n_layer: int = 3

    def difference(self) -> float:
        """The largest absolute difference that the mistake makes to the logits of the revealing batch."""
        config = revealing_config(n_layer=self.n_layer)
        weights: Weights = dict(revealing_weights(config))
        batch = revealing_batch(config)
        right, wrong = (logits_of(oracle, batch) for oracle in (Oracle(config, weights), self.plant(config, weights)))
        return float(np.abs(wrong - right).max())


def _computes(mutant: type[Oracle]) -> Mutant:
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in mutant.__name__).strip()
    return Mutant(words, mutant)


def _reads(name: str, change: Callable[[Weights], Weights], *, n_layer: int = 3) -> Mutant:
    return Mutant(name, lambda config, weights: Oracle(config, change(weights)), n_layer)


def _configures(name: str, **changes: Any) -> Mutant:
    return Mutant(name, lambda config, weights: Oracle(config.replace(**changes), weights))


def _dropped(ending: str) -> Mutant:
    return _reads(f"{ending} dropped", lambda weights: _each(weights, ending, np.zeros_like))


def _transposed(ending: str) -> Mutant:
    return _reads(f"{ending} transposed", lambda weights: _each(weights, ending, np.transpose))


MUTANTS: tuple[Mutant, ...] = (
    *map(
        _computes,
        (
            RotarySign,  # transformers issue 16288: Flax, and TensorFlow with it
            RotaryHalfSplit,  # the GPT-NeoX and Llama layout
            RotaryBase,
            RotaryExponentOfHead,
            RotaryTableBfloat16,  # transformers 4.28 to 4.57 in a bfloat16 model
            RotaryTableFloat16,
            RotaryPositionsBfloat16,
            RotaryLastDimensions,
            RotaryOnlyQueries,
            RotaryNone,
            StepPositionOffByOne,
            StepPositionRestarts,
            NoScale,
            ScaleOfModelWidth,
            SerialResidual,
            MlpReadsTheStream,
            NoResidual,
            NoFinalNorm,
            NormWithoutMean,
            NormUnbiasedVariance,
            MaskShowsTheNextToken,
            MaskHidesTheTokenItself,
            MaskShowsTheFuture,
            MaskShowsPadding,
            MaskOfQueries,
            MaskTooWeak,
            MaskedRowAttendsEvenly,
            SoftmaxOverQueries,
            HeadsInterleaved,
            EmbeddingScaled,
            QuickGelu,
        ),
    ),
    _configures("rotary of the whole head", rotary_dim=None),
    _configures("epsilon 1e-6", layer_norm_epsilon=1e-6),
    _configures("epsilon 1e-12", layer_norm_epsilon=1e-12),
    _configures("exact GELU", activation_function="gelu"),
    _configures("heads of another width", n_head=6),
    _configures("a layer too few", n_layer=2),
    *(_dropped(f".{ending}") for ending in ("ln_1.bias", "fc_in.bias", "fc_out.bias", "ln_f.bias")),
    _dropped("lm_head.bias"),
    *(
        _reads(f".{norm}.weight left at 1", lambda weights, norm=norm: _each(weights, f".{norm}.weight", np.ones_like))
        for norm in ("ln_1", "ln_f")
    ),
    *(_transposed(f".{name}_proj.weight") for name in ("q", "k", "v", "out")),
    _reads("k and v swapped", lambda weights: _swapped(weights, "k_proj", "v_proj")),
    _reads("q and k swapped", lambda weights: _swapped(weights, "q_proj", "k_proj")),
    _reads("layers in lexicographic order", _lexicographic, n_layer=12),
    # Two shards: the original stores fc_out's bias as summands, and trains only shard 0's layer norms.
    _reads("fc_out bias from one shard of two", lambda weights: _each(weights, "fc_out.bias", lambda b: b / 2)),
    _reads("fc_out bias added once a shard", lambda weights: _each(weights, "fc_out.bias", lambda b: b * 2)),
    _reads(
        "ln_1 scale as the mean of two shards", lambda weights: _each(weights, "ln_1.weight", lambda w: (w + 1) / 2)
    ),
    _reads("ln_1 offset as the mean of two shards", lambda weights: _each(weights, "ln_1.bias", lambda b: b / 2)),
    _reads("ln_f scale as the sum of two shards", lambda weights: _each(weights, "ln_f.weight", lambda w: w + 1)),
    _reads("lm_head tied", lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"]}),
)
