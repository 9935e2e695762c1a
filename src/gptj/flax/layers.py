"""The parts of GPT-J's blocks in Flax that know no attention: layers, activations and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from gptj.config import GPTJConfig
from gptj.config.rotary import rotary_table
from gptj.flax.adapters import LowRank

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def multiply(x: Array, y: Array, axes: tuple[int, int], batch: tuple[int, ...] = ()) -> Array:
    """The sum of products over one axis of each, in float32 at least; `batch` axes, the same in both, stay.

    Differs: without a word to the contrary, jax multiplies float32 in bfloat16 on TPUs and in TF32 on GPUs.
    """
    exact = lax.Precision.HIGHEST if x.dtype in (jnp.float32, jnp.float64) else None
    contracted = ((axes[0],), (axes[1],)), (batch, batch)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, y, contracted, precision=exact, preferred_element_type=wide)


# Differs: flax.linen's own Dense, Embed and LayerNorm have other parameter names, the input axis first, and a
# variance in one pass that loses all digits where the mean is large; these three are PyTorch's, as small as can be.


class Linear(nn.Module):
    """x W' + b, with the output axis of W (o, i) first; summed in float32 at least and rounded once.

    Args:
        inputs, outputs: i and o.
        use_bias: whether there is a b.
        tied: W is another module's, given with each call, and no parameter of this one.
        deviation, param_dtype: of the start values that flax's `init` makes.
        parts: of the sum over i, where devices share it: the result (parts, ..., o) is not summed yet.
    """

    inputs: int
    outputs: int
    use_bias: bool = True
    tied: bool = False
    deviation: float = 0.02
    param_dtype: Any = jnp.float32
    parts: int = 1

    @nn.compact
    def __call__(self, x: Array, weight: Any = None, *, train: bool = False) -> Array:
        """(..., i) -> (..., o), in x's dtype, with what an adapter adds; `train` is of its dropout."""
        if not self.tied:
            start = nn.initializers.normal(self.deviation)
            weight = self.param("weight", start, (self.outputs, self.inputs), self.param_dtype)
        if self.parts > 1:
            return LowRank(self)(x, self._in_parts(x, weight), train)
        y = multiply(x, weight.astype(x.dtype), (x.ndim - 1, 1))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.outputs,), self.param_dtype).astype(y.dtype)
        return LowRank(self)(x, y.astype(x.dtype), train)

    def _in_parts(self, x: Array, weight: Array) -> Array:
        """(..., i) -> (parts, ..., o), each part where its columns of W are; the bias is the first one's."""
        width = self.inputs // self.parts
        columns = weight.astype(x.dtype).reshape(self.outputs, self.parts, width).swapaxes(0, 1)
        cut = x.reshape(-1, self.parts, width).swapaxes(0, 1)
        y = multiply(cut, columns, (2, 2), (0,)).reshape(self.parts, *x.shape[:-1], self.outputs)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.outputs,), self.param_dtype).astype(y.dtype)
            y += bias * (jnp.arange(self.parts) == 0).astype(y.dtype).reshape(-1, *(1,) * x.ndim)
        return y.astype(x.dtype)


class Embedding(nn.Module):
    """A row of the weight (v, m) for each token id; NaN for an id that it has no row for."""

    rows: int
    width: int
    deviation: float = 0.02
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the weight."""
        start = nn.initializers.normal(self.deviation)
        self.weight = self.param("weight", start, (self.rows, self.width), self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """(b, t) -> (b, t, m), in the dtype that the model computes in."""
        return look_up(self.weight, ids).astype(self.computation_dtype)

    @property
    def computation_dtype(self) -> Any:
        """The dtype given, or the weight's."""
        return self.weight.dtype if self.dtype is None else self.dtype


def look_up(table: Array, rows: Array) -> Array:
    """table[rows], and NaN for a row that there is none of."""
    return table.at[rows].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, in float32 at least and rounded once."""

    width: int
    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(b, t, m) -> (b, t, m)."""
        weight = self.param("weight", nn.initializers.ones, (self.width,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.param_dtype)
        y = at_least_float32(x)
        centred = y - y.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)  # in two passes: the mean first
        y = centred / jnp.sqrt(variance + self.epsilon)
        return (y * weight.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)


class RotaryTable:
    """The sine and cosine of every position, looked up by position ids: a constant, never a parameter."""

    def __init__(self, config: GPTJConfig, dtype: Any) -> None:
        precision = "float64" if dtype == jnp.float64 else "float32"
        sin, cos = rotary_table(config.n_positions, config.rotary_width, precision)
        self.sin, self.cos = jnp.asarray(sin), jnp.asarray(cos)

    def __call__(self, position_ids: Array) -> tuple[Array, Array]:
        """Sine and cosine of each position, (b, t, pairs)."""
        return look_up(self.sin, position_ids), look_up(self.cos, position_ids)


def rotate_pairs(x: Array, sin: Array, cos: Array) -> Array:
    """`x` (b, h, t, d) with its first 2 * pairs dimensions rotated, pair by interleaved pair.

    (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x1 cos a + x0 sin a), in the table's precision.
    """
    width = 2 * sin.shape[-1]
    sin, cos = sin[:, None], cos[:, None]  # b 1 t pairs
    pairs = x[..., :width].astype(sin.dtype)
    x0, x1 = pairs[..., 0::2], pairs[..., 1::2]
    rotated = jnp.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), axis=-1).reshape(pairs.shape)
    return jnp.concatenate((rotated.astype(x.dtype), x[..., width:]), axis=-1)
