"""Weights as safetensors files: cut while the tensors come, each file read back when it is full.

A safetensors header stands before the data but names the dtypes of all of it. So space is left for the longest
header that these rows can have, the data is streamed behind it, and the header, padded with spaces as the format
allows, is written last. Nobody has to know the dtypes before the tensors come, and no tensor is asked for twice.
How many files there will be is not known either: until the end they are called shard-1, shard-2 and so on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import TensorSpec
from gptj.errors import FormatError, WriteError, naming_file, shown
from gptj.reading.buffers import PAGE_BYTES
from gptj.reading.manifest import FileRecord, FoundTensor, TensorRecord, examine_tensor
from gptj.reading.safetensors_file import pack_header, read_safetensors
from gptj.reading.weight_files import WEIGHTS_FILE
from gptj.writing.column_sums import ColumnSums
from gptj.writing.containers import Entry
from gptj.writing.folder import FolderWriter
from gptj.writing.journal import Journal, Note, compare_start, stage_file
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.shards import ShardCutter, shard_name
from gptj.writing.stored_tensor import stored_dtype

__all__ = ["SafetensorsFile", "SafetensorsShards"]


class SafetensorsFile:
    """A container whose header is written last, into space that was left for it.

    Args:
        output: the directory in the making.
        name: of the file.
        header_bytes: the space for the header.
        metadata: strings in the header.
    """

    def __init__(self, output: OutputDirectory, name: str, header_bytes: int, metadata: Mapping[str, str]) -> None:
        self.name = name
        self.header_bytes = header_bytes
        self.metadata = metadata
        self.entries: list[Entry] = []
        self._sums: list[str] = []
        self._file = output.create(name)
        self._file.write(bytes(header_bytes))

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next tensor's bytes, some rows at a time."""
        sums = ColumnSums()
        for block in blocks:
            sums.update(block)
            self._file.write(block)
        self.entries.append(entry)
        self._sums.append(sums.hexdigest())

    def finish(self) -> FileRecord:
        """Write the header, force the file to the disk, and compare what the disk holds with what came.

        Raises:
            WriteError: it holds something else.
        """
        header = _header_of(self.entries, self.metadata, self.header_bytes)
        self._file.rewrite(header)
        of_header = ColumnSums()
        of_header.update(header)
        found = self._file.read_back([self.header_bytes, *(entry.nbytes for entry in self.entries)], ColumnSums)
        names = ["header", *(entry.name for entry in self.entries)]
        for name, meant, holds in zip(names, [of_header.hexdigest(), *self._sums], found, strict=True):
            if meant != holds:
                raise WriteError("what was read back differs from what was written", file=self._file.path, where=name)
        self._compare_header()
        return FileRecord(self._file.nbytes, hashlib.sha256(header).hexdigest(), self.header_bytes)

    def _compare_header(self) -> None:
        """Make sure that our own strict reader and safetensors' both find in the file what was meant."""
        path = self._file.path
        meant = [(entry.name, entry.dtype.name, entry.shape) for entry in self.entries]
        try:
            ours = [(tensor.name, tensor.dtype, tensor.shape) for tensor in read_safetensors(path).tensors.values()]
            with safe_open(path, framework="numpy") as theirs:
                names = set(theirs.keys())
        except (FormatError, SafetensorError) as error:
            raise WriteError(f"what was written cannot be read back: {error}", file=path) from error
        if ours != meant or names != {entry.name for entry in self.entries}:
            raise WriteError("the header read back differs from what was written", file=path)


