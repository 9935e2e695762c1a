"""Small checkpoints, and safetensors files made by hand so that they can lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema

# All axes differ: vocab 11, embed 12, mlp 20, head width 4, labels 2.
CONFIG = GPTJConfig(vocab_size=11, n_positions=16, n_embd=12, n_layer=2, n_head=3, rotary_dim=2, n_inner=20)


def array_of(row: TensorSpec, *, seed: int = 0) -> np.ndarray:
    """The float32 values of a row, the same for the same name and seed."""
    key = [seed, *row.name.encode()]
    return np.random.default_rng(key).standard_normal(row.shape).astype(np.float32)


def arrays(config: GPTJConfig = CONFIG, head: Any = "causal_lm", *, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a model, by name."""
    return {row.name: array_of(row, seed=seed) for row in schema(config, head)}


def write_sample(directory: Path, config: GPTJConfig = CONFIG, *, seed: int = 0, **options: Any) -> Path:
    """A checkpoint of `arrays`."""
    return write_checkpoint(directory, config, lambda row: array_of(row, seed=seed), **options)


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header (JSON-ready, or its text) and data; `length` lies about the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_raw(directory: Path, tensors: dict[str, np.ndarray], config: GPTJConfig = CONFIG) -> Path:
    """A checkpoint of any tensors at all, as another tool would write it: no hash, no manifest."""
    codes = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "bool": "BOOL", "uint8": "U8"}
    header, data = {}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = entry(codes[array.dtype.name], array.shape, len(data), end)
        data += np.ascontiguousarray(array).tobytes()
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(header, data))
    (directory / "config.json").write_text(config.to_json())
    return directory
