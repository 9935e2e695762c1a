"""What a writer notes of the weights files that it has finished, so that a later one can go on from there.

The notes lie in the stage, one beside each finished file, and are removed before the stage is swapped in. A note
carries the hash of the whole order (input, config, dtype, sizes); under another order the work begins anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gptj.errors import GPTJError
from gptj.json_file import read_json_object
from gptj.manifest import FileRecord, TensorRecord
from gptj.output_directory import OutputDirectory
from gptj.weight_files import LARGEST_INDEX_BYTES

__all__ = ["Journal", "Note", "say_kept", "stage_file"]

_log = logging.getLogger("gptj")

_NOTE = re.compile(r"shard-\d+\.journal")
_FINAL = re.compile(r"model(-(?P<number>\d{5})-of-\d{5})?\.safetensors")


@dataclasses.dataclass(frozen=True)
class Note:
    """What was finished together, one file or several side by side.

    Attributes:
        first, stop: which part of the work it was, in the writer's own count.
        files: what they are, by their names in the stage.
        tensors: what is in them.
    """

    first: int
    stop: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]


class Journal:
    """The notes of one order.

    Args:
        order: everything that the output's bytes depend on; anything that JSON can say.
    """

    def __init__(self, order: Any) -> None:
        self.order_sha256 = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def has_notes(names: Sequence[str]) -> bool:
        """Whether a stage with files of these names has something to go on from."""
        return any(_NOTE.fullmatch(name) for name in names)

    def write(self, output: OutputDirectory, number: int, note: Note) -> None:
        """Note that part `number` of the work is finished."""
        members = {"order": self.order_sha256, **dataclasses.asdict(note)}
        output.write_file(f"shard-{number}.journal", json.dumps(members).encode())

    def read(self, stage: Path, number: int) -> Note | None:
        """The note on part `number`; None where there is none, or none of this order."""
        path = stage / f"shard-{number}.journal"
        if not path.exists():
            return None
        try:
            members = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES)
            if members["order"] != self.order_sha256:
                return None
            tensors = {name: TensorRecord.from_dict(record) for name, record in members["tensors"].items()}
            files = {name: FileRecord(**record) for name, record in members["files"].items()}
            return Note(members["first"], members["stop"], files, tensors)
        except (GPTJError, AttributeError, KeyError, TypeError):
            return None  # cut short by whatever stopped its writer

    def take_over(self, output: OutputDirectory) -> list[Note]:
        """The notes in an adopted stage whose files, hashed again, are what they say; the rest of it is removed.

        For writers whose files have their final names in the stage, and records of all of their bytes.
        """
        notes: list[Note] = []
        kept: set[str] = set()
        while True:
            note = self.read(output.stage, len(notes) + 1)
            if note is None or not all(_holds(output, name, record) for name, record in note.files.items()):
                break
            notes.append(note)
            kept |= {f"shard-{len(notes)}.journal", *note.files}
        folders = {str(above) for name in kept for above in PurePosixPath(name).parents}
        for name in output.adopted:
            if name not in kept | folders:
                output.remove(name)
        if output.adopted:
            say_kept(output, sum(len(note.files) for note in notes))
        return notes

    def clear(self, output: OutputDirectory, count: int) -> None:
        """Remove the notes on the first `count` parts."""
        for number in range(1, count + 1):
            output.remove(f"shard-{number}.journal")


def say_kept(output: OutputDirectory, count: int) -> None:
    """Say how much of another writer's work was kept."""
    kept_or_not = f"{count} finished weights file(s) kept" if count else "begun anew: other input or options"
    _log.warning("%s: %s", output.target, kept_or_not)


def _holds(output: OutputDirectory, name: str, record: FileRecord) -> bool:
    """Whether a file of the stage is what its record says, all of its bytes."""
    if name not in output.adopted:
        return False
    file = output.reopen(name)
    [found] = file.read_back([record.nbytes], hashlib.sha256)
    return found == record.sha256 and file.nbytes == record.nbytes == record.hashed_bytes


def stage_file(names: Sequence[str], number: int) -> str | None:
    """The name that shard `number` has in a stage: shard-`number`, or the one it was given just before the end.

    >>> stage_file(["shard-1.journal", "model-00001-of-00002.safetensors"], 1)
    'model-00001-of-00002.safetensors'
    """
    for name in names:
        final = _FINAL.fullmatch(name)
        if name == f"shard-{number}" or (final and int(final["number"] or 1) == number):
            return name
    return None
