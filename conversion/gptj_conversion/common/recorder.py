"""What is noted of an output while it is written, whatever its format; at the end it is manifest.json.

A format's writer hands in each canonical tensor and gets it back as it is to be stored: checked, cast, counted and
hashed in the schema's layout, before the format cuts or turns it. So the manifests of one model agree tensor by tensor
in every format. The writer says which files hold a tensor and when files are finished; the notes on those, in the
stage, are what a later writer can go on from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.errors import FormatError, SchemaError
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
from gptj.schema import TensorSpec
from gptj.writing.journal import Journal, Note, PlannedPart, PlannedTensor, remove_all_but, say_kept
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.weights_writer import BlockTally, WritingRules, native, record_tensor, stored_blocks
from gptj_conversion.common.source import Source

__all__ = ["Account", "Part", "Recorder", "canonical_tensors"]

Part = tuple[tuple[str, ...], Sequence[tuple[TensorSpec, str, tuple[str, ...]]]]
"""Files, and the rows that are stored with them: each with its dtype and the files that hold it."""


@dataclasses.dataclass(frozen=True)
class Account:
    """What a writer is told for the manifest; see `gptj.writing.checkpoint_writer.write_checkpoint` for each.

    `reopen` opens what was written, in its format, so that what a killed writer noted can be held to it.
    """

    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Callable[[TensorSpec], Origin] | None = None
    examine: Callable[[Path], Fingerprint | None] | None = None
    reopen: Callable[[Path], Source] | None = None
    input_identity: Any = None
    resume: bool = False

    @property
    def adopt(self) -> Callable[[list[str]], bool] | None:
        """Which stage of a killed writer is to be continued; for `OutputDirectory`."""
        return Journal.has_notes if self.resume else None


class Recorder:
    """`with Recorder(...) as recorder:` store the tensors, note the finished parts, then `write_manifest`.

    Args:
        output: the directory in the making.
        weights_format: what `--to` calls it.
        order: everything besides the input that the output's bytes depend on; anything that JSON can say.
        parts: what is finished together: files by name, and the rows that are stored, in which dtype and files.
        rules: which values are let through.
        account: what else the manifest says.
    """

    def __init__(
        self,
        output: OutputDirectory,
        weights_format: str,
        order: Any,
        parts: Sequence[Part],
        rules: WritingRules,
        account: Account,
    ) -> None:
        self.output = output
        self.weights_format = weights_format
        self.rules = rules
        self.account = account
        self.parts = parts
        identity = account.input_identity
        self.journal = None if identity is None else Journal(weights_format, order, rules, identity)
        self.files: dict[str, FileRecord] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self._noted: set[str] = set()
        self._kept: set[str] = set()
        self._parts = 0

    def __enter__(self) -> Recorder:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gptj-hash")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    def resume(self) -> int:
        """How many parts of the work another writer has finished, which are kept; to be asked before any is begun."""
        journal = self.journal
        if journal is None or not self.account.resume:
            return 0

        def accept(number: int) -> bool:
            if number > len(self.parts):
                return False
            note = journal.accept_whole_files(self.output, number, self._planned(self.parts[number - 1]))
            if note is not None:
                self.files |= note.files
                self.tensors |= note.tensors
            return note is not None

        self._parts = journal.take_over(self.output, accept)
        notes = {f"shard-{number}.journal" for number in range(1, self._parts + 1)}
        remove_all_but(self.output, {*notes, *self.files})
        if self.output.adopted:
            say_kept(self.output, len(self.files))
        self._noted = set(self.tensors)
        self._kept = set(self.tensors)
        return self._parts

    def _planned(self, part: Part) -> PlannedPart:
        """A part with what the records of its tensors must say."""
        files, rows = part
        origin = self.account.origin
        return PlannedPart(
            files,
            tuple(
                PlannedTensor(row, dtype, places, None if origin is None else origin(row))
                for row, dtype, places in rows
            ),
        )

    def store(
        self, row: TensorSpec, values: NDArray[Any], dtype: np.dtype[Any], files: tuple[str, ...]
    ) -> NDArray[Any]:
        """The tensor as it is to be stored, C-contiguous in its canonical layout, after it has been recorded.

        Raises:
            SchemaError: it has another shape, is not finite, or overflows.
        """
        if values.shape != row.shape:
            raise SchemaError("wrong shape", where=row.name, expected=row.shape, found=values.shape)
        tally = BlockTally(row.name, native(values.dtype), dtype, self.rules)
        as_it_is = values.dtype == dtype and values.flags.c_contiguous
        stored = values if as_it_is else np.empty(row.shape, dtype)
        target = stored.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256()
        hashing: Future[None] | None = None
        at = 0
        for block in stored_blocks(values, dtype, tally):
            if not as_it_is:
                target[at : at + len(block)] = block
            at += len(block)
            if hashing is not None:
                hashing.result()
            hashing = self._threads.submit(digest.update, block)
        if hashing is not None:
            hashing.result()
        self.tensors[row.name] = record_tensor(self.output, row, files, digest.hexdigest(), tally, self.account.origin)
        return stored

    def finish_part(self, files: Mapping[str, FileRecord]) -> None:
        """Note that these files are on the disk, with every tensor that was stored since the last part."""
        self.files |= files
        fresh = {name: record for name, record in self.tensors.items() if name not in self._noted}
        self._noted |= fresh.keys()
        self._parts += 1
        if self.journal is not None:
            self.journal.write(self.output, self._parts, Note(self._parts - 1, self._parts, files, fresh))

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file, and record it."""
        self.files[name] = FileRecord(len(data), self.output.write_file(name, data), len(data))

    def write_manifest(self, config: GPTJConfig, rows: tuple[TensorSpec, ...]) -> None:
        """Examine what was written, and write manifest.json; the last thing before the directory is committed."""
        self._require_kept(rows)
        fingerprint = None if self.account.examine is None else self.account.examine(self.output.stage)
        manifest = Manifest(
            tool_name(),
            config.architecture_sha256,
            dict(sorted(self.files.items())),
            {row.name: self.tensors[row.name] for row in rows},
            dict(self.account.provenance),
            fingerprint,
            self.weights_format,
        )
        self.output.write_file(MANIFEST_FILE, manifest.to_json().encode())
        if self.journal is not None:
            self.journal.clear(self.output, self._parts)

    def _require_kept(self, rows: tuple[TensorSpec, ...]) -> None:
        """Read the tensors that another writer wrote, and compare them with what it noted.

        Raises:
            FormatError: one has another hash or other values, so the note lied.
        """
        if not self._kept or self.account.reopen is None:
            return
        found = canonical_tensors(self.account.reopen(self.output.stage), rows)
        for name in sorted(self._kept):
            record = self.tensors[name]
            if examine_tensor(found[name]) != (record.sha256, record.values):
                raise FormatError(
                    "is not what the journal of the killed writer says",
                    file=self.output.target,
                    where=name,
                    hint="Nothing is kept of it now: convert again",
                )


def canonical_tensors(source: Source, rows: Iterable[TensorSpec]) -> dict[str, FoundTensor]:
    """The canonical tensors of an opened directory, through its format's reader; one is in memory at a time."""

    def blocks(row: TensorSpec) -> Iterator[memoryview]:
        yield source.read(row).reshape(-1).view(np.uint8).data

    return {row.name: FoundTensor(source.dtype_of(row.name), row.shape, functools.partial(blocks, row)) for row in rows}
