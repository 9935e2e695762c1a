"""One safetensors file, read strictly: the header is believed only after everything in it has been checked.

The format is eight bytes of header length, a JSON header, then the data. Its own library repairs or overlooks
some lies in silence (a name twice, for one), and it maps the file, so that a file which shrinks under the
reader ends the process by a signal. Therefore the header is parsed here: before a byte of data is read, every
tensor's place is known to lie inside the file, to fit its shape and dtype, and to touch its neighbours without
overlap or hole. Data is then read into memory of our own, a block at a time, and a file that is no longer the
one whose header was checked is noticed. Hosts are little-endian, as the format is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj.config.dtypes import numpy_dtype
from gptj.errors import FormatError, GPTJError, InputError, LimitError, SchemaError, shown
from gptj.paths.json_file import parse_json_object
from gptj.reading.buffers import page_aligned
from gptj.reading.files import (
    ALIGNMENT,
    BLOCK_BYTES,
    FileIdentity,
    file_identity,
    open_regular_file,
    read_into,
    read_up_to,
)
from gptj.reading.kinds import describe_no_safetensors

__all__ = [
    "WEIGHT_DTYPES",
    "SafetensorsFile",
    "StoredTensor",
    "cast",
    "pack_header",
    "parse_header",
    "read_safetensors",
]

LARGEST_HEADER_BYTES = 8 * 2**20  # 6B's is 35 kB
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 8
LONGEST_NAME = 512
LARGEST_TENSOR_BYTES = 2**62


# A run at least this long is read where it lies; shorter ones are cut out of whole rows, because a system call
# costs as much as copying a few kilobytes.
_SHORT_RUN_BYTES = 64 * 2**10

_CODES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
_DTYPES = {dtype.name: dtype for dtype in _CODES.values()}
_CODE_OF = {dtype.name: code for code, dtype in _CODES.items()}

WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that a weight may be stored as, and be cast to."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor; nothing of it has been read.

    Attributes:
        name: as the file spells it.
        dtype: NumPy's name: float32, bfloat16, ...
        shape: the size of each axis.
        file: the file that holds it.
        offset: its first byte, counted from the start of the file.
        nbytes: how many bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def cast(
    values: NDArray[Any],
    dtype: np.dtype[Any],
    *,
    where: str,
    file: str | os.PathLike[str] | None = None,
    allow_overflow: bool = False,
) -> NDArray[Any]:
    """`values` in another dtype, rounded to nearest even; the same array where the dtype is already right.

    Raises:
        SchemaError: a value that was finite would become infinite (unless `allow_overflow`), or the values are not
            floating-point numbers.
    """
    if values.dtype == dtype:
        return values
    if values.dtype.newbyteorder("=").name not in WEIGHT_DTYPES:
        raise SchemaError(
            "cannot be cast", file=file, where=where, expected=" or ".join(WEIGHT_DTYPES), found=values.dtype.name
        )
    with np.errstate(all="ignore"):
        out = values.astype(dtype)
    if not allow_overflow and dtype.itemsize <= values.dtype.itemsize:
        became = np.isinf(out) & np.isfinite(values)
        if became.any():
            worst = float(np.abs(values[became].astype(np.float64)).max())
            raise SchemaError(
                f"a value does not fit {dtype.name}",
                file=file,
                where=where,
                expected=f"at most {_largest(dtype):g}",
                found=f"{worst:g} in {int(became.sum())} element(s)",
                hint="Choose bfloat16, float32 or float64" if dtype.name == "float16" else "Choose a wider dtype",
            )
    return out


def _largest(dtype: np.dtype[Any]) -> float:
    """The largest finite value of a floating-point dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


# ---- the header


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """The file at `path` with its header checked.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is not a regular file, or not what the format says.
        LimitError: the header is larger, or has more tensors or dimensions, than any GPT-J needs.
        SchemaError: a tensor's dtype is unknown or is smaller than a byte.
    """
    path = Path(path)
    with open_regular_file(path) as stream:
        identity = file_identity(stream)
        size = identity[2]
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        # What is too long for the file or for the cap is refused by parse_header; it is not read for that.
        fits = length <= min(LARGEST_HEADER_BYTES, size - 8)
        head = prefix + read_up_to(stream, length if fits else 512)
    tensors, metadata = parse_header(head, file=path, file_bytes=size)
    return SafetensorsFile(path, tensors, metadata, identity)


