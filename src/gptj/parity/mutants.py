"""Known mistakes of GPT-J ports, each as an operation on recorded inputs: what a tap would be, had it been made.

One list for two uses. `gptj.parity.signatures` asks of a wrong tap which mistake explains it; `gptj.parity.sensitivity`
plants each into a right one and asks whether it would have been seen. A mistake stands at the operation where it is
born: the serial residual is one of fc_in's input, and a swapped weight one of the product that read it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import ACTIVATIONS
from gptj.config.dtypes import numpy_dtype
from gptj.config.rotary import ROTARY_BASE
from gptj.parity.mistaken import Expect, MistakenOperation, Round, rotary
from gptj.parity.operations import Expected, Missing
from gptj.parity.oracle import activation

__all__ = ["MISTAKES", "Mistake", "mistakes_at"]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        name: as a report says it.
        taps: the inner names at which it is born, the first of them the first to show it.
        expect: the tap, had it been made, and its bound; `Missing` where it cannot be made there.
    """

    name: str
    taps: tuple[str, ...]
    expect: Expect


def mistakes_at(inner: str) -> tuple[Mistake, ...]:
    """The mistakes that are born at a tap of this inner name."""
    return tuple(mistake for mistake in MISTAKES if inner in mistake.taps)


# ---- rotation

_TURNED = ("q_rotated", "k_rotated")


def _rounds_to(dtype: str) -> Round:
    return lambda x: x.astype(numpy_dtype(dtype)).astype(np.float64)


def _made_in(dtype: str) -> Expect:
    """The table of a PyTorch module that is made under a default dtype of 16 bits: frequencies, and the result."""
    to = _rounds_to(dtype)

    def table(positions: Array, width: int) -> tuple[Array, Array]:
        with np.errstate(over="ignore", divide="ignore"):
            powers = to(to(np.asarray(ROTARY_BASE)) ** to(np.arange(0, width, 2) / width))
            frequency = to(1 / powers)
        angle = (np.asarray(positions, np.float32)[..., None] * frequency.astype(np.float32)).astype(np.float64)
        return to(np.sin(angle)), to(np.cos(angle))

    return lambda op, tokens: op.rotated(tokens, table=table)


def _rotary_mistake(name: str, **changes: Any) -> Mistake:
    """A mistake of the table."""
    return Mistake(name, _TURNED, lambda op, tokens: op.rotated(tokens, table=functools.partial(rotary, **changes)))


