"""pytorch_model.bin, read and written without torch: a stored zip, a pickle that is never run, raw storages.

Where a tensor lies is inferred from the pickle and the archive's directory: the storage must have exactly the
bytes that its number of elements calls for, and the view must be the whole of a contiguous run in it, row by row
or column by column; its CRC-32 is compared when it is read. Files from before PyTorch 1.6 (bare pickles) are
read by the same interpreter; tar files and TorchScript archives are refused by name.

The writer makes the same archive from the schema, which torch.load(weights_only=True) and transformers open.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from gptj.config.schema import Head
from gptj.errors import FormatError, SchemaError, UnsafeFileError, shown, warn_of
from gptj.reading.files import file_identity, open_regular_file, read_into
from gptj.reading.manifest import FileRecord
from gptj.reading.stored_zip import StoredZip, ZipMember, open_stored_zip
from gptj.writing.containers import Entry, HashedFile
from gptj.writing.output_directory import OutputDirectory
from gptj.writing.stored_zip import StoredZipWriter
from gptj_conversion.common.stored_array import DTYPES, Checksum, StoredArray
from gptj_conversion.hf.torch_pickle import STORAGES, PickledTensor, read_legacy, read_state_dict

__all__ = ["BIN_FILE", "BIN_INDEX", "BinWriter", "read_bin"]

BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
LARGEST_PICKLE_BYTES = 16 * 2**20


def read_bin(path: Path) -> list[StoredArray]:
    """Every tensor of one file, by the name in its state dict.

    Raises:
        UnsafeFileError: the pickle calls something.
        FormatError: the file is malformed, or of one of PyTorch's other formats.
        LimitError: its pickle is too large.
    """
    if _is_legacy(path):
        return _read_legacy(path)
    try:
        archive = open_stored_zip(path)
    except FormatError as error:
        if "/code/" in str(error.where):  # which TorchScript compresses
            _refuse_program(path)
        raise
    pickles = [name for name in archive.members if name.count("/") == 1 and name.endswith("/data.pkl")]
    root = pickles[0].split("/")[0] if pickles else ""
    if any(name.endswith("/constants.pkl") or name.startswith(f"{root}/code/") for name in archive.members):
        _refuse_program(path)
    if len(pickles) != 1:
        raise FormatError("not a PyTorch checkpoint", file=path, expected="one */data.pkl", found=len(pickles))
    data = archive.read(pickles[0], limit_bytes=LARGEST_PICKLE_BYTES)
    tensors = read_state_dict(data, file=path, where=pickles[0])
    swapped = _is_big_endian(archive, root)
    sums = {n: Checksum(m.offset, m.nbytes, m.crc32) for n, m in archive.members.items() if archive.has_checksums}
    if not sums:
        warn_of("its writer noted no checksums (CRC-32), so damage to its numbers goes unnoticed", file=path)
    arrays = [
        dataclasses.replace(
            _stored_array(name, tensor, archive, root, swapped), checksum=sums.get(f"{root}/data/{tensor.storage.key}")
        )
        for name, tensor in tensors.items()
    ]
    _refuse_overlaps(arrays, path)
    return arrays


def _refuse_program(path: Path) -> NoReturn:
    raise UnsafeFileError(
        "a TorchScript archive, which is a program", file=path, hint="Save the model's state_dict() instead"
    )


def _is_legacy(path: Path) -> bool:
    """Whether the file is bare pickles and storages, as PyTorch wrote them before 1.6."""
    with open_regular_file(path) as stream:
        head = stream.read(512)
    if head[257:262] == b"ustar":
        raise FormatError("a tar archive (PyTorch before 0.2 saved so)", file=path, expected="a zip archive")
    return head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"


def _read_legacy(path: Path) -> list[StoredArray]:
    """Every tensor of a file from before PyTorch 1.6, which has no checksums."""
    with open_regular_file(path) as stream:
        identity = file_identity(stream)
        data = stream.read(LARGEST_PICKLE_BYTES)
        tensors, storages, at = read_legacy(data, file=path)
        members: dict[str, ZipMember] = {}
        for storage in storages:
            where, count = f"storage {shown(storage.key)}", bytearray(8)
            read_into(stream, memoryview(count), at, file=path, where=where)
            nbytes, numel = storage.numel * DTYPES[storage.dtype].itemsize, int.from_bytes(count, "little", signed=True)
            if numel != storage.numel:
                raise FormatError("another number of elements than the state dict says", file=path, where=where,
                                  expected=storage.numel, found=numel)  # fmt: skip
            if at + 8 + nbytes > identity[2]:
                raise FormatError("the file ends within it", file=path, where=where,
                                  expected=f"{at + 8 + nbytes} bytes", found=f"{identity[2]} bytes")  # fmt: skip
            members[f"{path.stem}/data/{storage.key}"] = ZipMember(storage.key, at + 8, nbytes, 0)
            at += 8 + nbytes
        if at != identity[2]:
            raise FormatError("bytes after the last storage", file=path, expected=at, found=identity[2])
    archive = StoredZip(path, members, identity, path, 0, identity[2])
    warn_of("saved by PyTorch before 1.6: it has no checksums, so damage to its numbers goes unnoticed", file=path)
    arrays = [_stored_array(name, tensor, archive, path.stem, False) for name, tensor in tensors.items()]
    _refuse_overlaps(arrays, path)
    return arrays


def _is_big_endian(archive: StoredZip, root: str) -> bool:
    name = f"{root}/byteorder"
    if name not in archive.members:
        return False
    order = archive.read(name, limit_bytes=16).strip()
    if order not in (b"little", b"big"):
        raise FormatError(
            "unknown byte order", file=archive.path, where=name, expected="little or big", found=shown(order)
        )
    return order == b"big"


def _stored_array(name: str, tensor: PickledTensor, archive: StoredZip, root: str, swapped: bool) -> StoredArray:
    """The place of a tensor's bytes, after its view has been found to fit its storage."""
    storage = tensor.storage
    dtype = DTYPES[storage.dtype]
    member = archive.members.get(f"{root}/data/{storage.key}")
    if member is None:
        raise FormatError(
            "its storage is missing", file=archive.path, where=shown(name), expected=f"data/{storage.key}"
        )
    if member.nbytes != storage.numel * dtype.itemsize:
        raise FormatError(
            "its storage has another size",
            file=archive.path,
            where=shown(name),
            expected=f"{storage.numel * dtype.itemsize} bytes",
            found=f"{member.nbytes} bytes",
        )
    size = math.prod(tensor.shape)
    if tensor.offset + size > storage.numel:
        raise FormatError(
            "reaches beyond its storage",
            file=archive.path,
            where=shown(name),
            expected=f"at most {storage.numel} elements",
            found=f"{size} from element {tensor.offset} on",
        )
    rows_first, columns_first = _strides(tensor.shape), _strides(tensor.shape[::-1])[::-1]
    significant = [n for n, length in enumerate(tensor.shape) if length != 1]

    def agrees(strides: tuple[int, ...]) -> bool:
        return size == 0 or all(tensor.strides[n] == strides[n] for n in significant)

    if not agrees(rows_first) and not agrees(columns_first):
        raise FormatError(
            "strides that skip or repeat elements",
            file=archive.path,
            where=shown(name),
            expected=f"{rows_first} for the shape {tensor.shape}",
            found=tensor.strides,
            hint="Save it with .contiguous()",
        )
    extent = (member.offset + tensor.offset * dtype.itemsize, size * dtype.itemsize)
    reversed_axes = not agrees(rows_first)
    return StoredArray(
        name,
        dtype,
        tensor.shape,
        archive.path,
        archive.identity,
        (extent,),
        swapped and dtype.itemsize > 1,
        reversed_axes,
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


def _refuse_overlaps(arrays: list[StoredArray], path: Path) -> None:
    """Refuse two tensors on the same bytes, unless they are the same tensor under two names (tied weights)."""
    last: StoredArray | None = None
    for array in sorted(arrays, key=lambda a: a.extents):
        if array.nbytes == 0:
            continue
        if last is not None and array.extents[0][0] < sum(last.extents[0]) and not _is_same(array, last):
            raise FormatError(
                "shares bytes with another tensor", file=path, where=shown(array.name), found=shown(last.name)
            )
        last = array


def _is_same(one: StoredArray, other: StoredArray) -> bool:
    return (one.extents, one.shape, one.dtype) == (other.extents, other.shape, other.dtype)


# ---- writing


class BinWriter:
    """Writes one file of a PyTorch checkpoint; see `gptj.writing.containers.NamedContainer`."""

    def __init__(self, output: OutputDirectory, name: str, entries: Sequence[Entry], head: Head) -> None:
        self._file = HashedFile(output, name)
        self._archive = StoredZipWriter(self._file.write, alignment=64)
        self._root = name.removesuffix(".bin")
        self._count = 0
        pickle = pickle_state_dict([(entry.name, entry.dtype.name, entry.shape) for entry in entries])
        small = {"data.pkl": pickle, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
        for member, data in small.items():
            self._archive.add(f"{self._root}/{member}", data)

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next tensor's bytes."""
        self._archive.add(f"{self._root}/data/{self._count}", *blocks)
        self._count += 1

    def finish(self) -> FileRecord:
        """Close the file and compare what the disk gives back."""
        self._archive.add(f"{self._root}/version", b"3\n")
        self._archive.finish()
        return self._file.finish()


def pickle_state_dict(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The pickle of a state dict of these tensors (name, dtype, shape), each on a storage of its own.

    The opcodes are those that torch.save writes (protocol 2), without the memo that it uses to save space.
    """
    classes = {dtype: name for name, dtype in STORAGES.items()}
    out = bytearray(b"\x80\x02}(")
    for number, (name, dtype, shape) in enumerate(tensors):
        if dtype not in classes:
            raise SchemaError("no dtype of PyTorch", where=name, found=shown(dtype))
        out += _text(name)
        out += b"ctorch._utils\n_rebuild_tensor_v2\n("
        out += b"(" + _text("storage") + f"ctorch\n{classes[dtype]}\n".encode() + _text(str(number)) + _text("cpu")
        out += _whole(math.prod(shape)) + b"tQ"
        out += _whole(0) + _whole_tuple(shape) + _whole_tuple(_strides(shape))
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(out + b"u.")


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _whole_tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_whole(value) for value in values) + b"t"
