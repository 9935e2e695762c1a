"""Zip archives whose members are stored, not compressed: what NumPy's .npz and PyTorch's .bin are.

Python's zipfile believes the central directory; here it is checked first. Every member must be stored (so no
member can expand), its local header must say what the directory says, and the members must follow one another
without overlap, hole or trailing bytes; so each byte of the file has one meaning. Members are then read where
they lie, a block at a time, and their checksums are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gptj.errors import FormatError, GPTJError, LimitError, UnsafeFileError, shown
from gptj.reading.files import FileIdentity, file_identity, open_regular_file, read_into
from gptj.reading.kinds import HEAD_BYTES, describe_file
from gptj.reading.zip_layout import END, END64, ENTRY, FULL16, FULL32, LOCAL, LOCATOR64

__all__ = ["StoredZip", "ZipMember", "open_stored_zip"]

MOST_MEMBERS = 100_000
LARGEST_DIRECTORY_BYTES = 16 * 2**20
LONGEST_NAME = 512
BLOCK_BYTES = 8 * 2**20

_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800


@dataclasses.dataclass(frozen=True)
class ZipMember:
    """The place of a member. `offset` is its first byte in the file, and `crc32` the checksum that it must have."""

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class StoredZip:
    """An archive whose directory has been checked. It is open only while something is read.

    Attributes:
        path: what errors name: the file, or its name inside another.
        members: by name.
        identity: the file's, when it was opened.
        container: the file to read.
        begin, nbytes: which part of it is the archive.
    """

    path: Path
    members: dict[str, ZipMember]
    identity: FileIdentity
    container: Path
    begin: int
    nbytes: int

    @property
    def has_checksums(self) -> bool:
        """Whether its writer noted any: torch leaves all at 0 after `set_crc32_options(False)`."""
        return any(member.crc32 for member in self.members.values())

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file, open for reading, the same before and after as when the directory was checked.

        Raises:
            FormatError: it has changed since.
        """
        with open_regular_file(self.container) as stream:
            self._require_unchanged(stream)
            yield _part(stream, self.begin)
            self._require_unchanged(stream)

    def _require_unchanged(self, stream: BinaryIO) -> None:
        if file_identity(stream) != self.identity:
            raise FormatError("changed while being read", file=self.path, hint="Open it again when it is complete")

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """A whole small member.

        Raises:
            LimitError: it is larger than `limit_bytes`.
            FormatError: its checksum is wrong.
        """
        member = self.members[name]
        if member.nbytes > limit_bytes:
            raise LimitError(
                "too large",
                file=self.path,
                where=name,
                expected=f"at most {limit_bytes} bytes",
                found=f"{member.nbytes} bytes",
            )
        data = bytearray(member.nbytes)
        with self.open() as stream:
            read_into(stream, memoryview(data), member.offset, file=self.path, where=name)
        self.require_checksum(member, zlib.crc32(data))
        return bytes(data)

    def require_checksum(self, member: ZipMember, found: int) -> None:
        """Raise FormatError unless `found` is the checksum that the archive gives for the member."""
        if found != member.crc32 and self.has_checksums:
            raise FormatError(
                "its bytes have another checksum",
                file=self.path,
                where=member.name,
                expected=f"CRC-32 {member.crc32:08x}",
                found=f"{found:08x}",
                hint="The file is damaged; fetch it again",
            )


class _Part(io.RawIOBase):
    """A file from some byte on; offsets count from there."""

    def __init__(self, stream: BinaryIO, begin: int) -> None:
        self._stream = stream
        self._begin = begin

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        return self._stream.seek(self._begin + offset) - self._begin

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        return count


def _part(stream: BinaryIO, begin: int) -> BinaryIO:
    return stream if begin == 0 else _Part(stream, begin)  # type: ignore[return-value]


def open_stored_zip(
    path: Path, *, container: Path | None = None, begin: int = 0, nbytes: int | None = None
) -> StoredZip:
    """The archive at `path`, its directory and all local headers checked; no member's data is read.

    With `container` it is the part of that file that begins at `begin` and is `nbytes` long, and `path` only its
    name.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is no zip archive, is cut short, or contradicts itself.
        LimitError: it has more members than any checkpoint needs.
        UnsafeFileError: a member's name would lead outside a folder.
    """
    container = path if container is None else container
    with open_regular_file(container) as file:
        identity = file_identity(file)
        size = identity[2] if nbytes is None else nbytes
        stream = _part(file, begin)
        directory_at, directory_bytes, count = _find_directory(stream, path, size)
        directory = bytearray(directory_bytes)
        read_into(stream, memoryview(directory), directory_at, file=path, where="directory")
        entries = _parse_directory(bytes(directory), count, path)
        members = _check_local_headers(stream, entries, directory_at, path)
    return StoredZip(path, members, identity, container, begin, size)


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    raw_name: bytes
    flags: int
    crc32: int
    nbytes: int
    header_at: int