def parse_header(
    head: bytes, *, file: str | os.PathLike[str], file_bytes: int
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors, in the order of their data, and the metadata that the first bytes of a file declare.

    Args:
        head: the length and the header (more bytes do no harm).
        file: what errors name.
        file_bytes: the size of the whole file.
    """
    members = _header_members(head, file=file, file_bytes=file_bytes)
    data_start = 8 + struct.unpack("<Q", head[:8])[0]
    metadata = members.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(
            "breaks its rule", file=file, where="__metadata__", expected="an object of strings", found=shown(metadata)
        )
    if len(members) > MOST_TENSORS:
        raise LimitError("too many tensors", file=file, expected=f"at most {MOST_TENSORS}", found=len(members))
    path = Path(file)
    tensors = [
        _stored_tensor(name, entry, path, data_start, file_bytes - data_start) for name, entry in members.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _require_seamless(tensors, path, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _header_members(head: bytes, *, file: str | os.PathLike[str], file_bytes: int) -> dict[str, Any]:
    """The header's JSON object, after its length has been found to be possible."""

    def refuse(problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        if kind := describe_no_safetensors(head, file_bytes):
            raise FormatError(f"this is {kind}, not a safetensors file", file=file)
        raise error(problem, file=file, **facts)

    if file_bytes < 8 or len(head) < 8:
        refuse("too short for a safetensors file", expected="at least 8 bytes", found=f"{file_bytes} bytes")
    length = struct.unpack("<Q", head[:8])[0]
    if length > LARGEST_HEADER_BYTES:
        refuse(
            "the header is too large",
            LimitError,
            expected=f"at most {LARGEST_HEADER_BYTES} bytes",
            found=f"{length} bytes",
        )
    if 8 + length > file_bytes or 8 + length > len(head):
        refuse(f"cut short: the file has {min(file_bytes, len(head))} bytes, its header needs {8 + length}")
    if head[8:9] != b"{":
        refuse("the header does not begin with {", found=shown(head[8:16]))
    return parse_json_object(head[8 : 8 + length], file=file, where="header")


def _stored_tensor(name: str, entry: Any, file: Path, data_start: int, data_bytes: int) -> StoredTensor:
    """One entry of the header, checked by itself."""

    def refuse(problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        raise error(problem, file=file, where=shown(name), **facts)

    # TensorFlow's names are paths, h_._0/attn/q_proj/kernel:0; none may be one that leads anywhere.
    is_path = "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or is_path:
        refuse("not a tensor's name", expected=f"1 to {LONGEST_NAME} printable characters that lead nowhere")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        keys = sorted(entry) if isinstance(entry, dict) else entry
        refuse("breaks its rule", expected="an object of dtype, shape and data_offsets", found=shown(keys))
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        refuse("unknown dtype", SchemaError, expected="one of " + ", ".join(_CODES), found=shown(code))
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        refuse("breaks its rule", expected="a shape of whole numbers, 0 or above", found=shown(shape))
    if len(shape) > MOST_DIMENSIONS:
        refuse("too many dimensions", LimitError, expected=f"at most {MOST_DIMENSIONS}", found=len(shape))
    dtype = _CODES[code]
    if math.prod(n or 1 for n in shape) * dtype.itemsize > LARGEST_TENSOR_BYTES:
        refuse("an absurd shape", LimitError, expected=f"at most {LARGEST_TENSOR_BYTES} bytes", found=shown(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        refuse("breaks its rule", expected="data_offsets of two whole numbers", found=shown(offsets))
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        refuse(
            "lies outside the data",
            expected=f"0 <= begin <= end <= {data_bytes} (is the file cut short?)",
            found=f"begin {shown(begin)}, end {shown(end)}",
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        refuse(
            "its bytes do not fit its shape and dtype",
            expected=f"{nbytes} bytes for {code} {shape}",
            found=f"{end - begin} bytes",
        )
    return StoredTensor(name, dtype.name, tuple(shape), file, data_start + begin, nbytes)


def _require_seamless(tensors: Iterable[StoredTensor], file: Path, data_start: int, file_bytes: int) -> None:
    """Make sure that the tensors, sorted by offset, fill the data with no overlap, no hole and nothing after."""
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise FormatError(
                problem,
                file=file,
                where=tensor.name,
                expected=f"data_offsets that begin at {position - data_start}",
                found=tensor.offset - data_start,
            )
        position += tensor.nbytes
    if position != file_bytes:
        raise FormatError(
            "bytes after the last tensor", file=file, expected=f"{position} bytes", found=f"{file_bytes} bytes"
        )


def pack_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], *, length: int | None = None
) -> bytes:
    """The length and header of a file whose data is these tensors (name, dtype, shape) one after the other.

    The whole is padded with spaces to a multiple of `ALIGNMENT`, or to `length` where it is given, which the format
    allows; so a header can be written last, into room that was left for it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": _CODE_OF[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = 8 + len(text) + -(8 + len(text)) % ALIGNMENT if length is None else length
    assert whole >= 8 + len(text)
    return struct.pack("<Q", whole - 8) + text.ljust(whole - 8)


# ---- the data


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header has been checked. It is open only while something is read.

    Attributes:
        path: where it is.
        tensors: by name, in the order of their data.
        metadata: the header's `__metadata__`.
        identity: device, inode, size and time of change when the header was read; data is taken from no other.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    identity: FileIdentity

    def read(self, tensor: StoredTensor, dtype: Any = None) -> NDArray[Any]:
        """The tensor in memory of its own, C-contiguous, in its own dtype or in `dtype`.

        Raises:
            FormatError: the file shrank or changed since it was opened.
            SchemaError: a value overflows `dtype`.
            LimitError: there is not enough memory.
        """
        return self._gather(tensor, 0, 0, None, dtype) if tensor.shape else self._gather_scalar(tensor, dtype)

    def read_slice(self, tensor: StoredTensor, axis: int, start: int, stop: int, dtype: Any = None) -> NDArray[Any]:
        """`read(tensor)` from `start` to `stop` along `axis`, without reading or holding the rest.

        Raises:
            InputError: there is no such axis or part.
        """
        if not 0 <= axis < len(tensor.shape):
            raise InputError(
                "no such axis", file=self.path, where=tensor.name, expected=f"one of {tensor.shape}", found=shown(axis)
            )
        if not 0 <= start <= stop <= tensor.shape[axis]:
            raise InputError(
                "no such part",
                file=self.path,
                where=tensor.name,
                expected=f"0 <= start <= stop <= {tensor.shape[axis]}",
                found=f"{start} to {stop}",
            )
        return self._gather(tensor, axis, start, stop, dtype)

    def read_part(self, tensor: StoredTensor, parts: tuple[slice, ...], dtype: Any = None) -> NDArray[Any]:
        """`read(tensor)[parts]` of a vector or matrix, of whose bytes no others are read.

        Args:
            parts: one slice an axis, of whole numbers, without a step.
        """
        if not parts:
            return self.read(tensor, dtype)
        first, *rest = parts
        row = tensor.nbytes // max(tensor.shape[0], 1)
        shape = (first.stop - first.start, *tensor.shape[1:])
        rows = dataclasses.replace(tensor, shape=shape, offset=tensor.offset + first.start * row, nbytes=shape[0] * row)
        if not rest:
            return self._gather(rows, 0, 0, None, dtype)
        (columns,) = rest
        return self._gather(rows, 1, columns.start, columns.stop, dtype, sparing=True)

    def map(self, tensor: StoredTensor) -> NDArray[Any]:
        """The tensor as a view of the file, without a copy; what is written into it stays in memory.

        Pages are read when they are touched, and shared between processes until they are written to. A tensor
        that does not lie at a multiple of its item size, which few libraries can take, is read instead.
        """
        dtype = _DTYPES[tensor.dtype]
        if tensor.nbytes == 0 or tensor.offset % dtype.itemsize:
            return self.read(tensor)
        with self._open() as stream:
            try:
                pages = np.memmap(stream, dtype=np.uint8, mode="c", offset=tensor.offset, shape=(tensor.nbytes,))
            except OSError as error:
                raise FormatError(f"cannot be mapped: {error.strerror}", file=self.path, where=tensor.name) from None
        return np.asarray(pages).view(dtype).reshape(tensor.shape)

    def blocks(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """The tensor's bytes, at most `BLOCK_BYTES` at a time; each block is overwritten by the next."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, tensor.nbytes)))
        with self._open() as stream:
            for start in range(0, tensor.nbytes, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, tensor.nbytes - start)]
                self._read_into(stream, block, tensor.offset + start, tensor)
                yield block

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, open, the same before and after as when its header was read."""
        with open_regular_file(self.path) as stream:
            self._require_unchanged(stream)
            yield stream
            self._require_unchanged(stream)

    def _require_unchanged(self, stream: BinaryIO) -> None:
        if file_identity(stream) != self.identity:
            raise FormatError("changed while being read", file=self.path, hint="Open it again when it is complete")

    def _read_into(self, stream: BinaryIO, out: memoryview, offset: int, tensor: StoredTensor) -> None:
        read_into(stream, out, offset, file=self.path, where=tensor.name)

    def _gather_scalar(self, tensor: StoredTensor, dtype: Any) -> NDArray[Any]:
        return self._gather(dataclasses.replace(tensor, shape=(1,)), 0, 0, 1, dtype).reshape(())

    def _gather(
        self, tensor: StoredTensor, axis: int, start: int, stop: int | None, dtype: Any, *, sparing: bool = False
    ) -> NDArray[Any]:
        """The part of the tensor, as `outer` runs of neighbouring elements, each in a row of the same length.

        With `sparing` nothing between the runs is read, however short they are.
        """
        stored = _DTYPES[tensor.dtype]
        wanted = stored if dtype is None else numpy_dtype(dtype)
        stop = tensor.shape[axis] if stop is None else stop
        inner = math.prod(tensor.shape[axis + 1 :])
        outer, row, run = math.prod(tensor.shape[:axis]), tensor.shape[axis] * inner, (stop - start) * inner
        if run == row:
            outer, row, run = 1, outer * row, outer * run
        shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
        out = _allocate(shape, wanted, file=self.path, where=tensor.name)
        if out.size == 0:
            return out
        first = tensor.offset + start * inner * stored.itemsize
        with self._open() as stream:
            long = run * stored.itemsize >= _SHORT_RUN_BYTES or row * stored.itemsize > BLOCK_BYTES
            if run == row or long or sparing:
                for number, place in enumerate(out.reshape(outer, run)):
                    self._read_run(stream, place, first + number * row * stored.itemsize, stored, tensor)
            else:
                part = slice(start * inner, start * inner + run)
                self._read_rows(stream, out.reshape(outer, run), row, part, stored, tensor)
        return out

    def _read_run(
        self, stream: BinaryIO, out: NDArray[Any], offset: int, stored: np.dtype[Any], tensor: StoredTensor
    ) -> None:
        """Fill the flat `out` from `offset` on, a block at a time where a cast is needed."""
        if out.dtype == stored:
            self._read_into(stream, out.view(np.uint8).data, offset, tensor)
            return
        block_size = BLOCK_BYTES // stored.itemsize
        scratch = np.empty(min(block_size, out.size), stored)
        for at in range(0, out.size, block_size):
            block = scratch[: min(block_size, out.size - at)]
            self._read_into(stream, block.view(np.uint8).data, offset + at * stored.itemsize, tensor)
            out[at : at + block.size] = cast(block, out.dtype, where=tensor.name, file=self.path)

    def _read_rows(
        self,
        stream: BinaryIO,
        out: NDArray[Any],
        row: int,
        part: slice,
        stored: np.dtype[Any],
        tensor: StoredTensor,
    ) -> None:
        """Fill `out` (outer, run) with the same `part` of every row of `row` elements, some whole rows at a time."""
        rows = max(1, BLOCK_BYTES // (row * stored.itemsize))
        scratch = np.empty((min(rows, len(out)), row), stored)
        for at in range(0, len(out), rows):
            block = scratch[: min(rows, len(out) - at)]
            offset = tensor.offset + at * row * stored.itemsize
            self._read_into(stream, block.reshape(-1).view(np.uint8).data, offset, tensor)
            out[at : at + len(block)] = cast(block[:, part], out.dtype, where=tensor.name, file=self.path)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], *, file: Path, where: str) -> NDArray[Any]:
    needed = math.prod(shape) * dtype.itemsize
    try:
        return page_aligned(needed).view(dtype).reshape(shape)
    except (MemoryError, ValueError):
        raise LimitError(f"needs {needed / 1e9:.3g} GB of memory, more than there is", file=file, where=where) from None


# ---- files
