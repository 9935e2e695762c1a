"""Notes of a writer on the weights files that it has finished, so that a later one can go on from there.

The notes lie in the stage, one beside each finished file, and are removed before the stage is swapped in. A note
carries the hash of the whole order (input, config, dtype, sizes, rules); under another order the work begins anew. It
is a file like any other, which somebody may have edited: nothing in it is believed that does not follow from the
order, or is not found on the disk when all of it is read again. From the first note that is not believed, the work is
done anew, and that is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from gptj.config.schema import TensorSpec
from gptj.errors import FormatError, GPTJError, InputError, naming_file, shown
from gptj.paths.json_file import read_json_object
from gptj.reading.manifest import FileRecord, Origin, TensorRecord, hash_of_start, tool_name
from gptj.reading.manifest_records import file_record, records_of, tensor_record
from gptj.reading.tally import is_narrowing
from gptj.reading.weight_files import LARGEST_INDEX_BYTES
from gptj.writing.output_directory import OutputDirectory

__all__ = [
    "Journal",
    "Note",
    "PlannedPart",
    "PlannedTensor",
    "WritingRules",
    "compare_start",
    "remove_all_but",
    "say_kept",
    "stage_file",
    "whole_files",
]

_log = logging.getLogger("gptj")

_NOTE = re.compile(r"shard-\d+\.journal")
_FINAL = re.compile(r"model(-(?P<number>\d{5})-of-\d{5})?\.safetensors")


@dataclasses.dataclass(frozen=True)
class WritingRules:
    """How weights are written: when a file is full, and which values are let through."""

    max_shard_bytes: int
    allow_overflow: bool
    allow_nonfinite: bool


@dataclasses.dataclass(frozen=True)
class Note:
    """The record of a finished part of the work, one file or several side by side.

    Attributes:
        first, stop: which part of the work it was, in the writer's own count.
        files: what they are, by their names in the stage.
        tensors: what is in them.
    """

    first: int
    stop: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor as its record must have it: its row, the dtype (None: as it came), its files and its origin."""

    row: TensorSpec
    dtype: str | None
    files: tuple[str, ...]
    origin: Origin | None

    def check(self, record: TensorRecord, rules: WritingRules) -> None:
        """Make sure that a record could be this tensor's.

        Raises:
            FormatError: a member is another than the order and the rules allow.
        """
        values, cast = record.values, record.cast
        over = 0 if cast is None else cast.overflowed
        facts = {
            "files": (record.files, self.files),
            "dtype": (record.dtype, self.dtype or record.dtype),
            "shape": (record.shape, self.row.shape),
            "origin": (record.origin, self.origin),
        }
        for member, (found, expected) in facts.items():
            if found != expected:
                raise FormatError(f"is not what is written: {member}", where=self.row.name, expected=shown(expected),
                                  found=shown(found))  # fmt: skip
        narrowed = cast is None or is_narrowing(cast.source_dtype, record.dtype)
        counted = 0 if cast is None else max(over, cast.underflowed)
        if not narrowed or counted > self.row.size or over > values.inf or (over and not rules.allow_overflow):
            raise FormatError("is not what is written: cast", where=self.row.name, found=shown(cast))
        if values.nan + values.inf > (self.row.size if rules.allow_nonfinite else over):
            raise FormatError("is not what is written: values", where=self.row.name, found=shown(values))


@dataclasses.dataclass(frozen=True)
class PlannedPart:
    """The expected result of a part of the work: files, by the names that its note has for them, and tensors."""

    files: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]

    def check(self, note: Note, rules: WritingRules) -> None:
        """Make sure that a note could be this part's.

        Raises:
            FormatError: it speaks of other files or tensors, or of others than the rules allow.
        """
        for member, found, expected in (
            ("files", [*note.files], [*self.files]),
            ("tensors", [*note.tensors], [planned.row.name for planned in self.tensors]),
        ):
            if sorted(found) != sorted(expected):
                raise FormatError("breaks its rule", where=member, expected=shown(expected), found=shown(found))
        for planned in self.tensors:
            planned.check(note.tensors[planned.row.name], rules)


