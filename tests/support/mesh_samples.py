"""mesh-transformer-jax v1 checkpoints made by a writer that shares nothing with the one under test.

It does what the original's `write_ckpt` does: a nested dict of haiku parameters, flattened as jax.tree_flatten
does (keys sorted as strings, at every level), cut into 16 runs, each saved with np.savez.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STEP = 7


@dataclasses.dataclass(frozen=True)
class MeshSample:
    """A written checkpoint: its folder, its training config, and the tensors that must come out of it."""

    path: Path
    training_config: dict[str, Any]
    tensors: dict[str, Array]

    @property
    def step_directory(self) -> Path:
        return self.path / f"step_{STEP}"

    @property
    def config_file(self) -> Path:
        return self.path.parent / f"{self.path.name}.json"


def write_mesh_sample(
    path: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 4,
    vocab_per_shard: int = 5,
    shards: int = 2,
    dtype: Any = np.float32,
    layout: str = "slim",
    seed: int = 0,
    meta: bool = False,
) -> MeshSample:
    """Write a checkpoint of random leaves; every copy that must not count is random too."""
    random = np.random.default_rng(seed)
    width = heads * head_dim
    vocab = vocab_per_shard * shards
    dtype = np.dtype(dtype)

    def leaf(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32).astype(dtype)

    trees = []
    for _ in range(shards):
        module = "causal_transformer_shard/~/"
        params: dict[str, dict[str, Array]] = {
            module + "embedding_shard/~/linear": {"w": leaf(vocab // shards, width), "b": leaf(width)},
            module + "projection_shard/~/linear": {"w": leaf(width, vocab // shards), "b": leaf(vocab // shards)},
            module + "projection_shard/~/replicated_layer_norm": {"scale": leaf(width), "offset": leaf(width)},
        }
        for i in range(layers):
            block = f"{module}layer_{i}/~/"
            params[block + "replicated_layer_norm"] = {"scale": leaf(width), "offset": leaf(width)}
            for name in ("linear", "linear_1", "linear_2"):
                params[block + name] = {"w": leaf(width, width // shards)}
            params[block + "linear_3"] = {"w": leaf(width // shards, width)}
            params[block + "linear_4"] = {"w": leaf(width, 4 * width // shards), "b": leaf(4 * width // shards)}
            params[block + "linear_5"] = {"w": leaf(4 * width // shards, width), "b": leaf(width)}
        trees.append(params)
    for shard, params in enumerate(trees):
        state: dict[str, Any] = {"params": params, "step": np.int32(STEP)}
        if layout == "full":
            noise = {m: {n: leaf(*a.shape) for n, a in leaves.items()} for m, leaves in params.items()}
            count = np.int32(STEP)
            state["opt_state"] = [{"count": count, "mu": noise, "nu": noise}, {"count": count}]
        write_shard(path / f"step_{STEP}" / f"shard_{shard}", flatten(state))
    if meta:
        (path / "meta.json").write_text(json.dumps({"step": STEP, "checkpoints": [STEP], "aux": {}}))
    training_config = {
        "layers": layers,
        "d_model": width,
        "n_heads": heads,
        "n_vocab": vocab,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": 2,
        "seq": 16,
        "cores_per_replica": shards,
        "lr": 1e-4,
    }
    sample = MeshSample(path, training_config, _joined(trees, layers, dtype))
    sample.config_file.write_text(json.dumps(training_config))
    return sample


def flatten(tree: Any) -> list[Array]:
    """The leaves of nested dicts and lists, as jax.tree_flatten orders them."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flatten(tree[key])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in flatten(item)]
    return [tree]


def write_shard(folder: Path, leaves: list[Array]) -> None:
    """Save a shard's leaves in 16 files, the first ones one longer where 16 does not divide their number."""
    folder.mkdir(parents=True)
    k, m = divmod(len(leaves), 16)
    for n in range(16):
        start = n * k + min(n, m)
        np.savez(folder / f"{n}.npz", *leaves[start : start + k + (n < m)])


def _joined(trees: list[dict[str, dict[str, Array]]], layers: int, dtype: np.dtype[Any]) -> dict[str, Array]:
    """The canonical tensors, by the plainest code: summed biases in float32, the rest as stored."""

    def pieces(module: str, name: str) -> list[Array]:
        return [tree["causal_transformer_shard/~/" + module][name] for tree in trees]

    def total(module: str, name: str) -> Array:
        return np.sum([piece.astype(np.float64) for piece in pieces(module, name)], axis=0).astype(precision)

    precision = np.float64 if dtype == np.float64 else np.float32
    embedding = np.concatenate(pieces("embedding_shard/~/linear", "w")).astype(precision)
    tensors = {
        "transformer.wte.weight": (embedding + total("embedding_shard/~/linear", "b")).astype(dtype),
        "transformer.ln_f.weight": pieces("projection_shard/~/replicated_layer_norm", "scale")[0],
        "transformer.ln_f.bias": pieces("projection_shard/~/replicated_layer_norm", "offset")[0],
        "lm_head.weight": np.concatenate(pieces("projection_shard/~/linear", "w"), axis=1).T,
        "lm_head.bias": np.concatenate(pieces("projection_shard/~/linear", "b")),
    }
    for i in range(layers):
        here, block = f"transformer.h.{i}.", f"layer_{i}/~/"
        tensors |= {
            here + "ln_1.weight": pieces(block + "replicated_layer_norm", "scale")[0],
            here + "ln_1.bias": pieces(block + "replicated_layer_norm", "offset")[0],
            here + "attn.q_proj.weight": np.concatenate(pieces(block + "linear", "w"), axis=1).T,
            here + "attn.v_proj.weight": np.concatenate(pieces(block + "linear_1", "w"), axis=1).T,
            here + "attn.k_proj.weight": np.concatenate(pieces(block + "linear_2", "w"), axis=1).T,
            here + "attn.out_proj.weight": np.concatenate(pieces(block + "linear_3", "w")).T,
            here + "mlp.fc_in.weight": np.concatenate(pieces(block + "linear_4", "w"), axis=1).T,
            here + "mlp.fc_in.bias": np.concatenate(pieces(block + "linear_4", "b")),
            here + "mlp.fc_out.weight": np.concatenate(pieces(block + "linear_5", "w")).T,
            here + "mlp.fc_out.bias": total(block + "linear_5", "b").astype(dtype),
        }
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


BFLOAT16 = ml_dtypes.bfloat16
