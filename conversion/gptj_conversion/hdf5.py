"""HDF5 files of the classic layout, read without libhdf5: where each dataset lies, and lists of names.

libhdf5 follows what a file says: a free block that is its own successor makes it allocate until the machine dies,
and Python cannot interrupt it. The files that Keras writes use a small part of the format, which is read here, each
structure once and inside the file's bounds: superblocks 0 to 3, object headers 1 and 2, symbol tables (B-trees of
version 1 over local heaps), link messages, contiguous datasets, attributes whose strings have a fixed length or lie
in a global heap. Whatever else a file holds is refused by its name. Nothing is allocated by a size that the file
states before that size was compared with the file's own.

Source: HDF5 File Format Specification, version 3.0.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from gptj.errors import FormatError, GPTJError, LimitError, SchemaError, UnsafeFileError, shown
from gptj.safetensors_file import FileIdentity, file_identity, read_into

__all__ = ["MAGIC", "Attribute", "Dataset", "Group", "HDF5File"]

MAGIC = b"\x89HDF\r\n\x1a\n"
MOST_OBJECTS = 100_000
DEEPEST = 16
MOST_METADATA = 128 * 2**20
"""Bytes of everything but the arrays that may be read from one file."""
LARGEST_STRUCTURE = 16 * 2**20
LONGEST_NAME = 4096

_UNDEFINED = 2**64 - 1
_CLASSES = (
    "integers", "floats", "times", "fixed-length strings", "bit fields", "opaque values", "compounds", "references",
    "enumerations", "variable-length values", "arrays",
)  # fmt: skip
_FLOATS = {
    2: (b"\x0f\x00", (0, 16, 10, 5, 0, 10, 15)),
    4: (b"\x1f\x00", (0, 32, 23, 8, 0, 23, 127)),
    8: (b"\x3f\x00", (0, 64, 52, 11, 0, 52, 1023)),
}
"""By size, an IEEE number's sign position and fields, as a datatype message has them."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A plain run of IEEE numbers: its dtype (either byte order), shape, and first byte in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute that has not been understood yet: its datatype, dataspace and data messages."""

    name: str
    datatype: bytes
    dataspace: bytes
    data: bytes
    shared: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """The members of a group by name, and its attributes."""

    members: dict[str, Group | Dataset]
    attributes: dict[str, Attribute]


@dataclasses.dataclass(frozen=True)
class _Message:
    kind: int
    flags: int
    data: bytes