class Journal:
    """The notes of one order: what all that the output's bytes depend on comes to.

    Args:
        weights_format: what is written.
        order: what else the bytes depend on besides the input; anything that JSON can say.
        rules: how they are written.
        input_identity: what the tensors are read from; anything that JSON can say.

    Raises:
        InputError: JSON cannot say it.
    """

    def __init__(self, weights_format: str, order: Any, rules: WritingRules, input_identity: Any) -> None:
        key = [tool_name(), weights_format, order, dataclasses.asdict(rules), input_identity]
        try:
            text = json.dumps(key, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise InputError(f"not JSON: {error}", where="input_identity") from None
        self.order_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.rules = rules

    @staticmethod
    def has_notes(names: Sequence[str]) -> bool:
        """Whether a stage with files of these names has something to go on from."""
        return any(_NOTE.fullmatch(name) for name in names)

    def write(self, output: OutputDirectory, number: int, note: Note) -> None:
        """Note that part `number` of the work is finished."""
        members = {"order": self.order_sha256, **dataclasses.asdict(note)}
        members["seal"] = _seal(members)
        output.write_file(f"shard-{number}.journal", json.dumps(members).encode())

    def read(self, output: OutputDirectory, number: int) -> Note | None:
        """The note on part `number`; None where there is none, or none of this order.

        Raises:
            FormatError, LimitError: it is no note that this writer would have left.
        """
        name = f"shard-{number}.journal"
        if name not in output.adopted:
            return None
        path = output.stage / name
        if not output.is_file(name):
            raise FormatError("not a regular file", file=path)
        members = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES)
        with naming_file(path):
            if members.get("order") != self.order_sha256:
                return None
            if members.pop("seal", None) != _seal(members) or members.keys() != _MEMBERS:
                raise FormatError("was edited, or was not finished")
            files = records_of(members["files"], "files", file_record)
            tensors = records_of(members["tensors"], "tensors", tensor_record)
            for member in ("first", "stop"):
                if type(members[member]) is not int:
                    raise FormatError("breaks its rule", where=member, found=shown(members[member]))
            return Note(members["first"], members["stop"], files, tensors)

    def take_over(self, output: OutputDirectory, accept: Callable[[int], bool]) -> int:
        """How many parts of an adopted stage are kept.

        Args:
            output: the directory in the making, with the adopted stage.
            accept: takes the part of this number in, and says whether there was one. An error says that it is not
                to be believed; what is not believed, and all that follows it, is done anew.
        """
        count = 0
        try:
            while accept(count + 1):
                count += 1
        except GPTJError as error:
            _log.warning("%s: not believed, so from there on all is made anew: %s", output.target, error)
        return count

    def check(self, output: OutputDirectory, number: int, note: Note, part: PlannedPart) -> None:
        """Make sure that the note on part `number` could be the planned part's.

        Raises:
            FormatError: it speaks of something else.
        """
        with naming_file(output.stage / f"shard-{number}.journal"):
            if (note.first, note.stop) != (number - 1, number):
                raise FormatError("breaks its rule", where="first, stop", found=shown((note.first, note.stop)))
            part.check(note, self.rules)

    def accept_whole_files(self, output: OutputDirectory, number: int, part: PlannedPart) -> Note | None:
        """The note on part `number`, whose files have their final names in the stage, after they were hashed again.

        Raises:
            FormatError, LimitError: the note is not what the part or the files are.
        """
        note = self.read(output, number)
        if note is None:
            return None
        self.check(output, number, note, part)
        for name, record in note.files.items():
            if record.hashed_bytes != record.nbytes:
                raise FormatError("is not what its journal says", file=output.stage / name)
            compare_start(output, name, record)
        return note

    def clear(self, output: OutputDirectory, count: int) -> None:
        """Remove the notes on the first `count` parts."""
        for number in range(1, count + 1):
            output.remove(f"shard-{number}.journal")


_MEMBERS = {"order", *(field.name for field in dataclasses.fields(Note))}


def _seal(members: Mapping[str, Any]) -> str:
    """The hash of a note's other members: one that was cut short, edited or mixed is noticed."""
    return hashlib.sha256(json.dumps(members, sort_keys=True).encode()).hexdigest()


def whole_files(output: OutputDirectory, parts: Sequence[PlannedPart]) -> Callable[[Journal, int], Note | None]:
    """Gives the notes on these parts, each of files that have their final names and are hashed as a whole."""

    def accept(journal: Journal, number: int) -> Note | None:
        return journal.accept_whole_files(output, number, parts[number - 1]) if number <= len(parts) else None

    return accept


def compare_start(output: OutputDirectory, name: str, record: FileRecord) -> None:
    """Make sure that a file of an adopted stage is of the noted size, and begins with the bytes that were hashed.

    Raises:
        FormatError: it is another, or no regular file.
    """
    path = output.stage / name
    if not output.is_file(name):
        raise FormatError("is no regular file, as its journal says", file=path)
    if hash_of_start(path, record.hashed_bytes) != (record.nbytes, record.sha256):
        raise FormatError("is not what its journal says", file=path)


def remove_all_but(output: OutputDirectory, kept: set[str]) -> None:
    """Remove everything of an adopted stage but the files that are kept, and the folders that these are in."""
    folders = {str(above) for name in kept for above in PurePosixPath(name).parents}
    for name in output.adopted:
        if name not in kept | folders:
            output.remove(name)


def say_kept(output: OutputDirectory, count: int) -> None:
    """Say how much of another writer's work was kept."""
    kept_or_not = (
        f"{count} finished weights file(s) kept" if count else "begun anew: other input or options, or other files"
    )
    _log.warning("%s: %s", output.target, kept_or_not)


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
