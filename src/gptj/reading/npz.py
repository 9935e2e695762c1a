"""NumPy's .npz as np.savez writes it: a stored zip of .npy arrays, read strictly and without pickle.

`np.load` reads a header with `ast`, whole members at a time, and pickles where it is allowed to. Here an array
is refused unless its header is the short literal that NumPy writes, its dtype is a plain number (or the
two-byte void that stands for bfloat16), and its member has exactly the bytes that shape and dtype call for.
Data is read some rows at a time; big-endian numbers are turned.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj.errors import (
    FormatError,
    GPTJError,
    LimitError,
    MissingFileError,
    SchemaError,
    UnsafeFileError,
    shown,
)
from gptj.reading.files import read_into
from gptj.reading.stored_zip import StoredZip, ZipMember, open_stored_zip

__all__ = [
    "NpyArray",
    "NpzFile",
    "npy_header",
    "open_named_npz",
    "open_npz",
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGEST_NPY_HEADER_BYTES = 4096
MOST_DIMENSIONS = 8

# A block is read, checked and turned while a core's cache holds it; and so small a buffer is memory that the process
# has already. Measured on a mesh checkpoint: 1.24 CPU s/GB, and 1.99 with blocks of 8 MB.
_BLOCK_BYTES = 2**20

DTYPES: dict[str, np.dtype[Any]] = {
    "f8": np.dtype(np.float64),
    "f4": np.dtype(np.float32),
    "f2": np.dtype(np.float16),
    "i4": np.dtype(np.int32),
    "i8": np.dtype(np.int64),
    "u4": np.dtype(np.uint32),
    "b1": np.dtype(np.bool_),  # of optimizers' states: whether a step was skipped, or the last one finite
    "i1": np.dtype(np.int8),
    "u1": np.dtype(np.uint8),
    "V2": BFLOAT16,  # jax's bfloat16 goes through np.savez as two bytes of nothing in particular
}


@dataclasses.dataclass(frozen=True)
class NpyArray:
    """The place of an array; nothing of it has been read.

    Attributes:
        member: the member of the archive, header included.
        dtype: what its values are in memory.
        swapped: the file has them big-endian.
        shape: the size of each axis.
        header_bytes: how much of the member comes before the data.
        header_crc32: the checksum so far, which the data continues.
    """

    member: ZipMember
    dtype: np.dtype[Any]
    swapped: bool
    shape: tuple[int, ...]
    header_bytes: int
    header_crc32: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class NpzFile:
    """An archive of arrays arr_0, arr_1, ..., in that order, all headers checked."""

    archive: StoredZip
    arrays: tuple[NpyArray, ...]

    @property
    def path(self) -> Path:
        """The archive's path."""
        return self.archive.path

    def rows(self, array: NpyArray) -> Iterator[tuple[int, NDArray[Any]]]:
        """The array, some rows at a time, each with its first row's number; a block is overwritten by the next.

        An array without axes comes as one block of one element.

        Raises:
            FormatError: the file changed, is cut, or its checksum is wrong (known after the last block).
        """
        shape = array.shape or (1,)
        row = math.prod(shape[1:])
        rows = max(1, min(shape[0], _BLOCK_BYTES // max(1, row * array.dtype.itemsize)))
        buffer = np.empty((rows, *shape[1:]), array.dtype)
        crc32 = array.header_crc32
        offset = array.member.offset + array.header_bytes
        with self.archive.open() as stream:
            for start in range(0, shape[0], rows):
                block = buffer[: min(rows, shape[0] - start)]
                view = block.reshape(-1).view(np.uint8).data
                read_into(stream, view, offset, file=self.path, where=array.member.name)
                crc32 = zlib.crc32(view, crc32)
                offset += len(view)
                if array.swapped:
                    block.view(f"u{array.dtype.itemsize}").byteswap(inplace=True)
                yield start, block
        self.archive.require_checksum(array.member, crc32)

    def read(self, array: NpyArray) -> NDArray[Any]:
        """The whole array in memory of its own.

        Raises:
            LimitError: there is not enough memory; and what `rows` raises.
        """
        try:
            out = np.empty(array.shape or (1,), array.dtype)
        except MemoryError:
            raise LimitError(
                f"needs {array.nbytes / 1e9:.3g} GB of memory, more than there is",
                file=self.path,
                where=array.member.name,
            ) from None
        for start, block in self.rows(array):
            out[start : start + len(block)] = block
        return out.reshape(array.shape)


def open_npz(path: Path, *, container: Path | None = None, begin: int = 0, nbytes: int | None = None) -> NpzFile:
    """The .npz at `path` with every array's header checked; no data is read.

    With `container` it is the part of that file that begins at `begin` and is `nbytes` long, and `path` only its
    name.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is no .npz, or an array's header contradicts its member.
        UnsafeFileError: an array of Python objects, which only a pickle could read.
        LimitError, SchemaError: more dimensions or other dtypes than weights have.
    """
    archive = open_stored_zip(path, container=container, begin=begin, nbytes=nbytes)
    expected = [f"arr_{n}.npy" for n in range(len(archive.members))]
    if sorted(archive.members) != sorted(expected):
        strange = sorted(set(archive.members) - set(expected))
        raise FormatError(
            "members are not numbered as np.savez does it",
            file=path,
            expected=f"arr_0.npy to arr_{len(expected) - 1}.npy",
            found=shown(strange[0] if strange else sorted(archive.members)),
        )
    return _with_headers(archive, expected)


def open_named_npz(path: Path, names: Collection[str], *, noun: str) -> tuple[NpzFile, dict[str, NpyArray]]:
    """The .npz at `path`, which holds arrays of exactly these names, each with its header checked; no data is read.

    Args:
        path: where.
        names: of the arrays.
        noun: for errors: they are the arrays of a "probe".

    Raises:
        FormatError: an array is missing, or another is there; and what `open_npz` raises.
    """
    try:
        archive = open_stored_zip(path)
        found = {name.removesuffix(".npy") for name in archive.members if name.endswith(".npy")}
        if missing := sorted(set(names) - found):
            raise FormatError(f"a part of the {noun} is missing", file=path, found=f"no {', '.join(missing)}")
        if strange := sorted(archive.members.keys() - {f"{name}.npy" for name in names}):
            raise FormatError("something else is in it", file=path, found=shown(strange[0]))
        file = _with_headers(archive, [f"{name}.npy" for name in names])
    except MissingFileError:
        raise
    except FormatError as error:
        error.problem = f"not a {noun}'s arrays: {error.problem}"
        raise
    return file, dict(zip(names, file.arrays, strict=True))


def _with_headers(archive: StoredZip, names: Sequence[str]) -> NpzFile:
    """The archive with the headers of these members, in this order."""
    arrays = []
    with archive.open() as stream:
        for name in names:
            member = archive.members[name]
            head = bytearray(min(member.nbytes, 12 + LARGEST_NPY_HEADER_BYTES))
            read_into(stream, memoryview(head), member.offset, file=archive.path, where=name)
            arrays.append(_parse_npy(bytes(head), member, archive.path))
    return NpzFile(archive, tuple(arrays))


def _parse_npy(head: bytes, member: ZipMember, path: Path) -> NpyArray:
    """An array's dtype and shape from the first bytes of its member."""

    def refuse(problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        raise error(problem, file=path, where=member.name, **facts)

    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00"):
        refuse("not an .npy array", expected=r"\x93NUMPY and version 1.0 or 2.0", found=shown(head[:8]))
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    if length > LARGEST_NPY_HEADER_BYTES:
        refuse("its header is too long", LimitError, expected=f"at most {LARGEST_NPY_HEADER_BYTES} bytes", found=length)
    text = head[start : start + length]
    if len(text) != length:
        refuse("cut short in its header", expected=f"{start + length} bytes", found=f"{len(head)} bytes")
    descr, fortran_order, shape = _header_literal(text, refuse)
    kind = descr.lstrip("<>|=")
    if "O" in kind:
        refuse("an array of Python objects", UnsafeFileError, found=shown(descr), hint="Reading it would run a pickle")
    if kind not in DTYPES or descr[:-2] not in ("<", ">", "|"):
        refuse("unknown dtype", SchemaError, expected="one of <" + ", <".join(DTYPES), found=shown(descr))
    if fortran_order and len(shape) > 1:
        refuse("stored column by column", expected="fortran_order False, as the original writes it", found="True")
    dtype = DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if start + length + nbytes != member.nbytes:
        refuse(
            "its bytes do not fit its shape and dtype",
            expected=f"{nbytes} bytes for {descr} {shape}",
            found=f"{member.nbytes - start - length} bytes",
        )
    swapped = descr[0] == ">"
    return NpyArray(member, dtype, swapped, shape, start + length, zlib.crc32(head[: start + length]))


def _header_literal(text: bytes, refuse: Any) -> tuple[str, bool, tuple[int, ...]]:
    """descr, fortran_order and shape of an .npy header, which is the literal of a dict."""
    if b"\\" in text:  # NumPy writes none, and Python may warn of one
        refuse("its header is not the literal of a dict", found=shown(text, longest=80))
    try:
        members = ast.literal_eval(text.decode("latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        refuse("its header is not the literal of a dict", found=shown(text, longest=80))
    if not isinstance(members, dict) or members.keys() != {"descr", "fortran_order", "shape"}:
        refuse("its header breaks its rule", expected="descr, fortran_order and shape", found=shown(text, longest=80))
    descr, fortran_order, shape = members["descr"], members["fortran_order"], members["shape"]
    if not isinstance(descr, str) or len(descr) < 2:
        refuse("a compound dtype", expected="a plain number", found=shown(descr))
    if not isinstance(fortran_order, bool):
        refuse("its header breaks its rule", expected="fortran_order True or False", found=shown(fortran_order))
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        refuse("its header breaks its rule", expected="a shape of whole numbers, 0 or above", found=shown(shape))
    if len(shape) > MOST_DIMENSIONS or math.prod(n or 1 for n in shape) > 2**60:
        refuse("an absurd shape", LimitError, expected=f"at most {MOST_DIMENSIONS} axes", found=shown(shape))
    return descr, fortran_order, shape


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header that np.save (version 1.0) writes before a C-ordered array.

    >>> len(npy_header(np.dtype(np.float32), (4096, 512)))
    128
    """
    descr = "<V2" if dtype == BFLOAT16 else dtype.newbyteorder("<").str
    # NumPy leaves room for a first axis of 21 digits, so that a file can grow in place.
    room = " " * max(0, 21 - len(repr(shape[0]))) if shape else ""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}{room}"
    text += " " * (64 - (10 + len(text) + 1) % 64) + "\n"  # NumPy adds 64 where none was needed, so 64 it is
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1")
