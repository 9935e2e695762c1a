"""The revealing checkpoint: random weights that let no mistake hide.

Weights as a constructor makes them hide nearly everything: biases are 0, layer-norm scales 1, and what the
blocks add is lost beside the embedding, so a dropped bias cannot be seen at any tolerance and a lost rotary sign
passes at 4e-2. Here every tensor is random and every part of the model is as loud as the others:

* kernels have variance 1 / fan_in, so that what goes through them keeps its size;
* biases, layer-norm scales and offsets are all random, so that dropping, doubling or swapping one shows;
* what is written into the residual stream is small (embedding, attn.out_proj, mlp.fc_out and its bias), so that
  no block's contribution drowns, and the layer norm's epsilon matters: the stream's variance is near 1e-3.

A tensor's values follow from the seed and its name alone: the order of filling, the other tensors and the head do
not matter. They are float32 values, so the float32 and the float64 model of one fill are the same model. Bits come
from the Philox counter through whole-number sums, so every platform and NumPy version makes the same file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX, Head, TensorSpec, schema

__all__ = ["revealing_config", "revealing_fill", "revealing_tensor", "revealing_weights"]

EMBEDDING_DEVIATION = 0.02
WRITTEN_DEVIATION = 0.02
"""Standard deviation, over sqrt(fan_in), of the kernels that write into the residual stream."""
BIAS_DEVIATION = 0.3
SCALE_MEAN, SCALE_DEVIATION = 1.0, 0.5
OFFSET_DEVIATION = 0.3

_WRITERS = ("attn.out_proj.weight", "mlp.fc_out.weight", "mlp.fc_out.bias")


def revealing_config(**changes: Any) -> GPTJConfig:
    """A tiny config whose axes all differ in size, so that a swapped or transposed one cannot pass.

    vocab 216, positions 2,056, width 48, heads 4 of 12, rotary 8, inner 136, layers 3, labels 5. Vocabulary and
    inner width divide by 8 and heads by 4, so that it can be sharded. `changes` replace fields.
    """
    fields: dict[str, Any] = {
        "vocab_size": 216,
        "n_positions": 2056,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "rotary_dim": 8,
        "n_inner": 136,
        "bos_token_id": 215,
        "eos_token_id": 215,
        "pad_token_id": 214,
        "num_labels": 5,
    }
    return GPTJConfig(**(fields | changes))


def revealing_tensor(spec: TensorSpec, seed: int = 0) -> NDArray[np.float32]:
    """The values of one tensor, float32, C order."""
    name = spec.name.removeprefix(BASE_PREFIX)  # so that GPTJModel's own names make the same model
    values = _bell(f"{seed}:{name}", spec.size).reshape(spec.shape)
    if spec.kind == "scale":
        return (SCALE_MEAN + SCALE_DEVIATION * values).astype(np.float32)
    deviation = {
        "embedding": EMBEDDING_DEVIATION,
        "kernel": 1 / math.sqrt(spec.shape[-1]),
        "bias": BIAS_DEVIATION,
        "offset": OFFSET_DEVIATION,
    }[spec.kind]
    if name.endswith(_WRITERS):
        deviation *= WRITTEN_DEVIATION
    return (deviation * values).astype(np.float32)


def revealing_fill(seed: int = 0) -> Callable[[TensorSpec], NDArray[np.float32]]:
    """`revealing_tensor` with its seed settled: the `read` of `gptj.checkpoint.write_checkpoint`."""
    return lambda spec: revealing_tensor(spec, seed)


def revealing_weights(config: GPTJConfig, seed: int = 0, *, head: Head = "causal_lm") -> dict[str, NDArray[np.float32]]:
    """Every tensor of the revealing model by name, in the schema's order."""
    return {spec.name: revealing_tensor(spec, seed) for spec in schema(config, head)}


def _bell(key: str, count: int) -> NDArray[np.float64]:
    """`count` values, independent, mean 0, variance 1, nearly normal: sums of four 16-bit uniforms of Philox(key).

    The sum of four is a bell of +-3.46 at most. Sums of whole numbers and one multiplication are the same bits
    everywhere; the logarithm in NumPy's own normal distribution need not be.
    """
    digest = hashlib.sha256(key.encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    lanes = philox.random_raw(count).astype("<u8").view("<u2").reshape(count, 4)
    total = lanes.astype(np.int64).sum(-1)
    variance = 4 * (2**32 - 1) / 12  # of one whole number drawn evenly from 2^16 it is (2^32 - 1) / 12
    values: NDArray[np.float64] = (total - 2 * (2**16 - 1)) * (1 / math.sqrt(variance))
    return values
