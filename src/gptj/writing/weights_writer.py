"""The weights of a checkpoint, taken tensor by tensor and cut into files; each file is read back when it is full.

A safetensors header stands before the data but names the dtypes of all of it. So room is left for the longest
header that these rows can have, the data is streamed behind it, and the header, padded with spaces as the format
allows, is written last. Nobody has to know the dtypes before the tensors come, and no tensor is asked for twice.

Two cores are used: a thread hashes a block while this one counts, sums and writes it, and a witness may look on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gptj.dtypes import numpy_dtype
from gptj.errors import FormatError, InputError, SchemaError, WriteError, naming_file, shown
from gptj.reading.buffers import PAGE_BYTES
from gptj.reading.files import BLOCK_BYTES
from gptj.reading.manifest import FileRecord, FoundTensor, Origin, TensorRecord, examine_tensor, hash_of_start
from gptj.reading.safetensors_file import WEIGHT_DTYPES, cast, pack_header, read_safetensors
from gptj.reading.tally import CastTally, ValueTally, is_narrowing
from gptj.reading.weight_files import WEIGHTS_FILE
from gptj.schema import TensorSpec
from gptj.writing.column_sums import ColumnSums
from gptj.writing.journal import (
    Journal,
    Note,
    PlannedPart,
    PlannedTensor,
    WritingRules,
    remove_all_but,
    say_kept,
    stage_file,
)
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.output_file import OutputFile

__all__ = [
    "BlockTally",
    "WeightsWriter",
    "Witness",
    "WritingRules",
    "native",
    "record_tensor",
    "shard_name",
    "stored_blocks",
]

_log = logging.getLogger("gptj")
_MOST_SHARDS = 99_999
_INLINE_BYTES = 2**16  # to hand a block to the other thread costs as long as hashing this much
_NEVER_ZERO = ("kernel", "embedding", "scale")


class Witness(Protocol):
    """Who looks on; `gptj.parity.fingerprint.Witness` is one."""

    def see(self, name: str, rows: NDArray[Any], /) -> None:
        """Look at the next rows of a tensor, which stay as they are until `settle` returns."""

    def settle(self, name: str, /) -> None:
        """Be done with the tensor."""


def shard_name(number: int, count: int) -> str:
    """The name of weights file `number` of `count`, counted from 1.

    >>> shard_name(1, 1), shard_name(2, 3)
    ('model.safetensors', 'model-00002-of-00003.safetensors')
    """
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


@dataclasses.dataclass
class _Shard:
    """A weights file in the making.

    Attributes:
        name: in the stage.
        first: its first row.
        room: the bytes that are left for the header.
        file: open while it is written; None once it is finished.
        nbytes: its size.
        tensors: the record of each tensor in it; their `files` are filled in at the end.
        sums: the checksum of each tensor's bytes.
        sizes: the bytes of each.
        header_sha256: of the header, once it is finished.
    """

    name: str
    first: int
    room: int
    file: OutputFile | None
    nbytes: int
    tensors: dict[str, TensorRecord] = dataclasses.field(default_factory=dict)
    sums: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    header_sha256: str = ""

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The bytes of its header, as long as the room."""
        entries = [(name, record.dtype, record.shape) for name, record in self.tensors.items()]
        return pack_header(entries, metadata, length=self.room)

    @property
    def record(self) -> FileRecord:
        """The record of the finished file."""
        return FileRecord(self.nbytes, self.header_sha256, self.room)


