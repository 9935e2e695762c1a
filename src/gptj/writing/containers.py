"""Weights files in the making: each takes arrays one after the other, and is compared with the disk when it is full."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from gptj.config.schema import Head, TensorSpec
from gptj.errors import WriteError
from gptj.reading.manifest import FileRecord
from gptj.writing.column_sums import ColumnSums
from gptj.writing.output_directory import OutputDirectory

__all__ = ["Container", "Entry", "HashedFile", "NamedContainer"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a weights file, as the file spells it and lays it out.

    Attributes:
        row: the canonical tensor.
        dtype: that it is stored in.
        name: the array's.
        transposed: whether the axes stand the other way round.
    """

    row: TensorSpec
    dtype: np.dtype[Any]
    name: str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.row.shape[::-1] if self.transposed else self.row.shape

    @property
    def nbytes(self) -> int:
        """The array's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Container(Protocol):
    """Writes one weights file."""

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next entry's bytes, which are in C order, some rows at a time, and take all of them."""

    def finish(self) -> FileRecord:
        """Complete the file, force it to the disk, compare what it gives back, and say what it is."""


class NamedContainer(Container, Protocol):
    """One that must know its arrays before: made with the stage, the file's name, its entries and the model's head."""

    def __init__(self, output: OutputDirectory, name: str, entries: Sequence[Entry], head: Head) -> None: ...


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
