"""Writing mesh-transformer-jax v1 checkpoints, to the byte as the original's np.savez writes them.

Every shard has the same leaves in the same order, so all shards are written side by side: a canonical tensor is
asked for once, cut, and let go. What the original sums over shards must come out as it went in. Each shard gets
b / S, and where that is not exact (float16's smallest numbers, or S not a power of two) shard 0 gets what is
left of b instead, so the sum is b to the bit. The original reads a checkpoint with as many shards as it was
written with, so S is the number of cores that will load it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.dtypes import numpy_dtype
from gptj.errors import ConfigError, InputError, SchemaError, shown
from gptj.output_directory import FileSystem, require_plain_name
from gptj.safetensors_file import cast
from gptj.schema import TensorSpec, axis_sizes, schema_by_name
from gptj_conversion.dialects import MeshLeaf, mesh_leaves
from gptj_conversion.foreign_writer import HashedFile, require_finite
from gptj_conversion.mesh import Layout, pieces
from gptj_conversion.mesh_folder import FILES_PER_SHARD, META_FILE, TRAINING_FILE
from gptj_conversion.npz import npy_header
from gptj_conversion.output_tree import OutputTree
from gptj_conversion.stored_zip import StoredZipWriter
from gptj_conversion.training_config import TOKEN_ID_KEYS
from gptj_conversion.transpose import copy_transposed

__all__ = ["write_mesh"]

MESH_DTYPES = ("float32", "bfloat16", "float16")
_OURS = re.compile(rf"({META_FILE}|{TRAINING_FILE}|step_\d+(/shard_\d+(/\d+\.npz)?)?)".replace(".json", r"\.json"))


def write_mesh(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    *,
    shards: int,
    layout: Layout = "slim",
    dtype: str = "bfloat16",
    step: int = 0,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    fs: FileSystem | None = None,
) -> Path:
    """The model directory, written whole: `step_N/shard_S/{0..15}.npz`, meta.json, and the training config.

    The training config's numbers and the config's token ids go to training_config.json, which the original does not
    read and `open_mesh` does. On any failure, what stood there still stands.

    Args:
        directory: where; its parent must exist.
        config: the model, which must be one that the original can compute.
        read: gives the tensor of a row of the schema; called once a row.
        shards: the original's cores_per_replica; must divide vocabulary, heads and feed-forward width.
        layout: "slim", or "full" with a fresh optimizer state (count 0, zero moments), which is float32.
        dtype: of all parameters: float32, bfloat16 or float16.
        step: the training step to write.
        extra_files: further files by name, as a tokenizer's; they stand beside the step directory.
        overwrite: whether a mesh checkpoint at `directory` may be replaced.
        progress: told the name and bytes of each tensor when it has been written.
        allow_overflow, allow_nonfinite: write what became infinite in a narrowing cast; NaN and infinity.
        fs: the system calls, for tests.

    Raises:
        ConfigError: the original cannot compute this model, or cannot cut it into so many shards.
        InputError: an argument breaks its rule.
        SchemaError: a tensor has another shape, is not finite, or overflows.
        WriteError: the directory may not be replaced or could not be written.
    """
    _check_arguments(config, shards, layout, dtype, step)
    plan = _Plan(config, shards, layout, numpy_dtype(dtype), step)
    extra = dict(extra_files or {})
    for name in extra:
        require_plain_name(name, where="extra_files")

    def replaceable(path: str) -> bool:
        return path in extra or bool(_OURS.fullmatch(path))

    with OutputTree(directory, replaceable=replaceable, overwrite=overwrite, fs=fs) as output:
        output.require_space(plan.total_bytes)
        output.make_folder(f"step_{step}")
        for shard in range(shards):
            output.make_folder(f"step_{step}/shard_{shard}")
        writer = _ShardsWriter(output, plan)
        for leaf in plan.leaves:
            _write_leaf(writer, plan, leaf, read, progress, allow_overflow, allow_nonfinite)
        writer.finish()
        meta = {"step": step, "checkpoints": [step], "aux": {str(step): {"train_loader": None}}}
        output.write_file(META_FILE, json.dumps(meta).encode())
        output.write_file(TRAINING_FILE, (json.dumps(_training_config(config, shards), indent=2) + "\n").encode())
        for name, data in extra.items():
            output.write_file(name, data)
        output.commit()
    return Path(directory)


def _check_arguments(config: GPTJConfig, shards: int, layout: str, dtype: str, step: int) -> None:
    for where, value, lowest in (("shards", shards, 1), ("step", step, 0)):
        if type(value) is not int or not lowest <= value < 2**31:
            raise InputError(
                "breaks its rule", where=where, expected=f"a whole number, {lowest} or above", found=shown(value)
            )
    if layout not in ("slim", "full"):
        raise InputError("no such layout", where="layout", expected="slim or full", found=shown(layout))
    allowed = ("float32",) if layout == "full" else MESH_DTYPES
    if dtype not in allowed:
        raise InputError(
            f"not what the original stores in the {layout} layout",
            where="dtype",
            expected=" or ".join(allowed),
            found=shown(dtype),
        )
    computed: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("activation_function", config.activation_function, ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
        ("layer_norm_epsilon", config.layer_norm_epsilon, (1e-5,)),
        ("n_inner", config.inner_width, (4 * config.n_embd,)),
        ("tie_word_embeddings", config.tie_word_embeddings, (False,)),
    )
    for where, found, wanted in computed:
        if found not in wanted:
            raise ConfigError(
                "mesh-transformer-jax cannot compute this", where=where, expected=shown(wanted[0]), found=shown(found)
            )
    cut = {"vocab_size": config.vocab_size, "n_head": config.n_head, "n_inner": config.inner_width}
    if uneven := [f"{where} = {value}" for where, value in cut.items() if value % shards]:
        raise ConfigError(
            "cannot be cut evenly", where=uneven[0].split()[0], expected=f"multiples of {shards} shards",
            found=", ".join(uneven), hint="Choose a number of shards that divides them",
        )  # fmt: skip


def _training_config(config: GPTJConfig, shards: int) -> dict[str, Any]:
    return {
        "layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "n_vocab": config.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": config.rotary_width,
        "seq": config.n_positions,
        "cores_per_replica": shards,
        **{key: getattr(config, key) for key in TOKEN_ID_KEYS},
    }


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of the state: a parameter, one of its two moments, or a counter.

    Attributes:
        parameter: the row of the dialect, None for a counter.
        fresh: all zero, as an optimizer starts.
        value: a counter's.
    """

    parameter: MeshLeaf | None
    fresh: bool = False
    value: int = 0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be written."""

    config: GPTJConfig
    shards: int
    layout: Layout
    dtype: np.dtype[Any]
    step: int

    @property
    def leaves(self) -> list[_Leaf]:
        """A shard's leaves in the order of jax.tree_flatten: opt_state, params, step."""
        rows = mesh_leaves(self.config.n_layer)
        parameters = [_Leaf(row) for row in rows]
        moments = [_Leaf(row, fresh=True) for row in rows]
        state = [_Leaf(None), *moments, *moments, _Leaf(None)] if self.layout == "full" else []
        return [*state, *parameters, _Leaf(None, value=self.step)]

    @property
    def total_bytes(self) -> int:
        """The bytes of all leaves of all shards."""
        return self.shards * sum(self._leaf_bytes(leaf) for leaf in self.leaves)

    def shape(self, leaf: MeshLeaf) -> tuple[int, ...]:
        """A parameter leaf's shape in one shard."""
        return leaf.shape(axis_sizes(self.config), self.shards)

    def _leaf_bytes(self, leaf: _Leaf) -> int:
        if leaf.parameter is None:
            return 4
        return int(np.prod(self.shape(leaf.parameter), dtype=np.int64)) * self.dtype.itemsize


