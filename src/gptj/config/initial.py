"""The values that a freshly made model starts from: data, so the same seed gives the same model in all three wings.

As transformers does for GPT-J: kernels and embeddings N(0, initializer_range), biases and offsets zero, layer-norm
scales one. Each tensor has random numbers of its own, keyed by the seed and the tensor's name; so a tensor's
values depend neither on the order in which tensors are made nor on what else the model has.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX, TensorSpec

__all__ = ["initial_tensor", "resize_tensor"]


def initial_tensor(spec: TensorSpec, config: GPTJConfig, seed: int = 0) -> NDArray[Any]:
    """The start value of one row of the schema, float32, of the row's shape.

    Args:
        spec: the row. `wte.weight` and `transformer.wte.weight` start alike.
        config: gives initializer_range.
        seed: 0 or above.
    """
    if spec.kind == "scale":
        return np.ones(spec.shape, np.float32)
    if spec.kind in ("bias", "offset"):
        return np.zeros(spec.shape, np.float32)
    digest = hashlib.sha256(f"{seed}:{spec.name.removeprefix(BASE_PREFIX)}".encode()).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = stream.standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(config.initializer_range)
    return values


def resize_tensor(spec: TensorSpec, config: GPTJConfig, old: NDArray[Any], seed: int) -> NDArray[Any]:
    """A row of the schema with the first axis of another size: what was there stays, what is new starts afresh.

    Args:
        spec, config: of the new size.
        old: the values before; the result has their dtype.
        seed: of the new rows.
    """
    new = initial_tensor(spec, config, seed).astype(old.dtype)
    stay = min(len(new), len(old))
    new[:stay] = old[:stay]
    return new