class WeightsWriter:
    """`with WeightsWriter(...) as weights:` give it the tensors in order with `add`, then `finish()`.

    Args:
        output: the directory in the making.
        rows: the schema.
        dtypes: what each row is stored as; None: as it comes.
        metadata: of each header.
        rules: how they are written.
        journal: where finished files are noted; None notes nothing.
        origin: where a tensor comes from, for its record.
        witness: shown each tensor as it is stored.
    """

    def __init__(
        self,
        output: OutputDirectory,
        rows: Sequence[TensorSpec],
        dtypes: Sequence[np.dtype[Any] | None],
        metadata: Mapping[str, str],
        rules: WritingRules,
        *,
        journal: Journal | None = None,
        origin: Callable[[TensorSpec], Origin] | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.output = output
        self.rows = rows
        self.metadata = metadata
        self.dtypes = dtypes
        self.rules = rules
        self.journal = journal
        self.origin = origin
        self.witness = witness
        self.shards: list[_Shard] = []

    def __enter__(self) -> WeightsWriter:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gptj-hash")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(sum(shard.sizes) for shard in self.shards)

    # ---- going on from where another stopped

    def resume(self) -> int:
        """Keep the finished files of an adopted stage that still hold what they should; returns the next row.

        Everything else in the stage is removed.
        """
        kept: dict[str, str] = {}
        journal = self.journal

        def accept(number: int) -> bool:
            note = None if journal is None else journal.read(self.output, number)
            if note is None:
                return False
            name = stage_file(self.output.adopted, number) or f"shard-{number}"
            self.shards.append(self._shard_of(number, name, note))
            kept[name] = f"shard-{number}"
            return True

        if journal is not None:
            journal.take_over(self.output, accept)
        remove_all_but(self.output, {*kept, *(f"{name}.journal" for name in kept.values())})
        for name, first_name in kept.items():
            if name != first_name:
                self.output.rename(name, first_name)
        if self.output.adopted:
            say_kept(self.output, len(kept))
        return self._next_row()

    def _next_row(self) -> int:
        return self.shards[-1].first + len(self.shards[-1].tensors) if self.shards else 0

    def _shard_of(self, number: int, name: str, note: Note) -> _Shard:
        """A finished file of the stage, all of whose bytes are read again and found to be what its note says.

        Raises:
            FormatError: the note is none of these rows, or the file is another.
        """
        assert self.journal is not None
        path, first = self.output.stage / name, self._next_row()
        rows = self.rows[first : first + max(1, len(note.tensors))]
        if not rows:
            raise FormatError("is a note on more than there is to write", file=path)
        planned = [
            PlannedTensor(
                row, None if dtype is None else dtype.name, (), None if self.origin is None else self.origin(row)
            )
            for row, dtype in zip(rows, self.dtypes[first:], strict=False)
        ]
        shard = _Shard(f"shard-{number}", first, self._room(first), None, 0, dict(note.tensors))
        with naming_file(self.output.stage / f"shard-{number}.journal"):
            PlannedPart((shard.name,), tuple(planned)).check(note, self.rules)
            shard.sizes = [math.prod(r.shape) * numpy_dtype(r.dtype).itemsize for r in note.tensors.values()]
            header = shard.header(self.metadata)
            shard.nbytes, shard.header_sha256 = shard.room + sum(shard.sizes), hashlib.sha256(header).hexdigest()
            derived = Note(first, first + len(rows), {shard.name: shard.record}, note.tensors)
            fits = len(rows) == 1 or sum(shard.sizes) <= self.rules.max_shard_bytes
            if [*note.tensors] != [row.name for row in rows] or note != derived or not fits:
                expected, found = ((one.first, one.stop, one.files) for one in (derived, note))
                raise FormatError("is not what is written", expected=shown(expected), found=shown(found))
        if not self.output.is_file(name):
            raise FormatError("is no regular file, as its journal says", file=path)
        if hash_of_start(path, shard.room) != (shard.nbytes, shard.header_sha256):
            raise FormatError("is not what its journal says", file=path, where="header")
        file = read_safetensors(path)
        for key, record in note.tensors.items():
            stored = file.tensors[key]
            blocks = functools.partial(file.blocks, stored)
            if examine_tensor(FoundTensor(record.dtype, record.shape, blocks)) != (record.sha256, record.values):
                raise FormatError("is not what its journal says", file=path, where=key)
        return shard

    # ---- one tensor

    def add(self, number: int, values: NDArray[Any]) -> int:
        """Write the tensor of row `number`; returns its stored bytes."""
        row, dtype = self.rows[number], self.dtypes[number]
        if values.shape != row.shape:
            raise SchemaError("wrong shape", where=row.name, expected=row.shape, found=values.shape)
        dtype = native(values.dtype) if dtype is None else dtype
        if dtype.name not in WEIGHT_DTYPES:
            raise SchemaError(
                "not a dtype of weights", where=row.name, expected=" or ".join(WEIGHT_DTYPES), found=shown(values.dtype)
            )
        nbytes = row.size * dtype.itemsize
        shard = self._shard_for(number, nbytes, dtype.itemsize)
        assert shard.file is not None
        digest, sums = hashlib.sha256(), ColumnSums()
        tally = BlockTally(row.name, native(values.dtype), dtype, self.rules)
        hashing: Future[None] | None = None
        for block in stored_blocks(values, dtype, tally):
            if hashing is not None:
                hashing.result()
            hashing = self._threads.submit(digest.update, block) if len(block) > _INLINE_BYTES else None
            if hashing is None:
                digest.update(block)
            if self.witness is not None:
                self.witness.see(row.name, np.frombuffer(block, dtype).reshape(-1, *row.shape[1:]))
            sums.update(block)
            shard.file.write(block)
        if hashing is not None:
            hashing.result()
        if self.witness is not None:
            self.witness.settle(row.name)
        shard.tensors[row.name] = record_tensor(self.output, row, (), digest.hexdigest(), tally, self.origin)
        shard.sums.append(sums.hexdigest())
        shard.sizes.append(nbytes)
        return nbytes

    # ---- files

    def finish(self) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
        """Name the files, and say what is in them."""
        self._close_shard()
        files: dict[str, FileRecord] = {}
        tensors: dict[str, TensorRecord] = {}
        for number, shard in enumerate(self.shards, start=1):
            name = shard_name(number, len(self.shards))
            self.output.rename(shard.name, name)
            files[name] = shard.record
            tensors |= {key: dataclasses.replace(record, files=(name,)) for key, record in shard.tensors.items()}
        return files, tensors

    def _shard_for(self, number: int, nbytes: int, itemsize: int) -> _Shard:
        """The shard to append to: a new one where the last is full, or would leave the tensor unaligned.

        Readers view the data in place, which needs offsets that are multiples of the item size.
        """
        if self.shards and self.shards[-1].file is not None:
            shard = self.shards[-1]
            full = sum(shard.sizes) + nbytes > self.rules.max_shard_bytes
            if not full and shard.file is not None and shard.file.nbytes % itemsize == 0:
                return shard
            self._close_shard()
        if len(self.shards) >= _MOST_SHARDS:
            raise InputError("too small", where="max_shard_bytes", expected=f"at most {_MOST_SHARDS} shards")
        name, room = f"shard-{len(self.shards) + 1}", self._room(number)
        shard = _Shard(name, number, room, self.output.create(name), 0)
        assert shard.file is not None
        shard.file.write(bytes(room))
        self.shards.append(shard)
        return shard

    def _room(self, first: int) -> int:
        """The bytes of the longest header of a file that begins with this row: 8-byte numbers, 4-letter dtypes."""
        rows = [(row.name, "float64", row.shape) for row in self.rows[first:]]
        longest = len(pack_header(rows, self.metadata)) + len(rows)
        return longest + -longest % PAGE_BYTES  # so that large tensors begin at pages, too

    def _close_shard(self) -> None:
        """Write the last shard's header, force it to the disk, and compare what the disk holds with what came."""
        shard = self.shards[-1]
        if shard.file is None:
            return
        header = shard.header(self.metadata)
        shard.header_sha256 = hashlib.sha256(header).hexdigest()
        shard.file.rewrite(header)
        shard.nbytes = shard.file.nbytes
        of_header = ColumnSums()
        of_header.update(header)
        found = shard.file.read_back([shard.room, *shard.sizes], ColumnSums)
        meant = [("header", of_header.hexdigest()), *zip(shard.tensors, shard.sums, strict=True)]
        wrong = [name for (name, a), b in zip(meant, found, strict=True) if a != b]
        if wrong:
            raise WriteError("what was read back differs from what was written", file=shard.file.path, where=wrong[0])
        _compare_header(shard.file, shard)
        shard.file = None
        if self.journal is not None:
            note = Note(shard.first, shard.first + len(shard.tensors), {shard.name: shard.record}, shard.tensors)
            self.journal.write(self.output, len(self.shards), note)


class BlockTally:
    """Counts what is in a tensor's blocks, and casts them to what is stored."""

    def __init__(self, name: str, source: np.dtype[Any], dtype: np.dtype[Any], rules: WritingRules) -> None:
        self.name = name
        self.dtype = dtype
        self.rules = rules
        self.stored = ValueTally(dtype)
        self.source = self.stored if source == dtype or source.name not in WEIGHT_DTYPES else ValueTally(source)
        narrows = source.name in WEIGHT_DTYPES and is_narrowing(source.name, dtype.name)
        self.casts = CastTally(source) if narrows else None

    def store(self, block: NDArray[Any], at: int) -> NDArray[Any]:
        """The block, which begins at row `at` of its tensor, as it is stored.

        Raises:
            SchemaError: it holds values that are not finite, or that overflow, and may not.
        """
        if block.dtype.name not in WEIGHT_DTYPES:
            return cast(block, self.dtype, where=self.name)  # which says why it cannot be
        bad = self.source.add(block)
        if bad and not self.rules.allow_nonfinite:
            raise SchemaError(
                "holds values that are not finite",
                where=self.name,
                found=f"{bad} NaN or infinite in rows {at} to {at + len(block) - 1}",
                hint="Say allow_nonfinite to write them",
            )
        if block.dtype == self.dtype:
            return block
        stored = cast(block, self.dtype, where=self.name, allow_overflow=True)
        self.stored.add(stored)
        if self.casts is not None and self.casts.add(block, stored) and not self.rules.allow_overflow:
            cast(block, self.dtype, where=self.name)  # which says what overflowed
        return stored


def stored_blocks(values: NDArray[Any], dtype: np.dtype[Any], tally: BlockTally) -> Iterator[memoryview]:
    """A tensor's canonical bytes as stored: C order, little-endian, counted and cast, some rows at a time."""
    values = values.reshape(1) if values.ndim == 0 else values
    row_bytes = max(values.dtype.itemsize, dtype.itemsize) * (values[:1].size or 1)
    rows = max(1, BLOCK_BYTES // row_bytes)
    for at in range(0, len(values), rows):
        block = values[at : at + rows]
        block = block.astype(native(block.dtype), order="C", copy=False)
        yield np.ascontiguousarray(tally.store(block, at)).reshape(-1).view(np.uint8).data


def record_tensor(
    output: OutputDirectory,
    row: TensorSpec,
    files: tuple[str, ...],
    sha256: str,
    tally: BlockTally,
    origin: Callable[[TensorSpec], Origin] | None,
) -> TensorRecord:
    """The record of a tensor that was stored, whatever the format; that a matrix is all zero is said."""
    values = tally.stored.record()
    if values.is_all_zero and row.kind in _NEVER_ZERO:
        _log.warning("%s: %s is all zero", output.target, row.name)
    casts = None if tally.casts is None else tally.casts.record()
    return TensorRecord(
        files, tally.dtype.name, row.shape, sha256, values, casts, None if origin is None else origin(row)
    )


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _compare_header(file: OutputFile, shard: _Shard) -> None:
    """Make sure that our own strict reader and safetensors' both find in the file what was meant."""
    meant = [(name, record.dtype, record.shape) for name, record in shard.tensors.items()]
    try:
        ours = [(tensor.name, tensor.dtype, tensor.shape) for tensor in read_safetensors(file.path).tensors.values()]
        with safe_open(file.path, framework="numpy") as theirs:
            names = set(theirs.keys())
    except (FormatError, SafetensorError) as error:
        raise WriteError(f"what was written cannot be read back: {error}", file=file.path) from error
    if ours != meant or names != shard.tensors.keys():
        raise WriteError("the header read back differs from what was written", file=file.path)
