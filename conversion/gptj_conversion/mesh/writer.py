"""Writing mesh-transformer-jax v1 checkpoints, to the byte as the original's np.savez writes them.

Every shard has the same leaves in the same order, so all shards are written side by side: a canonical tensor is
asked for once, cut, and let go. What the original sums over shards must come out as it went in. Each shard gets
b / S, and where that is not exact (float16's smallest numbers, or S not a power of two) shard 0 gets what is
left of b instead, so the sum is b to the bit. The original reads a checkpoint with as many shards as it was
written with, so S is the number of cores that will load it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import TensorSpec, axis_sizes, schema, schema_by_name
from gptj.errors import ConfigError, InputError, shown
from gptj.reading.manifest import MANIFEST_FILE, FileRecord
from gptj.reading.npz import npy_header
from gptj.writing.containers import HashedFile
from gptj.writing.extra_files import check_extra_files
from gptj.writing.folder import FolderWriter, WritingOptions, WritingOrder
from gptj.writing.journal import PlannedPart, whole_files
from gptj.writing.stored_zip import StoredZipWriter
from gptj_conversion.common.dialects import MeshLeaf, mesh_leaves
from gptj_conversion.common.plan import PlannedFile
from gptj_conversion.common.transpose import copy_transposed
from gptj_conversion.mesh.folder import META_FILE, TRAINING_FILE
from gptj_conversion.mesh.leaves import Layout, pieces
from gptj_conversion.mesh.output_tree import OutputTree
from gptj_conversion.mesh.training_config import TOKEN_ID_KEYS

__all__ = ["plan_mesh", "write_mesh"]

MESH_DTYPES = ("float32", "bfloat16", "float16")
_OURS = re.compile(
    rf"({META_FILE}|{TRAINING_FILE}|{MANIFEST_FILE}|step_\d+(/shard_\d+(/\d+\.npz)?)?)".replace(".json", r"\.json")
)


def write_mesh(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    *,
    shards: int,
    layout: Layout = "slim",
    dtype: str = "bfloat16",
    step: int = 0,
    options: WritingOptions | None = None,
) -> Path:
    """The model directory, written whole: `step_N/shard_S/{0..15}.npz`, meta.json, the training config, manifest.json.

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
        options: whatever any writer may be told; extra files stand beside the step directory, and `max_shard_bytes`
            says nothing here.

    Raises:
        ConfigError: the original cannot compute this model, or cannot cut it into so many shards.
        InputError: an argument breaks its rule.
        SchemaError: a tensor has another shape, is not finite, or overflows.
        WriteError: the directory may not be replaced or could not be written.
    """
    _check_arguments(config, shards, layout, dtype, step)
    plan = _Plan(config, shards, layout, numpy_dtype(dtype), step)
    options = options or WritingOptions()
    extra = dict(options.extra_files)
    check_extra_files(extra, lambda name: bool(_OURS.fullmatch(name)))

    def replaceable(path: str) -> bool:
        return path in extra or bool(_OURS.fullmatch(path))

    order = WritingOrder(
        "mesh",
        config,
        "causal_lm",
        {row.name: dtype for row in schema(config)},
        dataclasses.replace(options, max_shard_bytes=plan.total_bytes).rules,
        options.facts,
        details=[shards, layout, step],
        files_of=plan.files_of,
    )
    with (
        OutputTree(
            directory, replaceable=replaceable, overwrite=options.overwrite, adopt=options.facts.adopt, fs=options.fs
        ) as output,
        FolderWriter(output, order) as folder,
    ):
        finished = folder.resume(whole_files(output, plan.planned_parts(order)))
        output.require_space(sum(plan.leaf_bytes(leaf) for part in plan.parts[finished:] for leaf in part) * shards)
        output.make_folder(f"step_{step}")
        for shard in range(shards):
            output.make_folder(f"step_{step}/shard_{shard}")
        for number in range(finished):
            for row in plan.tensors_in(number):
                options.tell(row, 0)
        for number in range(finished, len(plan.parts)):
            part = _Part(output, plan, number)
            for leaf in plan.parts[number]:
                _write_leaf(part, leaf, read, folder, options)
            folder.finish_part(part.finish())
        meta = {"step": step, "checkpoints": [step], "aux": {str(step): {"train_loader": None}}}
        training = json.dumps(_training_config(config, shards), indent=2) + "\n"
        folder.finish({META_FILE: json.dumps(meta).encode(), TRAINING_FILE: training.encode(), **extra})
    return Path(directory)


def plan_mesh(config: GPTJConfig, *, shards: int, layout: Layout, dtype: str, step: int) -> tuple[PlannedFile, ...]:
    """The files that `write_mesh` would write, an entry a shard.

    Raises:
        ConfigError, InputError: as for `write_mesh`.
    """
    _check_arguments(config, shards, layout, dtype, step)
    plan = _Plan(config, shards, layout, numpy_dtype(dtype), step)
    files = f"0.npz to {len(plan.parts) - 1}.npz"
    tensors = sum(leaf.is_written_from for leaf in plan.leaves)
    return tuple(
        PlannedFile(f"step_{step}/shard_{shard}/{files}", tensors, plan.total_bytes // shards)
        for shard in range(shards)
    )


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

    @property
    def is_written_from(self) -> bool:
        """Whether its values are a canonical tensor's."""
        return self.parameter is not None and not self.fresh and self.parameter.copies != "sum onto every row"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The plan of a mesh checkpoint: its leaves, and the files that they are written to."""

    config: GPTJConfig
    shards: int
    layout: Layout
    dtype: np.dtype[Any]
    step: int

    @functools.cached_property
    def parts(self) -> list[list[_Leaf]]:
        """The leaves of each of a shard's files."""
        left = iter(self.leaves)
        return [[*itertools.islice(left, count)] for count in pieces(len(self.leaves))]

    def files(self, number: int) -> list[str]:
        """The files of this number, one a shard."""
        return [f"step_{self.step}/shard_{shard}/{number}.npz" for shard in range(self.shards)]

    def files_of(self, tensor: str) -> tuple[str, ...]:
        """The files that hold a canonical tensor: those of each of its leaves, in every shard whose piece counts."""
        found: dict[str, None] = {}
        for number, part in enumerate(self.parts):
            for row in (leaf.parameter for leaf in part if leaf.parameter is not None and not leaf.fresh):
                if row.tensor == tensor:
                    counting = 1 if row.cut is None and row.copies == "first" else self.shards
                    found |= dict.fromkeys(self.files(number)[:counting])
        return tuple(found)

    def tensors_in(self, number: int) -> list[str]:
        """The canonical tensors that are written with the files of this number."""
        return [leaf.parameter.tensor for leaf in self.parts[number] if leaf.parameter and leaf.is_written_from]

    def planned_parts(self, order: WritingOrder) -> list[PlannedPart]:
        """The files of each number with the rows that are stored with them."""
        rows = schema_by_name(self.config)
        return [
            order.planned_part(self.files(number), [rows[name] for name in self.tensors_in(number)])
            for number in range(len(self.parts))
        ]

    @functools.cached_property
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
        return self.shards * sum(self.leaf_bytes(leaf) for leaf in self.leaves)

    def shape(self, leaf: MeshLeaf) -> tuple[int, ...]:
        """A parameter leaf's shape in one shard."""
        return leaf.shape(axis_sizes(self.config), self.shards)

    def leaf_bytes(self, leaf: _Leaf) -> int:
        """A leaf's bytes in one shard."""
        if leaf.parameter is None:
            return 4
        return int(np.prod(self.shape(leaf.parameter), dtype=np.int64)) * self.dtype.itemsize


