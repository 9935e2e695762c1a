"""A step of a mesh-transformer-jax v1 run, opened: how its leaves become tensors, with NumPy alone, one at a time.

Which leaf makes which tensor stands in `dialects`; the arithmetic is here:

* cut leaves are joined along the axis that the shards cut, and transposed where the table says so;
* a layer norm is shard 0's copy, since the other copies are never trained;
* the biases behind an all-reduce count once a shard, so the tensor is their sum, made after decoding 16-bit
  values, in float64, and rounded to float32 (a sum in bfloat16 moves an 8-shard model's logits by 4.4e-3);
* the embedding's bias, which GPT-J has no tensor for, is added to every row of the embedding in float32.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import (
    InputError,
    LimitError,
    SchemaError,
)
from gptj.reading.buffers import ReusedBuffer
from gptj.reading.npz import NpyArray, NpzFile
from gptj.reading.safetensors_file import cast
from gptj_conversion.common.dialects import MeshLeaf, mesh_leaves
from gptj_conversion.common.source import Context, Facts
from gptj_conversion.common.transpose import copy_transposed

__all__ = ["MeshCheckpoint", "axis_sizes"]

# Reading, checking and turning let go of Python's lock, so two shards are read side by side.
_THREADS = 2
_WORTH_THREADS_BYTES = 2**22

_FORMATS = {
    "full": "full",
    "slim": "slim",
    "other": "with the state of another optimizer",
}


@dataclasses.dataclass(frozen=True)
class MeshCheckpoint:
    """One step of a v1 training run, every header checked; no data has been read but the step number.

    Attributes:
        path: the step directory.
        layout: "full" (with the state of the original's optimizer), "slim", or "other" (with another state).
        shards, layers, width, vocab: sizes, as the files show them.
        dtype: of the parameters: float32, bfloat16, float16 or float64.
        padding: how many of the last rows of `vocab` are no tokens, as the training config says.
        config: heads, rotary width and positions included; None where no training config was given.
        context: its tokenizer's folders, the token ids that the training config does not say, an optimizer that is
            not the original's or an older step than the newest.
        archives: the .npz files, by shard and number.
        parameters: for each shard, the place of each leaf of `mesh_leaves(layers)`.
    """

    path: Path
    layout: Literal["full", "slim", "other"]
    shards: int
    layers: int
    width: int
    vocab: int
    padding: int
    dtype: str
    config: GPTJConfig | None
    context: Context
    archives: tuple[tuple[NpzFile, ...], ...]
    parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...]

    @property
    def format(self) -> str:
        """The format's name in plans and manifests."""
        return f"mesh-transformer-jax v1, {_FORMATS[self.layout]}"

    @property
    def head(self) -> Head:
        """A v1 model always has a language-model head."""
        return "causal_lm"

    def dtype_of(self, name: str) -> str:
        """The dtype of every parameter."""
        return self.dtype

    def leaves(self, name: str) -> list[tuple[int, MeshLeaf]]:
        """The leaves that make a canonical tensor, with their numbers, matrices before biases."""
        found = [(n, leaf) for n, leaf in enumerate(mesh_leaves(self.layers)) if leaf.tensor == name]
        if not found:
            raise SchemaError("no such tensor", file=self.path, where=name)
        return sorted(found, key=lambda pair: -len(pair[1].axes))

    def origin(self, name: str) -> str:
        """The making of a tensor, in words: the leaves and the rule."""
        leaves = self.leaves(name)
        made = "; then ".join(f"{_describe_rule(leaf, self.shards)} ({leaf.path})" for _, leaf in leaves)
        cut = self.padding and "vocab" in leaves[0][1].axes
        return f"{made}; the rows that pad the vocabulary ({self.padding}) left out" if cut else made

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The archives, by their path below the step directory."""
        places = {
            f"shard_{shard}/{self.parameters[shard][number][0].path.name}": None
            for number, leaf in self.leaves(name)
            for shard in range(1 if leaf.cut is None and leaf.copies == "first" else self.shards)
        }
        return tuple(places)

    def read(
        self,
        row: TensorSpec | str,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        buffer: ReusedBuffer | None = None,
    ) -> NDArray[Any]:
        """A canonical tensor in the checkpoint's dtype or in `dtype`, in the memory of `buffer` or in its own.

        Never more than the tensor, one copy of a summed bias and two buffers are in memory.

        Raises:
            FormatError: a file changed or is damaged.
            SchemaError: there is no such tensor, or a value overflows `dtype`.
        """
        name = row if isinstance(row, str) else row.name
        out = self._read_shards(name, range(self.shards), dtype, allow_overflow=allow_overflow, buffer=buffer)
        return out[: len(out) - self.padding] if self.padding and "vocab" in self.leaves(name)[0][1].axes else out

    def read_part(self, row: TensorSpec, part: tuple[slice, ...], dtype: Any = None) -> NDArray[Any]:
        """`read(row, dtype)[part]`, for which no shard is read but those that hold it: a `gptj.sharding.ReadPart`.

        A shard's piece of a tensor is read whole, since its checksum is that of the whole; what stands in every shard
        (layer norms, summed biases) is read as `read` does.

        Raises:
            InputError: the part begins or ends within a shard; and what `read` raises.
        """
        (_, leaf), *_ = self.leaves(row.name)
        if leaf.cut is None or all(cut == slice(0, size) for cut, size in zip(part, row.shape, strict=True)):
            return np.ascontiguousarray(self.read(row, dtype)[part])
        axis = len(leaf.axes) - 1 - leaf.cut if leaf.transposed else leaf.cut
        whole = self._derive_whole_shape(leaf)[leaf.cut]
        size = whole // self.shards
        others = all(cut == slice(0, n) for at, (cut, n) in enumerate(zip(part, row.shape, strict=True)) if at != axis)
        cut = part[axis]
        if not others or cut.start % size or cut.stop % size:
            fitting = ", ".join(str(n) for n in range(1, self.shards + 1) if self.shards % n == 0)
            raise InputError(
                "the part is no whole number of the checkpoint's shards",
                file=self.path,
                where=row.name,
                expected=f"multiples of {size} along axis {axis} alone, as strategy tp cuts it on {fitting} processes",
                found=", ".join(f"{one.start}:{one.stop}" for one in part),
                hint="Convert it first (gptj convert), and open the folder: its parts are read from there",
            )
        return self._read_shards(row.name, range(cut.start // size, cut.stop // size), dtype)

    def _read_shards(
        self, name: str, shards: range, dtype: Any, *, allow_overflow: bool = False, buffer: ReusedBuffer | None = None
    ) -> NDArray[Any]:
        """The pieces of these neighbouring shards, joined; padding included."""
        wanted = numpy_dtype(self.dtype if dtype is None else dtype)
        (number, leaf), *added = self.leaves(name)

        def fit(values: NDArray[Any]) -> NDArray[Any]:
            return cast(values, wanted, where=name, file=self.path, allow_overflow=allow_overflow)

        if leaf.copies == "sum":
            return fit(self._sum(number))
        shape = list(self._derive_whole_shape(leaf))
        if leaf.cut is not None:
            shape[leaf.cut] = shape[leaf.cut] // self.shards * len(shards)
        out = _allocate(tuple(shape[::-1] if leaf.transposed else shape), wanted, self.path, name, buffer)
        bias = self._sum(added[0][0]) if added else None
        if bias is not None and not bias.any():
            bias = None

        def fill(at: int) -> None:
            archive, array = self.parameters[0 if leaf.cut is None else shards[at]][number]
            place = out if leaf.cut is None else _view_part(out, leaf, at, len(shards))
            for start, block in archive.rows(array):
                if bias is not None:
                    block = block.astype(bias.dtype) + bias
                rows = slice(start, start + len(block))
                if leaf.transposed:
                    copy_transposed(place[:, rows], fit(block))
                else:
                    place[rows] = fit(block)

        pieces_to_read = range(1 if leaf.cut is None else len(shards))
        if out.nbytes < _WORTH_THREADS_BYTES:
            for at in pieces_to_read:
                fill(at)
        else:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="gptj-read") as threads:
                list(threads.map(fill, pieces_to_read))
        return out

    def facts(self) -> Facts:
        """Its sizes, and what seems strange about it."""
        problems = [*self.context.notes]
        problems += [f"the copies of {path} differ between shards" for path in self.list_differing_copies()]
        if self.config is None:
            problems.append("heads, rotary width and positions are not in the files: convert needs the training config")
        config = self.config
        rows = schema(
            config or GPTJConfig(vocab_size=self.vocab, n_embd=self.width, n_layer=self.layers, n_head=1, rotary_dim=2)
        )
        return Facts(
            path=str(self.path),
            format=self.format,
            step=self.context.step,
            shards=self.shards,
            layers=self.layers,
            width=self.width,
            heads=None if config is None else config.n_head,
            rotary_width=None if config is None else config.rotary_width,
            positions=None if config is None else config.n_positions,
            vocab=self.vocab - self.padding,
            dtype=self.dtype,
            tensors=len(rows),
            parameters=sum(row.size for row in rows),
            bytes=sum(archive.archive.nbytes for files in self.archives for archive in files),
            problems=tuple(problems),
        )

    def list_differing_copies(self) -> list[str]:
        """The summed biases whose copies are not the same in every shard.

        Training gives each copy the same gradient, so a difference says that the shards may not belong together.
        """
        different = []
        for number, leaf in enumerate(mesh_leaves(self.layers)):
            if leaf.cut is None and leaf.copies != "first":
                copies = [archive.read(array).tobytes() for archive, array in (s[number] for s in self.parameters)]
                if len(set(copies)) > 1:
                    different.append(leaf.path)
        return different

    def _derive_whole_shape(self, leaf: MeshLeaf) -> tuple[int, ...]:
        return leaf.shape(axis_sizes(self.width, self.vocab), 1)

    def _sum(self, number: int) -> NDArray[Any]:
        """The sum of a leaf's copies: in float64, rounded once to float32 (float64 for a float64 checkpoint)."""
        copies = [archive.read(array).astype(np.float64) for archive, array in (s[number] for s in self.parameters)]
        total: NDArray[Any] = np.asarray(sum(copies[1:], start=copies[0]))
        return total if self.dtype == "float64" else total.astype(np.float32)


def _view_part(out: NDArray[Any], leaf: MeshLeaf, number: int, count: int) -> NDArray[Any]:
    """The view of `out` that piece `number` of `count` of a cut leaf fills."""
    assert leaf.cut is not None
    axis = len(leaf.axes) - 1 - leaf.cut if leaf.transposed else leaf.cut
    size = out.shape[axis] // count
    part = slice(number * size, (number + 1) * size)
    return out[part] if axis == 0 else out[:, part]


def _describe_rule(leaf: MeshLeaf, shards: int) -> str:
    if leaf.copies == "sum onto every row":
        return f"the sum of {shards} copies in float32, added to every row"
    if leaf.copies == "sum":
        return f"the sum of {shards} copies in float32"
    if leaf.cut is None:
        return "the copy of shard 0"
    return f"{shards} pieces joined on axis {leaf.cut}" + (", transposed" if leaf.transposed else "")


def axis_sizes(width: int, vocab: int) -> dict[str, int]:
    """The whole length of each axis that `mesh_leaves` names."""
    return {"vocab": vocab, "embed": width, "heads": width, "mlp": 4 * width, "norm": width}


def _allocate(
    shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, name: str, buffer: ReusedBuffer | None
) -> NDArray[Any]:
    try:
        return (buffer or ReusedBuffer()).array(shape, dtype)
    except (MemoryError, ValueError):
        gigabytes = math.prod(shape) * dtype.itemsize / 1e9
        raise LimitError(f"needs {gigabytes:.3g} GB of memory, more than there is", file=path, where=name) from None
