"""The parts of GPT-J's blocks in TensorFlow that know no attention: layers, activations and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from gptj.config import GPTJConfig
from gptj.config.rotary import rotary_table
from gptj.tf.arguments import sizes


def _gelu(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


def at_least_float32(x: tf.Tensor) -> tf.Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def dropout(x: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
    """`x`, and with a seed each element zeroed with probability `rate` and the rest scaled to the same mean.

    Differs: a function of its seed, since a block that is computed twice for its gradient must drop the same
    elements twice; a Keras layer would draw anew.
    """
    if seed is None or rate == 0:
        return x
    return tf.nn.experimental.stateless_dropout(x, rate, seed)


class Linear(keras.layers.Layer):
    """x W' + bias, with W of the schema's layout: output axis first.

    Attributes:
        apart: in a program of XLA's, keep the product apart from the additions that follow it.
        lora: the adapters beside W, None until there are some; called with x, the product, and a seed in training.
    """

    def __init__(self, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.weight: Any = None  # these are made, or not, when they are given their values
        self.bias: Any = None
        self.apart = False
        self.lora: Any = None
        self.built = True

    def call(self, x: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        """(..., in) to (..., out); `seed` is of the adapters' dropout, None where nothing is dropped."""
        *before, width = sizes(x)
        weight = tf.cast(self.weight, x.dtype)
        # Weights first, since TensorFlow multiplies few rows by a transposed matrix some ten times slower on a CPU.
        y = tf.transpose(tf.matmul(weight, tf.reshape(x, (-1, width)), transpose_b=True))
        if self.apart:
            # Differs: XLA would fuse what is added into a matrix-vector product, and compute that on one thread.
            (y,) = xla.optimization_barrier(y)
        if self.bias is not None:
            y += tf.cast(self.bias, x.dtype)
        y = tf.reshape(y, (*before, weight.shape[0]))
        return y if self.lora is None else self.lora(x, y, seed=seed)


class Embedding(keras.layers.Layer):
    """Rows of a table, looked up by token id."""

    def __init__(self, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.weight: Any = None
        self.built = True

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        """(b, t) to (b, t, m)."""
        return tf.cast(look_up(tf.convert_to_tensor(self.weight), ids), self.compute_dtype)


def look_up(table: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """The rows of `table` (v, m) that `ids` (b, t) name, with a gradient that is a whole table.

    Differs: TensorFlow's own gradient is a list of rows, in which an id that occurs twice stands twice; Keras'
    optimizers square each on its own, so AdamW would take another step than it says.
    """

    @tf.custom_gradient
    def gather(table: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def slope(upstream: tf.Tensor) -> tf.Tensor:
            rows, width = sizes(table)
            return tf.math.unsorted_segment_sum(tf.reshape(upstream, (-1, width)), tf.reshape(ids, (-1,)), rows)

        return tf.gather(table, ids), slope

    return gather(table)


class LayerNorm(keras.layers.Layer):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, in float32 at least.

    The variance takes two passes: E[x^2] - E[x]^2 loses every digit where the mean is large.
    """

    def __init__(self, epsilon: float, *, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.epsilon = epsilon
        self.weight: Any = None
        self.bias: Any = None
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The same shape and dtype."""
        wide = at_least_float32(x)
        centred = wide - tf.reduce_mean(wide, -1, keepdims=True)
        variance = tf.reduce_mean(centred * centred, -1, keepdims=True)
        normal = centred / tf.sqrt(variance + self.epsilon)
        return tf.cast(normal * tf.cast(self.weight, wide.dtype) + tf.cast(self.bias, wide.dtype), x.dtype)


class RotaryTable:
    """The sine and cosine of every position, looked up by position ids: float64 for a float64 model, else float32."""

    def __init__(self, config: GPTJConfig, dtype: str) -> None:
        sin, cos = rotary_table(config.n_positions, config.rotary_width, "float64" if dtype == "float64" else "float32")
        with tf.init_scope():
            self.sin, self.cos = tf.constant(sin), tf.constant(cos)
        self.nbytes = int(sin.nbytes + cos.nbytes)

    def __call__(self, position_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Sine and cosine of each position, (b or 1, t, pairs)."""
        return tf.gather(self.sin, position_ids), tf.gather(self.cos, position_ids)


def rotate_pairs(x: tf.Tensor, sin: tf.Tensor, cos: tf.Tensor) -> tf.Tensor:
    """`x` (b, h, t, d) with its first 2 * pairs dimensions rotated, pair by interleaved pair.

    (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x1 cos a + x0 sin a), in the table's precision.
    """
    pairs = sin.shape[-1]
    # expand_dims: a new axis by an index ends the process where x is a DTensor.
    sin, cos = tf.expand_dims(sin, 1), tf.expand_dims(cos, 1)  # b 1 t pairs
    *before, _ = sizes(x)
    x0, x1 = tf.unstack(tf.reshape(tf.cast(x[..., : 2 * pairs], sin.dtype), (*before, pairs, 2)), axis=-1)
    rotated = tf.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), axis=-1)
    return tf.concat((tf.cast(tf.reshape(rotated, (*before, 2 * pairs)), x.dtype), x[..., 2 * pairs :]), axis=-1)