class _Part:
    """The files of one number in the making, one a shard, all with the same leaves."""

    def __init__(self, output: OutputTree, plan: _Plan, number: int) -> None:
        self.plan = plan
        self._files = {name: HashedFile(output, name) for name in plan.files(number)}
        self._archives = [StoredZipWriter(file.write) for file in self._files.values()]
        self._members = 0

    def add(self, shards: Iterator[NDArray[Any]]) -> int:
        """Write one leaf, given as each shard's piece in turn; returns the bytes."""
        written = 0
        for archive, piece in zip(self._archives, shards, strict=True):
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            archive.add(f"arr_{self._members}.npy", npy_header(piece.dtype, piece.shape), data)
            written += len(data)
        self._members += 1
        return written

    def finish(self) -> dict[str, FileRecord]:
        """Complete the files, and say what they are."""
        for archive in self._archives:
            archive.finish()
        return {name: file.finish() for name, file in self._files.items()}


def _write_leaf(
    part: _Part,
    leaf: _Leaf,
    read: Callable[[TensorSpec], NDArray[Any]],
    folder: FolderWriter,
    options: WritingOptions,
) -> None:
    plan = part.plan
    if leaf.parameter is None:
        part.add(np.array(leaf.value, np.int32) for _ in range(plan.shards))
    elif not leaf.is_written_from:
        zeros = np.zeros(plan.shape(leaf.parameter), plan.dtype)
        part.add(zeros for _ in range(plan.shards))
    else:
        row = schema_by_name(plan.config)[leaf.parameter.tensor]
        values = folder.store(row, read(row), plan.dtype)
        options.tell(row.name, part.add(_pieces_of(values, leaf.parameter, plan)))


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