class HDF5File:
    """One open file. `root()` reads its outline; `names` reads an attribute that lists names.

    Raises:
        FormatError: it is no HDF5 file of the layout above, or contradicts itself.
        UnsafeFileError: it points to other files.
        SchemaError: a dataset is no run of IEEE numbers, an attribute no list of names.
        LimitError: it has more objects, levels or metadata than any checkpoint.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self.identity: FileIdentity = file_identity(stream)
        self._size = self.identity[2]
        self.structures: list[tuple[int, int]] = []  # where what was read lies: first byte, length
        self._spent = 0
        self._objects = 0
        self._seen: set[int] = set()
        self._heaps: dict[int, dict[int, bytes]] = {}
        head = self._read(0, min(8, self._size), "")
        if head != MAGIC:
            self.refuse("", "not an HDF5 file", expected=shown(MAGIC), found=shown(head))

    def refuse(self, where: str, problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        """Raise `error` about the object at `where`."""
        raise error(problem, file=self._path, where=shown(where)[1:-1] or None, **facts)

    def root(self) -> Group:
        """Every group and dataset of the file."""
        version = self._read(8, 1, "")[0]
        if version in (0, 1):
            widths, at = self._read(13, 2, ""), 24 if version == 0 else 28
            base, _, end, _, _, header = struct.unpack("<6Q", self._read(at, 48, ""))
        elif version in (2, 3):
            widths = self._read(9, 2, "")
            base, _, end, header = struct.unpack("<4Q", self._read(12, 32, ""))
        else:
            self.refuse("", "an unknown version of the superblock", expected="0 to 3", found=version)
        if widths != b"\x08\x08" or base:
            self.refuse("", "malformed HDF5: its superblock breaks its rule", expected="addresses of 8 bytes from 0")
        if end > self._size:
            self.refuse("", "malformed HDF5: cut short", expected=f"{end} bytes", found=f"{self._size} bytes")
        root = self._object(header, "", 0)
        if not isinstance(root, Group):
            self.refuse("", "malformed HDF5: its root is no group")
        return root

    # ---- bytes

    def _read(self, at: int, count: int, where: str) -> bytes:
        if count > LARGEST_STRUCTURE:
            self.refuse(where, "a structure too large", LimitError, expected=f"at most {LARGEST_STRUCTURE} bytes")
        if at + count > self._size:
            self.refuse(where, "malformed HDF5: points beyond the file's end", found=f"{count} bytes at {at}")
        self._spent += count
        self.structures.append((at, count))
        if self._spent > MOST_METADATA:
            self.refuse(where, "too much metadata", LimitError, expected=f"at most {MOST_METADATA} bytes")
        data = bytearray(count)
        read_into(self._stream, memoryview(data), at, file=self._path, where=where or "superblock")
        return bytes(data)

    def _once(self, at: int, where: str) -> None:
        """Note that the structure at `at` is read, which is done once: so no chain of them has a cycle."""
        if at in self._seen:
            self.refuse(where, "stands twice in the file", found=f"the structure at byte {at}")
        self._seen.add(at)

    def _unpack(self, layout: str, data: bytes, at: int, where: str) -> tuple[Any, ...]:
        if at + struct.calcsize(layout) > len(data):
            self.refuse(where, "malformed HDF5: a structure is cut short", found=f"{len(data)} bytes")
        return struct.unpack_from(layout, data, at)

    def _signed(self, data: bytes, signature: bytes, where: str) -> None:
        if data[:4] != signature:
            self.refuse(where, "malformed HDF5", expected=shown(signature), found=shown(data[:4]))

    def _name(self, data: bytes, where: str) -> str:
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(where, "a name that is not UTF-8", found=shown(data, longest=60))
        if not name or len(data) > LONGEST_NAME or name in (".", "..") or "/" in name or "\0" in name:
            self.refuse(where, "not a name", found=shown(data, longest=60))
        return name

    # ---- object headers

    def _object(self, header: int, where: str, depth: int) -> Group | Dataset:
        self._objects += 1
        if self._objects > MOST_OBJECTS:
            self.refuse(where, "too many objects", LimitError, expected=f"at most {MOST_OBJECTS}")
        if depth > DEEPEST:
            self.refuse(where, "nested too deeply", LimitError, expected=f"at most {DEEPEST} levels")
        messages = list(self._messages(header, where))
        kinds = {message.kind for message in messages}
        if kinds & {0x11, 0x02, 0x06}:
            return self._group(messages, where, depth)
        if kinds >= {0x01, 0x08}:
            return self._dataset(messages, where)
        self.refuse(where, "neither group nor dataset", found=f"messages {sorted(kinds)}")

    def _messages(self, header: int, where: str) -> Iterator[_Message]:
        self._once(header, where)
        start = self._read(header, 16, where)
        if start[:4] == b"OHDR":
            yield from self._new_messages(header, start, where)
            return
        version, _, total, _, length = struct.unpack_from("<BBHII", start)
        if version != 1:
            self.refuse(where, "malformed HDF5: no object header", found=f"version {version} at byte {header}")
        blocks, count = [(header + 16, length)], 0
        for at, size in blocks:
            for message in self._block(self._read(at, size, where), 8, where):
                count += 1
                if message.kind == 0x10:
                    blocks.append(self._continuation(message, where))
                yield message
        if count != total:
            self.refuse(where, "malformed HDF5: an object header", expected=f"{total} messages", found=count)

    def _new_messages(self, header: int, start: bytes, where: str) -> Iterator[_Message]:
        """Messages of a header of version 2. Its checksums guard against accident, not malice, and are not read."""
        version, flags = start[4], start[5]
        if version != 2:
            self.refuse(where, "malformed HDF5: no object header", found=f"version {version} at byte {header}")
        at = header + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(self._read(at, width, where), "little")
        blocks = [(at + width, length)]
        for number, (block, size) in enumerate(blocks):
            data = self._read(block, size, where)
            if number:
                self._signed(data, b"OCHK", where)
                data = data[4:-4]
            for message in self._block(data, 6 if flags & 4 else 4, where):
                if message.kind == 0x10:
                    blocks.append(self._continuation(message, where))
                yield message

    def _block(self, data: bytes, head: int, where: str) -> Iterator[_Message]:
        at = 0
        while at + head <= len(data):
            if head == 8:
                kind, size, flags = struct.unpack_from("<HHB", data, at)
            else:
                kind, size, flags = struct.unpack_from("<BHB", data, at)
            if at + head + size > len(data):
                self.refuse(where, "malformed HDF5: a message longer than its header", found=f"{size} bytes")
            yield _Message(kind, flags, data[at + head : at + head + size])
            at += head + size

    def _continuation(self, message: _Message, where: str) -> tuple[int, int]:
        at, size = self._unpack("<QQ", message.data, 0, where)
        self._once(at, where)
        return at, size

    # ---- groups

    def _group(self, messages: list[_Message], where: str, depth: int) -> Group:
        members: dict[str, Group | Dataset] = {}
        attributes: dict[str, Attribute] = {}
        prefix = f"{where}/" if where else ""
        for message in messages:
            if message.kind == 0x0C:
                attribute = self._attribute(message, where)
                if attribute.name in attributes:
                    self.refuse(where, "an attribute stands twice", found=shown(attribute.name))
                attributes[attribute.name] = attribute
            elif message.kind == 0x15:
                flags = self._unpack("<BB", message.data, 0, where)[1]
                if self._unpack("<Q", message.data, 4 if flags & 1 else 2, where)[0] != _UNDEFINED:
                    self._refuse_dense(where, "attributes")
            for name, header in self._links(message, where):
                if name in members:
                    self.refuse(prefix + name, "stands twice in the file")
                members[name] = self._object(header, prefix + name, depth + 1)
        return Group(members, attributes)

    def _refuse_dense(self, where: str, things: str) -> NoReturn:
        self.refuse(
            where, f"its {things} lie in a fractal heap", expected="the layout that Keras writes",
            hint='Copy it with h5py into a File(..., libver="earliest")',
        )  # fmt: skip

    def _links(self, message: _Message, where: str) -> Iterator[tuple[str, int]]:
        """The links that a message holds or points to, as (name, object header)."""
        if message.kind == 0x11:
            tree, heap = self._unpack("<QQ", message.data, 0, where)
            names = self._local_heap(heap, where)
            yield from self._tree(tree, names, where)
        elif message.kind == 0x02:
            flags = self._unpack("<BB", message.data, 0, where)[1]
            if self._unpack("<Q", message.data, 10 if flags & 1 else 2, where)[0] != _UNDEFINED:
                self._refuse_dense(where, "links")
        elif message.kind == 0x06:
            yield self._link(message.data, where)

    def _link(self, data: bytes, where: str) -> tuple[str, int]:
        version, flags = self._unpack("<BB", data, 0, where)
        at, kind = 2, 0
        if flags & 0x08:
            kind = self._unpack("<B", data, at, where)[0]
            at += 1
        at += (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(data[at : at + width], "little")
        at += width
        if version != 1 or at + length > len(data):
            self.refuse(where, "malformed HDF5: a link that breaks its rule")
        name = self._name(data[at : at + length], where)
        if kind:
            self._refuse_link(f"{where}/{name}" if where else name, kind)
        return name, self._unpack("<Q", data, at + length, where)[0]

    def _refuse_link(self, where: str, kind: int) -> NoReturn:
        known = {1: "SoftLink", 64: "ExternalLink"}.get(kind, str(kind))
        self.refuse(where, f"a link of kind {known}", UnsafeFileError, expected="no links")

    def _local_heap(self, at: int, where: str) -> bytes:
        """The data segment of a local heap, whose free blocks were followed to their end."""
        self._once(at, where)
        data = self._read(at, 32, where)
        self._signed(data, b"HEAP", where)
        version, size, free, segment = struct.unpack_from("<B3xQQQ", data, 4)
        if version:
            self.refuse(where, "malformed HDF5: an unknown local heap", found=f"version {version}")
        names = self._read(segment, size, where)
        blocks: set[int] = set()
        while free not in (1, _UNDEFINED):  # 1 is no offset of a block, and ends the list
            if free in blocks:
                self.refuse(where, "malformed HDF5: a local heap's free blocks go in a circle", found=f"offset {free}")
            blocks.add(free)
            following, length = self._unpack("<QQ", names, free, where)
            if length < 16 or free + length > size:
                self.refuse(where, "malformed HDF5: a free block outside its local heap", found=f"offset {free}")
            free = following
        return names

    def _tree(self, root: int, names: bytes, where: str) -> Iterator[tuple[str, int]]:
        """The entries of a group's B-tree of version 1."""
        pending: list[tuple[int, int | None]] = [(root, None)]
        while pending:
            at, expected = pending.pop()
            self._once(at, where)
            if expected == -1:
                yield from self._symbols(at, names, where)
                continue
            data = self._read(at, 24, where)
            self._signed(data, b"TREE", where)
            kind, level, used = struct.unpack_from("<BBH", data, 4)
            if kind or level > 8 or expected not in (None, level):
                self.refuse(where, "malformed HDF5: a B-tree that breaks its rule", found=f"level {level}, type {kind}")
            children = struct.unpack(f"<{2 * used + 1}Q", self._read(at + 24, 16 * used + 8, where))[1::2]
            pending += [(child, level - 1) for child in reversed(children)]

    def _symbols(self, at: int, names: bytes, where: str) -> Iterator[tuple[str, int]]:
        data = self._read(at, 8, where)
        self._signed(data, b"SNOD", where)
        version, count = struct.unpack_from("<BxH", data, 4)
        if version != 1:
            self.refuse(where, "malformed HDF5: an unknown symbol table", found=f"version {version}")
        for place, header, cached, _ in struct.iter_unpack("<QQI20s", self._read(at + 8, 40 * count, where)):
            end = names.find(b"\0", place) if place < len(names) else -1
            if end < 0:
                self.refuse(where, "malformed HDF5: a name outside its local heap", found=f"offset {place}")
            name = self._name(names[place:end], where)
            if cached == 2:
                self._refuse_link(f"{where}/{name}" if where else name, 1)
            if cached > 2:
                self.refuse(where, "malformed HDF5: a symbol that breaks its rule", found=f"cache type {cached}")
            yield name, header

    # ---- datasets

    def _dataset(self, messages: list[_Message], where: str) -> Dataset:
        found: dict[int, bytes] = {}
        for message in messages:
            if message.kind in (0x01, 0x03, 0x08) and (message.flags & 2 or message.kind in found):
                self.refuse(where, "malformed HDF5: a shared or repeated message", found=f"type {message.kind}")
            found[message.kind] = message.data
        version, layout = self._unpack("<BB", found[0x08], 0, where)
        if version not in (3, 4):
            self.refuse(where, "an old layout of its data", expected="version 3 or 4", found=version)
        if 0x07 in found or layout == 3:
            self.refuse(where, "keeps its data in other files", UnsafeFileError, expected="data in this file")
        if layout != 1 or 0x0B in found:
            self.refuse(
                where, "is chunked, compressed or compact", expected="one plain run of numbers, as Keras writes it"
            )
        dtype = self._float(found.get(0x03, b""), where)
        shape = self._shape(found[0x01], where)
        offset, stored = self._unpack("<QQ", found[0x08], 2, where)
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if stored != nbytes or offset == _UNDEFINED or offset + nbytes > self._size:
            self.refuse(
                where, "its bytes are not in the file", expected=f"{nbytes} bytes for {dtype} {shape}",
                found=f"{stored} at {'no place' if offset == _UNDEFINED else offset} of {self._size}",
            )  # fmt: skip
        return Dataset(dtype, shape, offset)

    def _class(self, datatype: bytes, where: str) -> tuple[int, str]:
        number = self._unpack("<B", datatype, 0, where)[0] & 15
        return number, _CLASSES[number] if number < len(_CLASSES) else f"class {number}"

    def _float(self, datatype: bytes, where: str) -> np.dtype[Any]:
        number, words = self._class(datatype, where)
        size = self._unpack("<I", datatype, 4, where)[0]
        if number != 1 or size not in _FLOATS:
            self.refuse(
                where, "not a dtype of weights", SchemaError, expected="float16, 32 or 64", found=f"{words} of {size}"
            )
        bits, fields = _FLOATS[size]
        order = datatype[1] & ~0x20
        if order not in (0, 1) or datatype[2:4] != bits or self._unpack("<HHBBBBI", datatype, 8, where) != fields:
            self.refuse(where, "numbers that are not IEEE", SchemaError, found=shown(datatype[:20]))
        if not datatype[1] & 0x20:
            self.refuse(where, "numbers that are not IEEE", SchemaError, found="no implied leading bit")
        return np.dtype(f"{'<>'[order]}f{size}")

    def _shape(self, dataspace: bytes, where: str) -> tuple[int, ...]:
        version, rank, _, kind = self._unpack("<BBBB", dataspace, 0, where)
        if version not in (1, 2) or rank > 32 or (version == 2 and kind > 1):
            self.refuse(where, "malformed HDF5: a shape that breaks its rule", found=f"{rank} axes, version {version}")
        return tuple(self._unpack(f"<{rank}Q", dataspace, 8 if version == 1 else 4, where))

    # ---- attributes

    def _attribute(self, message: _Message, where: str) -> Attribute:
        version, flags, *sizes = self._unpack("<BBHHH", message.data, 0, where)
        if version not in (1, 2, 3) or message.flags & 2:
            self.refuse(where, "malformed HDF5: an attribute that breaks its rule", found=f"version {version}")
        at, parts = 9 if version == 3 else 8, []
        for size in sizes:
            parts.append(message.data[at : at + size])
            at += -(-size // 8) * 8 if version == 1 else size
        if at > len(message.data):
            self.refuse(where, "malformed HDF5: an attribute is cut short")
        name = parts[0].rstrip(b"\0").decode("utf-8", "backslashreplace")
        return Attribute(name, parts[1], parts[2], message.data[at:], version > 1 and bool(flags & 3))

    def names(self, attribute: Attribute, where: str) -> list[str]:
        """The strings of an attribute.

        Raises:
            SchemaError: it is not a list of strings.
        """
        place = f"{where}: {attribute.name}" if where else attribute.name
        number, words = self._class(attribute.datatype, place)
        text = number == 3 or (number == 9 and len(attribute.datatype) > 1 and attribute.datatype[1] & 15 == 1)
        shape = self._shape(attribute.dataspace, place)
        if shape == (0,):  # Keras writes an empty list as floats
            return []
        if not text or attribute.shared or len(shape) != 1 or shape[0] > MOST_OBJECTS:
            self.refuse(
                place, "breaks its rule", SchemaError, expected="a list of names", found=f"{words} of shape {shape}"
            )
        size = 16 if number == 9 else self._unpack("<I", attribute.datatype, 4, place)[0]
        if size == 0 or shape[0] * size > len(attribute.data):
            self.refuse(place, "malformed HDF5: a list is cut short", found=f"{shape[0]} names of {size} bytes")
        values = [attribute.data[at : at + size] for at in range(0, shape[0] * size, size)]
        if number == 9:
            values = [self._variable(value, place) for value in values]
        return [value.rstrip(b"\0").decode("utf-8", "backslashreplace") for value in values]

    def _variable(self, value: bytes, where: str) -> bytes:
        length, collection, index = struct.unpack("<IQI", value)
        if length == 0:
            return b""
        if collection not in self._heaps:
            self._heaps[collection] = self._global_heap(collection, where)
        data = self._heaps[collection].get(index)
        if data is None or length > len(data):
            self.refuse(where, "malformed HDF5: a name outside its global heap", found=f"object {index}")
        return data[:length]

    def _global_heap(self, at: int, where: str) -> dict[int, bytes]:
        self._once(at, where)
        head = self._read(at, 16, where)
        self._signed(head, b"GCOL", where)
        version, size = struct.unpack_from("<B3xQ", head, 4)
        if version != 1 or size < 16:
            self.refuse(where, "malformed HDF5: an unknown global heap", found=f"version {version}, {size} bytes")
        data = self._read(at, size, where)
        objects: dict[int, bytes] = {}
        here = 16
        while here + 16 <= size:
            index, _, length = struct.unpack_from("<HH4xQ", data, here)
            if index == 0:  # free space, which is the rest
                break
            if index in objects or here + 16 + length > size:
                self.refuse(where, "malformed HDF5: a global heap that breaks its rule", found=f"object {index}")
            objects[index] = data[here + 16 : here + 16 + length]
            here += 16 + -(-length // 8) * 8
        return objects
