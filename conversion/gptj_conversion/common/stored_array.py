"""An array that lies in a file of any format: where its bytes are, and how to read them some rows at a time.

Every reader of named formats ends in these: a pickle, a msgpack tree, an HDF5 file and a safetensors header all
say in the end which bytes of which file are which numbers. So the bytes are read by one function, whatever said
where they are, and never more than a block of them beside the tensor that is being made.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj.errors import FormatError, LimitError
from gptj.reading.buffers import ReusedBuffer
from gptj.reading.files import FileIdentity, file_identity, open_regular_file, read_into
from gptj.reading.safetensors_file import cast
from gptj_conversion.common.transpose import copy_transposed

__all__ = ["DTYPES", "Checksum", "StoredArray"]

BLOCK_BYTES = 8 * 2**20
MOST_DIMENSIONS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes that an array beside or among the weights may have, by NumPy's name."""


@dataclasses.dataclass
class Checksum:
    """The CRC-32 that a run of a file's bytes must have.

    Attributes:
        begin, nbytes: the run.
        crc32: its checksum.
        compared: whether all of it has been read and found to be right, for arrays that are parts of it.
    """

    begin: int
    nbytes: int
    crc32: int
    compared: bool = False

    def require(self, found: int, *, file: Path, where: str) -> None:
        """Raise FormatError unless `found` is the checksum."""
        if found != self.crc32:
            raise FormatError(
                "its bytes have another checksum",
                file=file,
                where=where,
                expected=f"CRC-32 {self.crc32:08x}",
                found=f"{found:08x}",
                hint="The file is damaged; fetch it again",
            )
        self.compared = True

    def compare(self, stream: BinaryIO, *, file: Path, where: str) -> None:
        """Read the whole run and compare it."""
        buffer, found = memoryview(bytearray(min(self.nbytes, BLOCK_BYTES))), 0
        for at in range(0, self.nbytes, BLOCK_BYTES):
            part = buffer[: min(BLOCK_BYTES, self.nbytes - at)]
            read_into(stream, part, self.begin + at, file=file, where=where)
            found = zlib.crc32(part, found)
        self.require(found, file=file, where=where)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """The place of an array; nothing of it has been read.

    Attributes:
        name: as the format spells it.
        dtype: of its values in memory.
        shape: the size of each axis.
        file: the file that holds it.
        identity: the file's, when it was opened; data is taken from no other.
        extents: its bytes, as (first byte, length) in turn; one unless the format cuts large arrays.
        swapped: the file has the other byte order.
        reversed_axes: its bytes are in column-major order.
        checksum: of the run of bytes that holds it, where the format has one; compared when it is read.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    identity: FileIdentity
    extents: tuple[tuple[int, int], ...]
    swapped: bool = False
    reversed_axes: bool = False
    checksum: Checksum | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self,
        dtype: np.dtype[Any],
        *,
        transposed: bool = False,
        where: str = "",
        allow_overflow: bool = False,
        buffer: ReusedBuffer | None = None,
    ) -> NDArray[Any]:
        """The array in `dtype`, transposed if asked.

        Args:
            dtype: a dtype of weights.
            transposed: return it with its two axes swapped.
            where: what errors name, besides the file; the array's name if empty.
            allow_overflow: let a narrowing cast turn finite values into infinity.
            buffer: whose memory to take; None takes new.

        Raises:
            FormatError: the file changed or ends too early.
            SchemaError: a value overflows `dtype`.
            LimitError: there is not enough memory.
        """
        where = where or self.name
        shape = self.shape[::-1] if transposed else self.shape
        try:
            out = (buffer or ReusedBuffer()).array(shape, dtype)
        except (MemoryError, ValueError):
            gigabytes = math.prod(shape) * dtype.itemsize / 1e9
            raise LimitError(
                f"needs {gigabytes:.3g} GB of memory, more than there is", file=self.file, where=where
            ) from None
        # In the order of the bytes; a column-major array is a row-major one with its axes in reverse.
        place = out if transposed == self.reversed_axes else out.T
        in_order = place.shape == (self.shape[::-1] if self.reversed_axes else self.shape)
        assert in_order
        rows_first = place.reshape(1) if place.ndim == 0 else place
        for start, block in self._rows(rows_first.shape):
            values = cast(block, dtype, where=where, file=self.file, allow_overflow=allow_overflow)
            target = rows_first[start : start + len(block)]
            if target.flags.c_contiguous:
                target[...] = values
            else:
                copy_transposed(target.T, values)
        return out

    def holds_same(self, other: StoredArray, *, transposed: bool = False) -> bool:
        """Whether `other`, of the same dtype, has the same bits, or its transpose; read in tiles of some megabytes.

        Raises:
            FormatError: a file changed, ends too early, or has another checksum.
        """
        if (self.dtype, self.shape) != (other.dtype, other.shape[::-1] if transposed else other.shape):
            return False
        if (self.file, self.extents, self.reversed_axes) == (other.file, other.extents, other.reversed_axes) and (
            not transposed
        ):
            return True
        turned = transposed != (self.reversed_axes != other.reversed_axes)
        shape = self.shape[::-1] if self.reversed_axes else self.shape
        with open_regular_file(self.file) as one, open_regular_file(other.file) as two:
            for array, stream in ((self, one), (other, two)):
                array._require_unchanged(file_identity(stream))
                if array.checksum is not None and not array.checksum.compared:
                    array.checksum.compare(stream, file=array.file, where=array.name)
            size = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * self.dtype.itemsize))
            for start in range(0, shape[0], size):
                stop = min(start + size, shape[0])
                mine = self._part(one, shape, start, stop)
                if turned:
                    theirs = other._columns(two, shape[::-1], start, stop).T
                else:
                    theirs = other._part(two, shape, start, stop)
                bits = f"u{self.dtype.itemsize}"
                if not np.array_equal(mine.view(bits), theirs.view(bits)):
                    return False
            for array, stream in ((self, one), (other, two)):
                array._require_unchanged(file_identity(stream))
        return True

    def _part(self, stream: BinaryIO, shape: tuple[int, ...], start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` in the order of the bytes, of which `shape` says how many a row has."""
        block = np.empty((stop - start, *shape[1:]), self.dtype)
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        return self._fill(stream, block, start * row_bytes)

    def _columns(self, stream: BinaryIO, shape: tuple[int, ...], start: int, stop: int) -> NDArray[Any]:
        """Columns `start` to `stop` of a matrix, in the order of the bytes: a short read a row."""
        block = np.empty((shape[0], stop - start), self.dtype)
        for number, row in enumerate(block):
            self._fill(stream, row, (number * shape[1] + start) * self.dtype.itemsize)
        return block

    def _fill(self, stream: BinaryIO, block: NDArray[Any], begin: int) -> NDArray[Any]:
        """The block, with the array's bytes from `begin` on."""
        view = block.reshape(-1).view(np.uint8).data
        for offset, part in self._locate_bytes(begin, len(view)):
            read_into(stream, view[:part], offset, file=self.file, where=self.name)
            view = view[part:]
        if self.swapped:
            block.view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
        return block

    def _rows(self, shape: tuple[int, ...]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Some rows at a time, each with its first row's number; a block is overwritten by the next."""
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        rows = max(1, min(shape[0], BLOCK_BYTES // max(1, row_bytes)))
        buffer = np.empty((rows, *shape[1:]), self.dtype)
        with open_regular_file(self.file) as stream:
            self._require_unchanged(file_identity(stream))
            checksum, found = self.checksum, 0
            is_whole = checksum is not None and self.extents == ((checksum.begin, checksum.nbytes),)
            if checksum is not None and not is_whole and not checksum.compared:
                checksum.compare(stream, file=self.file, where=self.name)
            for start in range(0, shape[0], rows):
                block = buffer[: min(rows, shape[0] - start)]
                view = block.reshape(-1).view(np.uint8).data
                for offset, part in self._locate_bytes(start * row_bytes, len(view)):
                    read_into(stream, view[:part], offset, file=self.file, where=self.name)
                    found = zlib.crc32(view[:part], found) if is_whole else found
                    view = view[part:]
                if self.swapped:
                    block.view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
                yield start, block
            if checksum is not None and is_whole:
                checksum.require(found, file=self.file, where=self.name)
            self._require_unchanged(file_identity(stream))

    def _locate_bytes(self, begin: int, count: int) -> Iterator[tuple[int, int]]:
        """The places in the file of the array's bytes `begin` to `begin + count`."""
        for offset, length in self.extents:
            if begin < length and count:
                part = min(length - begin, count)
                yield offset + begin, part
                begin, count = 0, count - part
            else:
                begin -= length

    def _require_unchanged(self, found: FileIdentity) -> None:
        if found != self.identity:
            raise FormatError("changed while being read", file=self.file, hint="Open it again when it is complete")
