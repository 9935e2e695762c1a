"""Writing the formats whose arrays have names: one file or several and an index, swapped in as a whole.

What the containers share is here: which tensor goes to which file, how it is spelt and turned, config.json,
the index and the manifest. A container only knows how to put named runs of bytes into a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.dtypes import numpy_dtype
from gptj.errors import WriteError
from gptj.reading.files import BLOCK_BYTES
from gptj.reading.manifest import MANIFEST_FILE, FileRecord
from gptj.schema import Head, TensorSpec, schema
from gptj.writing.checkpoint_writer import check_head_and_size, written_config
from gptj.writing.column_sums import ColumnSums
from gptj.writing.extra_files import check_extra_files
from gptj.writing.file_system import FileSystem
from gptj.writing.output_directory import Fate, OutputDirectory
from gptj.writing.weights_writer import WritingRules
from gptj_conversion.common.dialects import Dialect, Spelling, spell
from gptj_conversion.common.plan import PlannedFile
from gptj_conversion.common.recorder import Account, Recorder
from gptj_conversion.common.transpose import copy_transposed

__all__ = ["Entry", "HashedFile", "WeightsWriter", "plan_foreign", "write_foreign"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array to write, in the foreign format's own spelling and layout."""

    row: TensorSpec
    spelling: Spelling
    dtype: np.dtype[Any]

    @property
    def name(self) -> str:
        """The array's name."""
        return self.spelling.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.row.shape[::-1] if self.spelling.transposed else self.row.shape

    @property
    def nbytes(self) -> int:
        """The array's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsWriter(Protocol):
    """Writes one weights file: made with the stage, the file's name, its entries and the model's head."""

    def __init__(self, output: OutputDirectory, name: str, entries: Sequence[Entry], head: Head) -> None: ...

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next entry's bytes, which are in C order, some rows at a time; the entry may be one block."""

    def finish(self) -> FileRecord:
        """Complete the file, force it to the disk, compare what it gives back, and say what it is."""


class HashedFile:
    """A file of the stage that notices if the disk gives back something else than what was written."""

    def __init__(self, output: OutputDirectory, name: str) -> None:
        self._file = output.create(name)
        self._digest = hashlib.sha256()
        self._sums = ColumnSums()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._digest.update(data)
        self._sums.update(data)
        self._file.write(data)

    def finish(self) -> FileRecord:
        """Force the file to the disk, read it again, close it.

        Raises:
            WriteError: it holds something else.
        """
        nbytes = self._file.nbytes
        [found] = self._file.read_back([nbytes], ColumnSums)
        if found != self._sums.hexdigest():
            raise WriteError("what was read back differs from what was written", file=self._file.path)
        return FileRecord(nbytes, self._digest.hexdigest(), nbytes)


