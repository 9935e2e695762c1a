"""What a writer notes of each weights file that it has finished, so that a later one can go on from there.

The notes lie in the stage, one beside each finished file, and are removed before the stage is swapped in. A note
carries the hash of the whole order (input, config, dtype, sizes); under another order the work begins anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj.errors import GPTJError
from gptj.json_file import read_json_object
from gptj.manifest import FileRecord, TensorRecord
from gptj.output_directory import OutputDirectory
from gptj.weight_files import LARGEST_INDEX_BYTES

__all__ = ["Journal", "Note", "stage_file"]

_NOTE = re.compile(r"shard-\d+\.journal")
_FINAL = re.compile(r"model(-(?P<number>\d{5})-of-\d{5})?\.safetensors")


@dataclasses.dataclass(frozen=True)
class Note:
    """A finished weights file: the rows `first` to `stop`, its header's record, and those rows' records."""

    first: int
    stop: int
    file: FileRecord
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
        """Note that the file shard-`number` is finished."""
        members = {"order": self.order_sha256, **dataclasses.asdict(note)}
        output.write_file(f"shard-{number}.journal", json.dumps(members).encode())

    def read(self, stage: Path, number: int) -> Note | None:
        """The note on shard-`number`; None where there is none, or none of this order."""
        path = stage / f"shard-{number}.journal"
        if not path.exists():
            return None
        try:
            members = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES)
            if members["order"] != self.order_sha256:
                return None
            tensors = {name: TensorRecord.from_dict(record) for name, record in members["tensors"].items()}
            return Note(members["first"], members["stop"], FileRecord(**members["file"]), tensors)
        except (GPTJError, AttributeError, KeyError, TypeError):
            return None  # cut short by whatever stopped its writer

    def clear(self, output: OutputDirectory, count: int) -> None:
        """Remove the notes on `count` files."""
        for number in range(1, count + 1):
            output.remove(f"shard-{number}.journal")


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