class _ShardsWriter:
    """Appends a leaf to every shard; goes on to the next .npz where the original does."""

    def __init__(self, output: OutputTree, plan: _Plan) -> None:
        self.output = output
        self.plan = plan
        self.left = [*pieces(len(plan.leaves))]
        self.number = -1
        self.members = 0
        self.files: list[tuple[HashedFile, StoredZipWriter]] = []

    def add(self, shards: Iterator[NDArray[Any]]) -> int:
        """Write one leaf, given as each shard's piece in turn; returns the bytes."""
        while not self.files or self.members == self.left[self.number]:
            self._next_file()
        written = 0
        for (_, archive), piece in zip(self.files, shards, strict=True):
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            archive.add(f"arr_{self.members}.npy", npy_header(piece.dtype, piece.shape), data)
            written += len(data)
        self.members += 1
        return written

    def finish(self) -> None:
        """Close the last file, and write those that hold no leaf."""
        while self.number < FILES_PER_SHARD - 1:
            self._next_file()
        self._close_files()

    def _next_file(self) -> None:
        self._close_files()
        self.number += 1
        self.members = 0
        for shard in range(self.plan.shards):
            file = HashedFile(self.output, f"step_{self.plan.step}/shard_{shard}/{self.number}.npz")
            self.files.append((file, StoredZipWriter(file.write)))

    def _close_files(self) -> None:
        for file, archive in self.files:
            archive.finish()
            file.finish()
        self.files = []