def write_foreign(
    directory: str | os.PathLike[str],
    config: GPTJConfig,
    read: Callable[[TensorSpec], NDArray[Any]],
    writer: type[WeightsWriter],
    *,
    file_name: str,
    dialect: Dialect,
    dtype_of: Callable[[str], str],
    head: Head = "causal_lm",
    index_prefix: str = "",
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    weights_format: str = "",
    account: Account | None = None,
    fs: FileSystem | None = None,
) -> Path:
    """The directory, written whole: config.json, the weights, an index where they are in several files, manifest.json.

    Args:
        directory: where; its parent must exist.
        config, head: the model.
        read: gives the tensor of a row; called once a row.
        writer: the container.
        file_name: of the weights, `flax_model.msgpack`; shards and index are named after it.
        dialect: how arrays are spelt and turned.
        dtype_of: the dtype to store a canonical tensor in.
        index_prefix: what the index puts before each name.
        max_shard_bytes: weights of more bytes than this are cut into several files.
        extra_files: further files by name, as a tokenizer's.
        overwrite: whether a checkpoint of this format at `directory` may be replaced.
        progress: told the name and bytes of each tensor when it has been written.
        allow_overflow, allow_nonfinite: write what became infinite in a narrowing cast; NaN and infinity.
        weights_format: what the manifest calls the format; the dialect if empty.
        account: what else the manifest says, and whether to go on from what a killed writer left.
        fs: the system calls, for tests.

    Raises:
        WriteError, SchemaError, InputError: as for `gptj.writing.checkpoint_writer.write_checkpoint`.
    """
    check_head_and_size(head, max_shard_bytes)
    fate = _fate_for(file_name)
    extra = dict(extra_files or {})
    check_extra_files(extra, lambda name: fate(name) != "keep")
    account = account or Account()
    entries = _entries(config, head, dialect, dtype_of)
    shards = _cut(entries, max_shard_bytes)
    names = _names(file_name, len(shards))
    rules = WritingRules(max_shard_bytes, allow_overflow, allow_nonfinite)
    dtypes = [entry.dtype.name for entry in entries]
    order = [config.to_json(), head, file_name, max_shard_bytes, dtypes]
    parts = [
        ((name,), [(entry.row, entry.dtype.name, (name,)) for entry in shard])
        for name, shard in zip(names, shards, strict=True)
    ]
    with (
        OutputDirectory(directory, overwrite=overwrite, fate=fate, adopt=account.adopt, fs=fs) as output,
        Recorder(output, weights_format or dialect, order, parts, rules, account) as recorder,
    ):
        finished = recorder.resume()
        output.require_space(sum(entry.nbytes for shard in shards[finished:] for entry in shard))
        for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
            file = writer(output, name, shard, head) if number >= finished else None
            for entry in shard:
                if file is not None:
                    file.add(entry, _blocks_of(entry, recorder.store(entry.row, read(entry.row), entry.dtype, (name,))))
                if progress is not None:
                    progress(entry.row.name, 0 if file is None else entry.nbytes)
            if file is not None:
                recorder.finish_part({name: file.finish()})
        if len(shards) > 1:
            places = {index_prefix + e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
            total = sum(entry.nbytes for entry in entries)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            recorder.write_file(f"{file_name}.index.json", (json.dumps(index, indent=2) + "\n").encode())
        recorder.write_file(CONFIG_FILE, written_config(config, head, dtypes).to_json().encode())
        for name, data in extra.items():
            recorder.write_file(name, data)
        recorder.write_manifest(config, schema(config, head))
        output.commit()
    return Path(directory)


def plan_foreign(
    config: GPTJConfig,
    *,
    file_name: str,
    dialect: Dialect,
    dtype_of: Callable[[str], str],
    head: Head,
    max_shard_bytes: int,
) -> tuple[PlannedFile, ...]:
    """The weights files that `write_foreign` would write."""
    check_head_and_size(head, max_shard_bytes)
    shards = _cut(_entries(config, head, dialect, dtype_of), max_shard_bytes)
    return tuple(
        PlannedFile(name, len(shard), sum(entry.nbytes for entry in shard))
        for name, shard in zip(_names(file_name, len(shards)), shards, strict=True)
    )


def _names(file_name: str, count: int) -> list[str]:
    """What `count` weights files are called."""
    stem, suffix = file_name.rsplit(".", 1)
    if count == 1:
        return [file_name]
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]


def _entries(config: GPTJConfig, head: Head, dialect: Dialect, dtype_of: Callable[[str], str]) -> list[Entry]:
    """What to write, in an order in which names with the same beginning stand together."""
    rows = schema(config, head)
    entries = [Entry(row, _with_prefix(row, head, dialect), numpy_dtype(dtype_of(row.name))) for row in rows]
    if dialect == "pt":
        return entries
    place = {part: n for n, part in enumerate(dict.fromkeys(p for e in entries for p in e.name.split("/")))}
    return sorted(entries, key=lambda entry: [place[part] for part in entry.name.split("/")])


def _with_prefix(row: TensorSpec, head: Head, dialect: Dialect) -> Spelling:
    """A base model's variables are called transformer/... in TensorFlow, and only there."""
    if head == "base" and dialect == "tf":
        return spell("transformer." + row.name, dialect)
    return spell(row.name, dialect)


def _cut(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Runs of entries of at most so many bytes each, or of one entry."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def _fate_for(file_name: str) -> Callable[[str], Fate]:
    """Our own format's files are replaced; another checkpoint's are a reason not to; the rest is kept."""
    stem, suffix = file_name.rsplit(".", 1)
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
    weights = re.compile(r".*\.(bin|h5|msgpack|safetensors)(\.index\.json)?")

    def fate(name: str) -> Fate:
        if ours.fullmatch(name) or name in (CONFIG_FILE, MANIFEST_FILE):
            return "replace"
        return "refuse" if weights.fullmatch(name) else "keep"

    return fate


def _blocks_of(entry: Entry, values: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of a canonical tensor in the format's layout; where it must be turned, some rows at a time."""
    if not entry.spelling.transposed:
        yield values.reshape(-1).view(np.uint8).data
        return
    rows = max(1, BLOCK_BYTES // (entry.shape[1] * entry.dtype.itemsize))
    for at in range(0, entry.shape[0], rows):
        part = values[:, at : at + rows]
        turned = np.empty(part.shape[::-1], entry.dtype)
        copy_transposed(turned, part)
        yield turned.reshape(-1).view(np.uint8).data
