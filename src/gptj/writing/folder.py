"""The one writer of models: what is the same in every format, from a tensor's check to manifest.json.

A format hands in each canonical tensor and gets it back as it is to be stored: checked, cast, counted, hashed in the
schema's layout and shown to an observer, before the format cuts or transposes it. So the manifests of one model agree
tensor by tensor in every format. The format says when files are finished; the notes on those, in the stage, are what a
later writer can go on from. At the end come the small files and the manifest.

Two cores are used: a thread hashes a block while this one counts, sums and writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import FormatError
from gptj.reading.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Fingerprint,
    FoundTensor,
    Manifest,
    Origin,
    TensorRecord,
    examine_tensor,
    tool_name,
)
from gptj.writing.file_system import FileSystem
from gptj.writing.journal import (
    Journal,
    Note,
    PlannedPart,
    PlannedTensor,
    WritingRules,
    remove_all_but,
    say_kept,
)
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.stored_tensor import BlockTally, native, record_tensor, stored_blocks, stored_dtype

__all__ = [
    "FolderWriter",
    "ManifestFacts",
    "Progress",
    "TensorObserver",
    "TensorSource",
    "WritingOptions",
    "WritingOrder",
    "canonical_tensors",
]

_INLINE_BYTES = 2**16  # to hand a block to the other thread costs as long as hashing this much

Progress = Callable[[str, int], None] | None
"""Told the name and stored bytes of each tensor when it has been written."""


class TensorObserver(Protocol):
    """Looks at each tensor as it is stored; `gptj.parity.fingerprint.FingerprintObserver` is one."""

    def see(self, name: str, rows: NDArray[Any], /) -> None:
        """Look at the next rows of a tensor, which stay as they are until `wait_for` returns."""

    def wait_for(self, name: str, /) -> None:
        """Be done with the tensor."""


class TensorSource(Protocol):
    """An opened directory of any format."""

    def dtype_of(self, name: str) -> str:
        """The dtype that a canonical tensor is stored in."""

    def read(self, row: TensorSpec) -> NDArray[Any]:
        """A canonical tensor in its own dtype."""


@dataclasses.dataclass(frozen=True)
class ManifestFacts:
    """Entries of the manifest besides the tensors; see `gptj.writing.checkpoint_writer.write_checkpoint` for each.

    `reopen` opens what was written, in its format, so that what a killed writer noted can be held to it; None where the
    format's own files say enough. `observer` is the `witness` there.
    """

    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Callable[[TensorSpec], Origin] | None = None
    examine: Callable[[Path], Fingerprint | None] | None = None
    reopen: Callable[[Path], TensorSource] | None = None
    input_identity: Any = None
    resume: bool = False
    observer: TensorObserver | None = None

    @property
    def adopt(self) -> Callable[[list[str]], bool] | None:
        """Which stage of a killed writer is to be continued; for `OutputDirectory`."""
        return Journal.has_notes if self.resume else None


@dataclasses.dataclass(frozen=True)
class WritingOptions:
    """Options that the writers of all formats have.

    Attributes:
        max_shard_bytes: weights of more bytes than this are cut into several files, where the format has several.
        extra_files: further files by name, as a tokenizer's.
        overwrite: whether a checkpoint of the same format may be replaced.
        progress: told the name and stored bytes of each tensor when it has been written.
        allow_overflow, allow_nonfinite: write what became infinite in a narrowing cast; NaN and infinity.
        facts: what else the manifest says, and whether to go on from what a killed writer left.
        fs: the system calls, for tests.
    """

    max_shard_bytes: int = 5_000_000_000
    extra_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    overwrite: bool = False
    progress: Progress = None
    allow_overflow: bool = False
    allow_nonfinite: bool = False
    facts: ManifestFacts = dataclasses.field(default_factory=ManifestFacts)
    fs: FileSystem | None = None

    @property
    def rules(self) -> WritingRules:
        """When a file is full, and which values are let through."""
        return WritingRules(self.max_shard_bytes, self.allow_overflow, self.allow_nonfinite)

    def tell(self, name: str, nbytes: int) -> None:
        """Tell of the progress whoever asked for it."""
        if self.progress is not None:
            self.progress(name, nbytes)


@dataclasses.dataclass(frozen=True)
class WritingOrder:
    """An order to write one checkpoint, in any format.

    Attributes:
        weights_format: what `--to` calls it.
        config, head: the model.
        dtypes: what each row of its schema is stored as, by name; None: as it comes.
        rules: when a file is full, and which values are let through.
        facts: what else the manifest says.
        details: what the output's bytes depend on besides all these and the input; anything that JSON can say.
        files_of: the files that hold a tensor, by its name; () where that is known at the end alone.
    """

    weights_format: str
    config: GPTJConfig
    head: Head
    dtypes: Mapping[str, str | None]
    rules: WritingRules
    facts: ManifestFacts
    details: Any = None
    files_of: Callable[[str], tuple[str, ...]] = lambda name: ()

    @functools.cached_property
    def rows(self) -> tuple[TensorSpec, ...]:
        """The schema."""
        return schema(self.config, self.head)

    def origin_of(self, row: TensorSpec) -> Origin | None:
        """Where a tensor comes from, for its record."""
        return None if self.facts.origin is None else self.facts.origin(row)

    def journal(self) -> Journal | None:
        """The notes of this order; None where the input has no identity.

        Raises:
            InputError: JSON cannot say it.
        """
        if self.facts.input_identity is None:
            return None
        key = [self.config.to_json(), self.head, dict(self.dtypes), self.details]
        return Journal(self.weights_format, key, self.rules, self.facts.input_identity)

    def planned_part(self, files: Sequence[str], rows: Iterable[TensorSpec]) -> PlannedPart:
        """Files, as their note is to call them, with what the records of the rows in them must say."""
        tensors = (
            PlannedTensor(row, self.dtypes[row.name], self.files_of(row.name), self.origin_of(row)) for row in rows
        )
        return PlannedPart(tuple(files), tuple(tensors))


class FolderWriter:
    """`with FolderWriter(...) as writer:` store the tensors, finish the parts, then `finish`.

    Attributes:
        notes: what was finished together, one after the other.
        files: the small files.
    """

    def __init__(self, output: OutputDirectory, order: WritingOrder) -> None:
        self.output = output
        self.order = order
        self.journal = order.journal()
        self.notes: list[Note] = []
        self.files: dict[str, FileRecord] = {}
        self._fresh: dict[str, TensorRecord] = {}
        self._kept: set[str] = set()

    def __enter__(self) -> FolderWriter:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gptj-hash")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    # ---- going on from where another stopped

    def resume(self, accept: Callable[[Journal, int], Note | None]) -> int:
        """How many parts another writer has finished, which are kept; to be asked before any is begun.

        Args:
            accept: the note on the part of this number, counted from 1, after its files were read again; None where
                there is none. Everything else in the stage is removed.
        """
        journal = self.journal
        if journal is None or not self.order.facts.resume:
            return 0

        def take(number: int) -> bool:
            note = accept(journal, number)
            if note is not None:
                self.notes.append(note)
                self._kept |= note.tensors.keys()
            return note is not None

        count = journal.take_over(self.output, take)
        kept = {name for note in self.notes for name in note.files}
        remove_all_but(self.output, {*kept, *(f"shard-{number}.journal" for number in range(1, count + 1))})
        if self.output.adopted:
            say_kept(self.output, len(kept))
        return count

    # ---- one tensor

    def store_blocks(self, row: TensorSpec, values: NDArray[Any], dtype: np.dtype[Any] | None) -> Iterator[memoryview]:
        """The tensor's bytes as they are to be stored, some rows at a time; recorded when all have been taken.

        Args:
            row: of the schema.
            values: of the row's shape, in any memory layout or byte order.
            dtype: None: as it comes.

        Raises:
            SchemaError: it has another shape, is not made of floating-point numbers, is not finite, or overflows.
        """
        values = np.asarray(values)
        dtype = stored_dtype(row, values, dtype)
        observer = self.order.facts.observer
        tally = BlockTally(row.name, native(values.dtype), dtype, self.order.rules)
        digest = hashlib.sha256()
        hashing: Future[None] | None = None
        for block in stored_blocks(values, dtype, tally):
            if hashing is not None:
                hashing.result()
            hashing = self._threads.submit(digest.update, block) if len(block) > _INLINE_BYTES else None
            if hashing is None:
                digest.update(block)
            if observer is not None:
                observer.see(row.name, np.frombuffer(block, dtype).reshape(-1, *row.shape[1:]))
            yield block
        if hashing is not None:
            hashing.result()
        if observer is not None:
            observer.wait_for(row.name)
        self._fresh[row.name] = record_tensor(
            row,
            tally,
            target=self.output.target,
            files=self.order.files_of(row.name),
            sha256=digest.hexdigest(),
            origin=self.order.origin_of(row),
        )

    def store(self, row: TensorSpec, values: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
        """The whole tensor as it is to be stored, C-contiguous in its canonical layout; recorded.

        Args and errors: as for `store_blocks`.
        """
        values = np.asarray(values)
        dtype = stored_dtype(row, values, dtype)
        if values.dtype == dtype and values.flags.c_contiguous:
            for _ in self.store_blocks(row, values, dtype):
                pass
            return values
        stored = np.empty(row.shape, dtype)
        target = stored.reshape(-1).view(np.uint8).data
        at = 0
        for block in self.store_blocks(row, values, dtype):
            target[at : at + len(block)] = block
            at += len(block)
        return stored

    # ---- files

    def finish_part(self, files: Mapping[str, FileRecord]) -> None:
        """Note that these files are on the disk, with every tensor that was stored since the last part."""
        at = len(self.notes)
        note = Note(at, at + 1, files, self._fresh)
        self._fresh = {}
        if self.journal is not None:
            self.journal.write(self.output, at + 1, note)
        self.notes.append(note)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file, and record it."""
        self.files[name] = FileRecord(len(data), self.output.write_file(name, data), len(data))

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """The record of each tensor in a finished part."""
        return {name: record for note in self.notes for name, record in note.tensors.items()}

    def finish(self, texts: Mapping[str, bytes], *, in_order: bool = False) -> None:
        """Write the small files, examine what was written, write manifest.json, and swap the directory in.

        Args:
            texts: the small files by name.
            in_order: whether the manifest lists files as they were written, weights first, and not by name.
        """
        for name, data in texts.items():
            self.write_file(name, data)
        tensors = self.tensors
        self._require_kept(tensors)
        facts, order = self.order.facts, self.order
        fingerprint = None if facts.examine is None else facts.examine(self.output.stage)
        files = {name: record for note in self.notes for name, record in note.files.items()} | self.files
        manifest = Manifest(
            tool_name(),
            order.config.architecture_sha256,
            files if in_order else dict(sorted(files.items())),
            {row.name: tensors[row.name] for row in order.rows},
            dict(facts.provenance),
            fingerprint,
            order.weights_format,
        )
        self.output.write_file(MANIFEST_FILE, manifest.to_json().encode())
        if self.journal is not None:
            self.journal.clear(self.output, len(self.notes))
        self.output.commit()

    def _require_kept(self, tensors: Mapping[str, TensorRecord]) -> None:
        """Read the tensors that another writer wrote, and compare them with what it noted.

        Raises:
            FormatError: one has another hash or other values, so the note lied.
        """
        reopen = self.order.facts.reopen
        if not self._kept or reopen is None:
            return
        found = canonical_tensors(reopen(self.output.stage), self.order.rows)
        for name in sorted(self._kept):
            record = tensors[name]
            if examine_tensor(found[name]) != (record.sha256, record.values):
                raise FormatError(
                    "is not what the journal of the killed writer says",
                    file=self.output.target,
                    where=name,
                    hint="Nothing is kept of it now: convert again",
                )


def canonical_tensors(source: TensorSource, rows: Iterable[TensorSpec]) -> dict[str, FoundTensor]:
    """The canonical tensors of an opened directory, through its format's reader; one is in memory at a time."""

    def blocks(row: TensorSpec) -> Iterator[memoryview]:
        yield source.read(row).reshape(-1).view(np.uint8).data

    return {row.name: FoundTensor(source.dtype_of(row.name), row.shape, functools.partial(blocks, row)) for row in rows}
