"""The plan of a conversion, from headers alone: `gptj convert --dry-run` prints it and touches nothing."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import TensorSpec
from gptj.reading.files import BLOCK_BYTES
from gptj.reading.weight_files import WEIGHTS_FILE
from gptj.writing.shards import cut_sizes, shard_name
from gptj_conversion.common.source import Facts, Source

__all__ = ["ConversionPlan", "PlannedFile", "interim_dtype", "make_plan", "plan_files", "plan_memory"]


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """A file that would be written: its name, how many tensors it holds, and their bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """The files that would be written, and what they need.

    Attributes:
        source: what was found.
        destination, to: where, and in which format.
        dtype: of the written tensors.
        files: the weights files; of a TPU checkpoint, an entry a shard.
        nbytes: of all tensors.
        peak_memory_bytes: an estimate, over what Python and its imports take.
        free_bytes: what the destination's file system has left.
        notes: what is left out, and what was chosen without having been asked for.
    """

    source: Facts
    destination: str
    to: str
    dtype: str
    files: tuple[PlannedFile, ...]
    nbytes: int
    peak_memory_bytes: int
    free_bytes: int | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {**dataclasses.asdict(self), "source": self.source.as_dict(), "notes": [*self.notes], "fits": self.fits}

    @property
    def fits(self) -> bool:
        """Whether the destination has room, as far as is known."""
        return self.free_bytes is None or self.nbytes <= self.free_bytes


def interim_dtype(stored: str, wanted: str | None) -> str | None:
    """The dtype in which a tensor is asked for when it is to be written as `wanted`.

    Widening and keeping are the reader's work. Narrowing is the writer's, who counts what it does; a sum of 16-bit
    copies is then asked for in float32, in which it is made, so that it is rounded once.

    >>> interim_dtype("float32", "bfloat16"), interim_dtype("bfloat16", "float16"), interim_dtype("float16", "float32")
    ('float32', 'float32', 'float32')
    """
    if wanted is None or wanted == stored:
        return wanted
    if numpy_dtype(wanted).itemsize > numpy_dtype(stored).itemsize:
        return wanted
    return "float32" if numpy_dtype(stored).itemsize == 2 else stored


def plan_files(rows: tuple[TensorSpec, ...], dtypes: dict[str, str], max_shard_bytes: int) -> tuple[PlannedFile, ...]:
    """How `write_checkpoint` will cut the tensors into files."""
    itemsizes = [numpy_dtype(dtypes[row.name]).itemsize for row in rows]
    sizes = [row.size * itemsize for row, itemsize in zip(rows, itemsizes, strict=True)]
    counts = cut_sizes(zip(sizes, itemsizes, strict=True), max_shard_bytes)
    left = iter(sizes)
    return tuple(
        PlannedFile(shard_name(WEIGHTS_FILE, number, len(counts)), count, sum(itertools.islice(left, count)))
        for number, count in enumerate(counts, start=1)
    )


def plan_memory(rows: tuple[TensorSpec, ...], source: Source, dtype: str | None, to: str) -> int:
    """The largest tensor as it is asked for, again where it is turned as a whole, and the buffers of both sides."""
    largest = 0
    for row in rows:
        stored = source.dtype_of(row.name)
        asked_for = numpy_dtype(interim_dtype(stored, dtype) or stored).itemsize
        turned = numpy_dtype(dtype or stored).itemsize if to == "mesh" else 0
        largest = max(largest, row.size * (asked_for + turned))
    return largest + 4 * BLOCK_BYTES


def make_plan(
    source: Source, rows: tuple[TensorSpec, ...], destination: Path, *, to: str, dtype: str | None,
    files: tuple[PlannedFile, ...], notes: tuple[str, ...],
) -> ConversionPlan:  # fmt: skip
    """The plan of a conversion whose source has been opened."""
    folder = destination.parent
    facts = source.facts()
    problems = tuple(problem for problem in facts.problems if problem not in notes)  # what is said once is enough
    return ConversionPlan(
        source=dataclasses.replace(facts, problems=problems),
        destination=str(destination),
        to=to,
        dtype=", ".join(sorted({dtype or source.dtype_of(row.name) for row in rows})),
        files=files,
        nbytes=sum(file.nbytes for file in files),
        peak_memory_bytes=plan_memory(rows, source, dtype, to),
        free_bytes=_free_bytes(folder),
        notes=notes,
    )


def _free_bytes(folder: Path) -> int | None:
    """The room on the folder's file system, None where there is no such folder or the system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