def _refuse(path: Path, problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
    raise error(problem, file=path, **facts)


def _find_directory(stream: BinaryIO, path: Path, size: int) -> tuple[int, int, int]:
    """The central directory's offset and length in bytes, and the number of members that it must have."""
    tail = bytearray(min(size, END.size + LOCATOR64.size + END64.size))
    read_into(stream, memoryview(tail), size - len(tail), file=path, where="end of the archive")
    if len(tail) < END.size or bytes(tail[-END.size :][:4]) != b"PK\x05\x06":
        head = bytearray(min(size, HEAD_BYTES))
        read_into(stream, memoryview(head), 0, file=path, where="beginning")
        _refuse_other(path, bytes(head), size)
    _, disk, start_disk, here, count, nbytes, at, comment = END.unpack(tail[-END.size :])
    if disk or start_disk or comment:
        _refuse(path, "a zip archive in several parts or with a comment", expected="neither")
    end = size - END.size
    locator = bytes(tail[: -END.size][-LOCATOR64.size :])
    if locator[:4] == b"PK\x06\x07" and len(tail) > END.size + LOCATOR64.size:
        end, wide = _wide_end(path, bytes(tail), end, locator)
        narrow = (here, count, nbytes, at)
        full = (FULL16, FULL16, FULL32, FULL32)
        if any(n not in (w, f) for n, w, f in zip(narrow, wide, full, strict=True)):
            _refuse(path, "its two ends of the directory disagree", expected=str(wide), found=str(narrow))
        here, count, nbytes, at = wide
    elif FULL16 in (here, count) or FULL32 in (nbytes, at):
        _refuse(path, "its 64-bit end of the directory is missing")
    if here != count:
        _refuse(path, "its directory contradicts itself", expected=f"{count} members", found=here)
    if count > MOST_MEMBERS or nbytes > LARGEST_DIRECTORY_BYTES:
        _refuse(
            path,
            "too many members",
            LimitError,
            expected=f"at most {MOST_MEMBERS} in {LARGEST_DIRECTORY_BYTES} bytes",
            found=f"{count} in {nbytes} bytes",
        )
    if at + nbytes != end:
        _refuse(
            path, "its directory is not where it says", expected=f"an end at byte {end}", found=f"byte {at + nbytes}"
        )
    return at, nbytes, count


def _wide_end(path: Path, tail: bytes, end: int, locator: bytes) -> tuple[int, tuple[int, int, int, int]]:
    """The offset of the 64-bit end record, and its counts, size and offset of the directory."""
    _, disk, at, disks = LOCATOR64.unpack(locator)
    record = tail[: -END.size - LOCATOR64.size][-END64.size :]
    begins = end - LOCATOR64.size - END64.size
    if len(record) != END64.size or record[:4] != b"PK\x06\x06" or at != begins or disk or disks > 1:
        _refuse(
            path, "its 64-bit end of the directory is not where it says", expected=f"byte {begins}", found=f"byte {at}"
        )
    _, length, _, _, disk, start_disk, here, count, nbytes, offset = END64.unpack(record)
    if length != END64.size - 12 or disk or start_disk:
        _refuse(
            path, "its 64-bit end of the directory breaks its rule", expected=f"{END64.size - 12} bytes", found=length
        )
    return begins, (here, count, nbytes, offset)


def _refuse_other(path: Path, head: bytes, size: int) -> NoReturn:
    """Say what a file that is no complete zip archive seems to be."""
    if head.startswith(b"PK\x03\x04"):
        kind: str | None = "a zip archive that is cut short, or has bytes after its end"
    else:
        kind = describe_file(head, size)
    _refuse(
        path,
        f"this is {kind}" if kind else "not a zip archive",
        expected="a complete zip archive",
        found=f"{size} bytes",
    )


def _parse_directory(directory: bytes, count: int, path: Path) -> list[_Entry]:
    """The directory's entries, each checked by itself, in the order of their data."""
    entries: list[_Entry] = []
    seen: set[str] = set()
    at = 0
    for _ in range(count):
        fixed = directory[at : at + ENTRY.size]
        if len(fixed) != ENTRY.size or fixed[:4] != b"PK\x01\x02":
            _refuse(path, "its directory is cut short", expected=f"{count} members", found=f"{len(entries)} members")
        (_, _, _, flags, method, _, _, crc32, packed, nbytes, n_name, n_extra, n_comment, disk, _, _, header_at) = (
            ENTRY.unpack(fixed)
        )
        raw_name = directory[at + ENTRY.size :][:n_name] if n_name <= LONGEST_NAME else b""
        name = _check_name(raw_name, n_name, path)
        extra = directory[at + ENTRY.size + n_name : at + ENTRY.size + n_name + n_extra]
        at += ENTRY.size + n_name + n_extra + n_comment
        nbytes, packed, header_at = _widen(extra, [nbytes, packed, header_at], path, name)
        if name in seen:
            _refuse(path, "the member stands twice in the archive", where=shown(name))
        seen.add(name)
        if method or packed != nbytes:
            _refuse(
                path, "a compressed member", where=shown(name), expected="stored members only", found=f"method {method}"
            )
        if flags & ~(_DESCRIPTOR | _UTF8) or disk:
            _refuse(path, "an encrypted or patched member", where=shown(name), found=f"flags 0x{flags:04x}")
        entries.append(_Entry(name, raw_name, flags, crc32, nbytes, header_at))
    if at != len(directory):
        _refuse(
            path, "its directory has bytes after its last member", expected=f"{at} bytes", found=f"{len(directory)}"
        )
    return sorted(entries, key=lambda entry: entry.header_at)


def _check_name(raw: bytes, length: int, path: Path) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(path, "a member's name is not UTF-8", found=shown(raw))
    parts = name.split("/")
    if length > LONGEST_NAME or not name or not name.isprintable():
        _refuse(path, "not a member's name", expected=f"1 to {LONGEST_NAME} printable characters", found=shown(name))
    if "\\" in name or ":" in parts[0] or name.startswith("/") or ".." in parts:
        _refuse(
            path, "a member's name leads outside", UnsafeFileError, where=shown(name), expected="a plain relative name"
        )
    return name


def _widen(extra: bytes, fields: list[int], path: Path, name: str) -> list[int]:
    """`fields` with those that are all ones taken from the 64-bit extra field, in their fixed order."""
    if FULL32 not in fields:
        return fields
    wide = _extra_field(extra, 1)
    for n, value in enumerate(fields):
        if value == FULL32:
            if len(wide) < 8:
                _refuse(path, "its 64-bit sizes are missing", where=shown(name))
            fields[n] = int.from_bytes(wide[:8], "little")
            wide = wide[8:]
    return fields


def _extra_field(extra: bytes, wanted: int) -> bytes:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == wanted:
            return extra[4 : 4 + length]
        extra = extra[4 + length :]
    return b""


def _check_local_headers(stream: BinaryIO, entries: list[_Entry], end: int, path: Path) -> dict[str, ZipMember]:
    """Each entry's data, after its local header has been found to agree and to touch its neighbours."""
    members: dict[str, ZipMember] = {}
    position = 0
    for number, entry in enumerate(entries):
        where = shown(entry.name)
        if entry.header_at != position:
            _refuse(
                path,
                "overlaps the member before it" if entry.header_at < position else "leaves a hole before it",
                where=where,
                expected=f"a header at byte {position}",
                found=f"byte {entry.header_at}",
            )
        header = bytearray(min(LOCAL.size + len(entry.raw_name), end - position))
        read_into(stream, memoryview(header), position, file=path, where=where)
        n_extra = LOCAL.unpack_from(header)[10] if len(header) >= LOCAL.size else 0
        extra = bytearray(min(n_extra, end - position - len(header)))
        read_into(stream, memoryview(extra), position + len(header), file=path, where=where)
        _require_same(bytes(header), bytes(extra), entry, path)
        data_at = position + len(header) + n_extra
        position = data_at + entry.nbytes
        following = entries[number + 1].header_at if number + 1 < len(entries) else end
        if entry.flags & _DESCRIPTOR and following - position in (12, 16, 20, 24):
            position = following
        if position > end:
            _refuse(
                path, "lies outside the archive", where=where, expected=f"an end at byte {end} at most", found=position
            )
        members[entry.name] = ZipMember(entry.name, data_at, entry.nbytes, entry.crc32)
    if position != end:
        _refuse(
            path, "bytes that belong to no member", expected=f"the directory at byte {position}", found=f"byte {end}"
        )
    return members


def _require_same(header: bytes, extra: bytes, entry: _Entry, path: Path) -> None:
    """Make sure that a local header says what the directory says."""
    if len(header) < LOCAL.size:
        _refuse(path, "lies outside the archive", where=shown(entry.name))
    signature, _, flags, method, _, _, crc32, packed, nbytes, n_name, _ = LOCAL.unpack_from(header)
    agrees = signature == b"PK\x03\x04" and n_name == len(entry.raw_name) and header[LOCAL.size :] == entry.raw_name
    if not agrees or method or flags != entry.flags:
        _refuse(path, "its local header disagrees with the directory", where=shown(entry.name))
    if flags & _DESCRIPTOR:
        return  # sizes and checksum stand behind the data, and the directory has them
    nbytes, packed = _widen(extra, [nbytes, packed], path, entry.name)
    if (nbytes, packed, crc32) != (entry.nbytes, entry.nbytes, entry.crc32):
        _refuse(
            path,
            "its local header disagrees with the directory",
            where=shown(entry.name),
            expected=f"{entry.nbytes} bytes, CRC-32 {entry.crc32:08x}",
            found=f"{nbytes} bytes, CRC-32 {crc32:08x}",
        )