class SafetensorsShards:
    """Safetensors files of a folder: `resume`, `add` each tensor in the schema's order, then `finish`.

    Args:
        writer: of the folder.
        metadata: of each header.
    """

    def __init__(self, writer: FolderWriter, metadata: Mapping[str, str]) -> None:
        self.writer = writer
        self.metadata = metadata
        self.rows = writer.order.rows
        self._cutter = ShardCutter(writer.order.rules.max_shard_bytes)
        self._file: SafetensorsFile | None = None

    @property
    def dtypes(self) -> list[np.dtype[Any] | None]:
        """The dtype to store each row in; None: as it comes."""
        names = (self.writer.order.dtypes[row.name] for row in self.rows)
        return [None if name is None else numpy_dtype(name) for name in names]

    # ---- going on from where another stopped

    def resume(self) -> int:
        """Keep the finished files of an adopted stage that still hold what they should; returns the next row."""
        output = self.writer.output
        count = self.writer.resume(self._accept)
        for number, note in enumerate(self.writer.notes, start=1):
            [name] = note.files
            if name != f"shard-{number}":
                output.rename(name, f"shard-{number}")
                self.writer.notes[number - 1] = _with_name(note, f"shard-{number}", ())
        self._cutter = ShardCutter(self.writer.order.rules.max_shard_bytes, count=count)
        return self._next_row()

    def _next_row(self) -> int:
        return sum(len(note.tensors) for note in self.writer.notes)

    def _accept(self, journal: Journal, number: int) -> Note | None:
        """The note on a finished file, whose bytes are read again; with the name that the file now has in the stage.

        Raises:
            FormatError: the note is none of these rows, or the file is another.
        """
        output, order = self.writer.output, self.writer.order
        note = journal.read(output, number)
        if note is None:
            return None
        name = stage_file(output.adopted, number) or f"shard-{number}"
        first = self._next_row()
        rows = self.rows[first : first + max(1, len(note.tensors))]
        if not rows:
            raise FormatError("is a note on more than there is to write", file=output.stage / name)
        journal.check(output, number, note, order.planned_part([f"shard-{number}"], rows))
        with naming_file(output.stage / f"shard-{number}.journal"):
            record = self._check_rows(note, rows, self._header_bytes(first))
        compare_start(output, name, record)
        file = read_safetensors(output.stage / name)
        for key, tensor in note.tensors.items():
            blocks = functools.partial(file.blocks, file.tensors[key])
            if examine_tensor(FoundTensor(tensor.dtype, tensor.shape, blocks)) != (tensor.sha256, tensor.values):
                raise FormatError("is not what its journal says", file=output.stage / name, where=key)
        return _with_name(note, name, ())

    def _check_rows(self, note: Note, rows: Sequence[TensorSpec], header_bytes: int) -> FileRecord:
        """The record that the file of these rows must have, which is the one that its note has.

        Raises:
            FormatError: the note says something else.
        """
        entries = [_entry(row, numpy_dtype(note.tensors[row.name].dtype)) for row in rows]
        total = sum(entry.nbytes for entry in entries)
        header = _header_of(entries, self.metadata, header_bytes)
        expected = FileRecord(header_bytes + total, hashlib.sha256(header).hexdigest(), header_bytes)
        [found] = note.files.values()
        fits = len(rows) == 1 or total <= self.writer.order.rules.max_shard_bytes
        if [*note.tensors] != [row.name for row in rows] or found != expected or not fits:
            raise FormatError("is not what is written", expected=shown(expected), found=shown(found))
        return expected

    # ---- writing

    def add(self, number: int, values: NDArray[Any]) -> int:
        """Write the tensor of row `number`; returns its stored bytes. See `FolderWriter.store_blocks` for errors."""
        row = self.rows[number]
        chosen = self.writer.order.dtypes[row.name]
        dtype = stored_dtype(row, values, None if chosen is None else numpy_dtype(chosen))
        entry = _entry(row, dtype)
        if self._cutter.begins(entry.nbytes, itemsize=dtype.itemsize):
            self._finish_file()
            name = f"shard-{self._cutter.count}"
            self._file = SafetensorsFile(self.writer.output, name, self._header_bytes(number), self.metadata)
        assert self._file is not None
        self._file.add(entry, self.writer.store_blocks(row, values, dtype))
        return entry.nbytes

    def finish(self) -> None:
        """Complete the last file, and give all their names."""
        self._finish_file()
        count = len(self.writer.notes)
        for at, note in enumerate(self.writer.notes):
            name = shard_name(WEIGHTS_FILE, at + 1, count)
            self.writer.output.rename(f"shard-{at + 1}", name)
            self.writer.notes[at] = _with_name(note, name, (name,))

    def _finish_file(self) -> None:
        if self._file is not None:
            self.writer.finish_part({self._file.name: self._file.finish()})
        self._file = None

    def _header_bytes(self, first: int) -> int:
        """The bytes of the longest header of a file that begins with this row: 8-byte numbers, 4-letter dtypes."""
        rows = [(row.name, "float64", row.shape) for row in self.rows[first:]]
        longest = len(pack_header(rows, self.metadata)) + len(rows)
        return longest + -longest % PAGE_BYTES  # so that large tensors begin at pages, too


def _entry(row: TensorSpec, dtype: np.dtype[Any]) -> Entry:
    return Entry(row, dtype, row.name)


def _header_of(entries: Iterable[Entry], metadata: Mapping[str, str], nbytes: int) -> bytes:
    return pack_header([(entry.name, entry.dtype.name, entry.shape) for entry in entries], metadata, length=nbytes)


def _with_name(note: Note, name: str, places: tuple[str, ...]) -> Note:
    """A note on one file, under another name, and the files that its tensors' records say."""
    [record] = note.files.values()
    tensors: dict[str, TensorRecord] = {
        key: dataclasses.replace(tensor, files=places) for key, tensor in note.tensors.items()
    }
    return dataclasses.replace(note, files={name: record}, tensors=tensors)