def _half_split(op: MistakenOperation, tokens: slice) -> Expected:
    width, d = op.config.rotary_width, op.config.head_dim
    pairs = np.arange(width).reshape(2, width // 2).T.reshape(-1)
    return op.rotated(tokens, order=np.concatenate([pairs, np.arange(width, d)]))


def _no_rotation(positions: Array, width: int) -> tuple[Array, Array]:
    return np.zeros((*positions.shape, width // 2)), np.ones((*positions.shape, width // 2))


def _whole_head(op: MistakenOperation, tokens: slice) -> Expected:
    return op.rotated(tokens, width=op.config.head_dim // 2 * 2)


def _exponent_of_head(op: MistakenOperation, tokens: slice) -> Expected:
    return op.rotated(tokens, table=functools.partial(rotary, denominator=op.config.head_dim))


def _positions(change: Callable[[Array], Array]) -> Expect:
    return lambda op, tokens: op.rotated(tokens, positions=change(op.given("position_ids")))


def _late(positions: Array) -> Array:
    """The tokens of the later half: those that are stepped after a prefill."""
    late: Array = np.arange(positions.shape[1]) >= (positions.shape[1] + 1) // 2
    return late


def _from_zero(positions: Array) -> Array:
    return np.broadcast_to(np.arange(positions.shape[1]), positions.shape)


def _padding_counted(op: MistakenOperation, tokens: slice) -> Expected:
    """Slots in place of positions: on the left, padding is counted."""
    mask, given = op.given("attention_mask"), op.given("position_ids")
    if mask.shape[1] != given.shape[1]:
        raise Missing("the positions of the cache")
    first = np.take_along_axis(np.broadcast_to(given, mask.shape), mask.argmax(1)[:, None], 1)
    return op.rotated(tokens, positions=first + np.arange(given.shape[1]))


def _restarted(positions: Array) -> Array:
    restarted: Array = positions - ((positions.shape[1] + 1) // 2) * _late(positions)
    return restarted


_ROTATIONS = (
    _rotary_mistake("rotary sign", sign=-1),  # transformers issue 16288: Flax, and TensorFlow with it
    Mistake("rotary half split", _TURNED, _half_split),  # the GPT-NeoX and Llama layout
    _rotary_mistake("rotary base 1,000", base=1e3),
    _rotary_mistake("rotary base 500,000", base=5e5),
    _rotary_mistake("rotary base 1,000,000", base=1e6),
    Mistake("rotary exponent of head", _TURNED, _exponent_of_head),
    *(_rotary_mistake(f"rotary table {dtype}", table=_rounds_to(dtype)) for dtype in ("bfloat16", "float16")),
    *(
        _rotary_mistake(f"rotary positions {dtype}", places=_rounds_to(dtype)) for dtype in ("bfloat16", "float16")
    ),
    # Frequencies and angles in float32 are off by 2^-24 of an angle that grows with the position.
    _rotary_mistake("rotary angles in float32, as by transformers in Flax", angles=_rounds_to("float32")),
    Mistake("rotary angles and frequencies in float32, as by transformers", _TURNED, _made_in("float32")),
    *(
        Mistake(f"rotary table made in {dtype}, as by transformers 4.28 to 4.57", _TURNED, _made_in(dtype))
        for dtype in ("bfloat16", "float16")
    ),
    Mistake("rotary last dimensions", _TURNED,
            lambda op, tokens: op.rotated(tokens, order=np.arange(op.config.head_dim)[::-1])),
    Mistake("rotary none", _TURNED, lambda op, tokens: op.rotated(tokens, table=_no_rotation)),
    Mistake("rotary of the whole head", _TURNED, _whole_head),
    Mistake("position off by one", _TURNED, _positions(lambda positions: positions + 1)),
    Mistake("position ids not used", _TURNED, _positions(_from_zero)),
    Mistake("padding counted in the positions", _TURNED, _padding_counted),
    Mistake("step position off by one", _TURNED, _positions(lambda positions: positions + _late(positions))),
    Mistake("step position restarts", _TURNED, _positions(_restarted)),
)  # fmt: skip

# ---- attention


def _factor(of: Callable[[Any], float]) -> Expect:
    return lambda op, tokens: op.scaled(tokens, of(op.config))


def _seen(change: Callable[[Array, Array | None], Array]) -> Expect:
    """Visible keys, from the causal triangle (1, 1, t, s) and the mask (b, s)."""

    def expect(op: MistakenOperation, tokens: slice) -> Expected:
        t, s = op.length, op.keys
        try:
            mask = op.given("attention_mask").astype(bool)
        except Missing:
            mask = None
        value = change(np.tril(np.ones((t, s), bool), s - t)[None, None], mask)
        value = np.broadcast_to(value, (len(value), 1, t, s))[:, :, tokens]
        return Expected(value, np.zeros(value.shape))

    return expect


def _moved(causal: Array, by: int) -> Array:
    """The triangle with as many more keys for each query."""
    t, s = causal.shape[-2:]
    return np.tril(np.ones_like(causal), s - t + by)


def _of_queries(causal: Array, mask: Array | None) -> Array:
    return causal if mask is None else causal & mask[:, None, mask.shape[1] - causal.shape[-2] :, None]


def _with_keys(seen: Array, mask: Array | None) -> Array:
    return seen if mask is None else seen & mask[:, None, None, :]


def _evenly(op: MistakenOperation, tokens: slice) -> Expected:
    return op.softened(tokens, empty=1 / op.keys)


def _tensorflow(op: MistakenOperation, tokens: slice) -> Expected:
    """The future at -1e9, padding at -1e4 more: a query that sees padding alone attends to that."""
    mask = op.given("attention_mask").astype(bool)
    causal = np.tril(np.ones((op.length, op.length), bool))[tokens]
    return op.softened(
        tokens, added=lambda visible: np.where(causal, 0.0, -1e9) + np.where(mask[:, None, None, :], 0.0, -1e4)
    )


def _over_queries(op: MistakenOperation, tokens: slice) -> Expected:
    found = op.softened(slice(None), axis=-2)
    return Expected(found.value[:, :, tokens], found.bound[:, :, tokens])


def _interleaved_heads(op: MistakenOperation, tokens: slice) -> Expected:
    """Heads as the inner axis of a projection's result."""
    right = op.multiplied(tokens)

    def shuffle(x: Array) -> Array:
        b, h, t, d = x.shape
        return np.swapaxes(x, 1, 2).reshape(b, t, d, h).transpose(0, 3, 1, 2)

    return Expected(shuffle(right.value), shuffle(right.bound))


def _unmerged(op: MistakenOperation, tokens: slice) -> Expected:
    """Heads as the inner axis where they are laid side by side."""
    right, config = op.expect(tokens), op.config

    def shuffle(x: Array) -> Array:
        b, t, _ = x.shape
        return np.swapaxes(x.reshape(b, t, config.n_head, config.head_dim), -1, -2).reshape(x.shape)

    return Expected(shuffle(right.value), shuffle(right.bound))


_ATTENTION = (
    Mistake("no scale", ("scores",), _factor(lambda config: math.sqrt(config.head_dim))),
    Mistake("scale of model width", ("scores",), _factor(lambda config: config.n_head**-0.5)),
    Mistake("scale applied twice", ("scores",), _factor(lambda config: config.head_dim**-0.5)),
    Mistake("mask shows the next token", ("visible",),
            _seen(lambda causal, mask: _with_keys(_moved(causal, 1), mask))),
    Mistake("mask hides the token itself", ("visible",),
            _seen(lambda causal, mask: _with_keys(_moved(causal, -1), mask))),
    Mistake("mask shows the future", ("visible",),
            _seen(lambda causal, mask: _with_keys(np.ones_like(causal), mask))),
    Mistake("mask shows padding", ("visible",), _seen(lambda causal, mask: causal)),
    Mistake("mask of queries", ("visible",), _seen(_of_queries)),
    Mistake("mask inverted", ("visible",),
            _seen(lambda causal, mask: causal if mask is None else causal & ~mask[:, None, None, :])),
    Mistake("mask too weak", ("weights",),
            lambda op, tokens: op.softened(tokens, added=lambda visible: np.where(visible, 0.0, -10.0))),
    Mistake("additive -1e4 padding", ("weights",), _tensorflow),  # transformers in TensorFlow
    Mistake("masked row attends evenly", ("weights",), _evenly),
    Mistake("softmax over queries", ("weights",), _over_queries),
    Mistake("no mask in the softmax", ("weights",), lambda op, tokens: op.softened(tokens, added=lambda visible: 0.0)),
    Mistake("heads interleaved", ("q", "k", "v"), _interleaved_heads),
    Mistake("heads merged interleaved", ("mixed",), _unmerged),
)  # fmt: skip

# ---- the stream


def _serial(op: MistakenOperation, tokens: slice) -> Expected:
    """The feed-forward after the attention, not beside it: it reads the layer norm of their sum."""
    stream = op.entering(tokens) + op.near("out_proj", tokens)
    if op.inner == "ln_1":
        return op.normed(tokens, x=stream)
    centred = stream - stream.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + op.config.layer_norm_epsilon)
    scale, offset = (op.own(kind, name="ln_1").astype(np.float64) for kind in ("weight", "bias"))
    found = op.multiplied(tokens, x=normal * scale + offset)
    return Expected(found.value, found.bound * 4)  # the layer norm's own rounding goes in


def _parts(*names: str) -> Expect:
    """The sum of some of its parts."""

    def expect(op: MistakenOperation, tokens: slice) -> Expected:
        parts = [op.entering(tokens) if name == "entering" else op.near(name, tokens) for name in names]
        return Expected(np.sum(parts, axis=0), np.maximum(op.bound_of_sum(parts), op.expect(tokens).bound))

    return expect


def _activated(name: str) -> Expect:
    def expect(op: MistakenOperation, tokens: slice) -> Expected:
        x, right = op.near("fc_in", tokens), op.expect(tokens)
        if name == "quick gelu":
            return Expected(activation("silu", 1.702 * x) / 1.702, right.bound)
        return Expected(x if name == "linear" else activation(name, x), right.bound)

    return expect


def _epsilon(epsilon: float) -> Mistake:
    return Mistake(f"epsilon {epsilon:g}", _NORMS, lambda op, tokens: op.normed(tokens, epsilon=epsilon))


_NORMS = ("ln_1", "ln_f")
_SAME = ("swish", "gelu_pytorch_tanh", "gelu_fast")
"""Other names of silu and gelu_new, the last within 1e-10."""

_STREAM = (
    Mistake("embedding scaled", ("embedding",), _factor(lambda config: config.n_embd**0.5)),
    Mistake("serial residual", ("fc_in", "ln_1"), _serial),
    Mistake("MLP reads the stream", ("fc_in",), lambda op, tokens: op.multiplied(tokens, x=op.entering(tokens))),
    Mistake("no residual", ("sum",), _parts("out_proj", "fc_out")),
    Mistake("residual of ln_1", ("sum",), _parts("out_proj", "fc_out", "ln_1")),
    Mistake("residual added twice", ("sum",), _parts("out_proj", "fc_out", "entering", "entering")),
    Mistake("attention left out of the sum", ("sum",), _parts("fc_out", "entering")),
    Mistake("feed-forward left out of the sum", ("sum",), _parts("out_proj", "entering")),
    Mistake("no norm", _NORMS, lambda op, tokens: Expected(op.entering(tokens), op.expect(tokens).bound)),
    Mistake("norm without mean", _NORMS, lambda op, tokens: op.normed(tokens, mean=False)),
    Mistake("epsilon outside the root", _NORMS, lambda op, tokens: op.normed(tokens, outside=True)),
    Mistake("norm unbiased variance", _NORMS, lambda op, tokens: op.normed(tokens, spare=1)),
    *map(_epsilon, (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)),
    *(
        Mistake("exact GELU" if name == "gelu" else f"activation {name}", ("activation",), _activated(name))
        for name in (*(known for known in ACTIVATIONS if known not in _SAME), "quick gelu", "linear")
    ),
)

# ---- the loss


def _lost(ahead: int = 1, over: Callable[[Array], float] | None = None) -> Expect:
    return lambda op, tokens: op.lost(ahead=ahead, over=over)


_LOSS = (
    Mistake("labels not shifted", ("loss",), _lost(0)),
    Mistake("labels shifted twice", ("loss",), _lost(2)),
    Mistake("ignored labels counted in the mean", ("loss",), _lost(over=lambda labels: float(labels.size))),
    Mistake("sum in place of the mean", ("loss",), _lost(over=lambda labels: 1.0)),
    Mistake("mean of the rows alone", ("loss",), _lost(over=lambda labels: float(len(labels)))),
)

# ---- weights


def _bias(name: str, taps: tuple[str, ...], change: Round) -> Mistake:
    def expect(op: MistakenOperation, tokens: slice) -> Expected:
        return op.normed(tokens, bias=change) if op.inner in _NORMS else op.multiplied(tokens, bias=change)

    return Mistake(name, taps, expect)


def _transposed(op: MistakenOperation, tokens: slice) -> Expected:
    return op.multiplied(tokens, weight=op.own("weight").T)


def _swapped(one: str, other: str) -> Mistake:
    def expect(op: MistakenOperation, tokens: slice) -> Expected:
        return op.multiplied(tokens, weight=op.own("weight", name=f"attn.{other if op.inner == one else one}_proj"))

    return Mistake(f"{one} and {other} swapped", (one, other), expect)


def _lexicographic(op: MistakenOperation, tokens: slice) -> Expected:
    """Layer n of the file is the n-th of "0", "1", "10", "11", "2": a sorted tree read as if in order."""
    layer = int(sorted(map(str, range(op.config.n_layer)))[op.layer])
    return op.normed(tokens, layer=layer) if op.inner == "ln_1" else op.multiplied(tokens, layer=layer)


def _of_the_next_layer(op: MistakenOperation, tokens: slice) -> Expected:
    layer = (op.layer + 1) % op.config.n_layer
    return op.normed(tokens, layer=layer) if op.inner == "ln_1" else op.multiplied(tokens, layer=layer)


def _tied(op: MistakenOperation, tokens: slice) -> Expected:
    return op.multiplied(tokens, weight=op.own("weight", name="wte"))


_IN_BLOCK = ("ln_1", "q", "k", "v", "out_proj", "fc_in", "fc_out")

_WEIGHTS = (
    _bias("bias dropped", ("fc_in", "fc_out", "logits"), np.zeros_like),
    _bias("offset dropped", _NORMS, np.zeros_like),
    Mistake("scale left at 1", _NORMS, lambda op, tokens: op.normed(tokens, weight=np.ones_like)),
    Mistake("transposed", ("q", "k", "v", "out_proj"), _transposed),
    _swapped("k", "v"),
    _swapped("q", "k"),
    _swapped("q", "v"),
    Mistake("layers in lexicographic order", _IN_BLOCK, _lexicographic),
    Mistake("weights of the next block", _IN_BLOCK, _of_the_next_layer),
    # Two shards: the original stores fc_out's bias as summands, and trains only shard 0's layer norms.
    _bias("bias from one shard of two", ("fc_out",), lambda bias: bias / 2),
    _bias("bias added once a shard", ("fc_out",), lambda bias: bias * 2),
    Mistake("scale as the mean of two shards", _NORMS,
            lambda op, tokens: op.normed(tokens, weight=lambda weight: (weight + 1) / 2)),
    _bias("offset as the mean of two shards", _NORMS, lambda bias: bias / 2),
    Mistake("scale as the sum of two shards", _NORMS,
            lambda op, tokens: op.normed(tokens, weight=lambda weight: weight + 1)),
    Mistake("lm_head tied", ("logits",), _tied),
)  # fmt: skip

MISTAKES: tuple[Mistake, ...] = (*_ROTATIONS, *_ATTENTION, *_STREAM, *_WEIGHTS, *_LOSS)