def _write_leaf(
    writer: _ShardsWriter,
    plan: _Plan,
    leaf: _Leaf,
    read: Callable[[TensorSpec], NDArray[Any]],
    progress: Callable[[str, int], None] | None,
    allow_overflow: bool,
    allow_nonfinite: bool,
) -> None:
    if leaf.parameter is None:
        writer.add(np.array(leaf.value, np.int32) for _ in range(plan.shards))
        return
    row = leaf.parameter
    if leaf.fresh or row.copies == "sum onto every row":
        zeros = np.zeros(plan.shape(row), plan.dtype)
        writer.add(zeros for _ in range(plan.shards))
        return
    spec = schema_by_name(plan.config)[row.tensor]
    values = np.asarray(read(spec))
    if values.shape != spec.shape:
        raise SchemaError("wrong shape", where=spec.name, expected=spec.shape, found=values.shape)
    if not allow_nonfinite:
        require_finite(values, spec.name)
    values = cast(values, plan.dtype, where=spec.name, allow_overflow=allow_overflow)
    written = writer.add(_pieces_of(values, row, plan))
    if progress is not None:
        progress(spec.name, written)


def _pieces_of(values: NDArray[Any], leaf: MeshLeaf, plan: _Plan) -> Iterator[NDArray[Any]]:
    """Each shard's piece of a canonical tensor, in turn; the inverse of `MeshCheckpoint.read`."""
    if leaf.cut is None:
        yield from _copies_of(values, leaf, plan.shards)
        return
    axis = values.ndim - 1 - leaf.cut if leaf.transposed else leaf.cut
    for part in np.split(values, plan.shards, axis):
        if leaf.transposed:
            piece = np.empty(plan.shape(leaf), plan.dtype)
            copy_transposed(piece, part)
            yield piece
        else:
            yield part


def _copies_of(values: NDArray[Any], leaf: MeshLeaf, shards: int) -> Iterator[NDArray[Any]]:
    if leaf.copies == "first":
        yield values
        start = np.ones_like(values) if leaf.path.endswith("/scale") else np.zeros_like(values)
        for _ in range(1, shards):
            yield start
        return
    exact = values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities, where they are allowed
        each = (exact / shards).astype(values.dtype)
        rest = (exact - (shards - 1) * each.astype(np.float64)).astype(values.dtype)
    rest = np.where(rest == each, each, rest)  # which are alike but for the sign of zero
    yield np.where(np.isfinite(exact), rest, values).astype(values.dtype)
    for _ in range(1, shards):
        yield each
