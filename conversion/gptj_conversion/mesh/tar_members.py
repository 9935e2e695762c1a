"""The headers of a tar archive, read one after the other, with nothing in them believed before it is checked.

Python's tarfile follows extension headers by calling itself, takes a negative size as a way back, and knows sparse
members whose size is what they say. Here a member is its ustar header and at most a few extension headers before it
(GNU's long names, POSIX's pax records); everything else about a member (owner, mode, dates) is not looked at.
The format is POSIX.1-2017, pax, "ustar Interchange Format", with GNU's base-256 numbers and long names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NoReturn

from gptj.errors import FormatError, GPTJError, LimitError, UnsafeFileError, shown
from gptj.reading.files import read_into

__all__ = ["TarMember", "tar_members"]

MOST_MEMBERS = 100_000
MOST_EXTENSIONS = 8  # before one member: a long name, a long link, pax records, global ones
LARGEST_EXTENSION_BYTES = 2**20
LARGEST_EXTENSIONS_BYTES = 2**26  # of the whole archive
LARGEST_END_BYTES = 2**26  # of zeros after the last member; tape drives wanted up to 2**20

_BLOCK = 512
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device or FIFO",
    b"4": "a device or FIFO",
    b"6": "a device or FIFO",
    b"S": "a sparse file",
    b"M": "the rest of a file in another volume",
}


@dataclasses.dataclass(frozen=True)
class TarMember:
    """A file or folder: its name, where its data begin, and how many bytes they are."""

    name: str
    is_folder: bool
    offset: int
    nbytes: int


def tar_members(stream: BinaryIO, path: Path) -> Iterator[TarMember]:
    """The plain files and folders of the archive, in order; `path` is what errors name.

    Raises:
        FormatError: it is malformed, is cut short, or has something after its end.
        LimitError: more members, or longer headers, than any checkpoint needs.
        UnsafeFileError: a member is a link, a device or sparse.
    """
    size = os.fstat(stream.fileno()).st_size
    reader = _Reader(stream, path, size)
    at, number = 0, 0
    while True:
        at, header, renamed = reader.next_header(at)
        if header is None:
            return
        number += 1
        if number > MOST_MEMBERS:
            raise LimitError("too many members", file=path, expected=f"at most {MOST_MEMBERS}")
        member = reader.member(at, header, renamed)
        yield member
        at = member.offset + _round_up(member.nbytes)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK


class _Reader:
    """Reads the headers of one archive."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self._stream = stream
        self._path = path
        self._size = size
        self._extensions_bytes = 0

    def _refuse(self, problem: str, at: int, error: type[GPTJError] = FormatError, **facts: object) -> NoReturn:
        raise error(problem, file=self._path, where=f"byte {at}", **facts)  # type: ignore[arg-type]

    def _read(self, at: int, nbytes: int, what: str) -> bytes:
        if at + nbytes > self._size:
            self._refuse(
                "cut short", at, expected=f"{what} of {nbytes} bytes", found=f"{max(0, self._size - at)} bytes"
            )
        data = bytearray(nbytes)
        read_into(self._stream, memoryview(data), at, file=self._path, where=what)
        return bytes(data)

    def next_header(self, at: int) -> tuple[int, bytes | None, dict[str, str]]:
        """The place of a member's header, the header, and what the extension headers before it say; None at the end."""
        said: dict[str, str] = {}
        for _ in range(MOST_EXTENSIONS + 1):
            header = self._read(at, _BLOCK, "a header")
            if not header.strip(b"\0"):
                if said:
                    self._refuse("an extension header without a member", at)
                self._require_end(at)
                return at, None, said
            self._require_checksum(header, at)
            kind = header[156:157]
            if kind not in b"xgXLK":
                return at, header, said
            nbytes = self._size_in(header, at)
            self._extensions_bytes += nbytes
            if nbytes > LARGEST_EXTENSION_BYTES or self._extensions_bytes > LARGEST_EXTENSIONS_BYTES:
                self._refuse(
                    "a header too long", at, LimitError,
                    expected=f"at most {LARGEST_EXTENSION_BYTES} bytes, and {LARGEST_EXTENSIONS_BYTES} in all",
                    found=f"{nbytes}, and {self._extensions_bytes} in all",
                )  # fmt: skip
            data = self._read(at + _BLOCK, nbytes, "an extension header")
            if kind == b"L":
                said["path"] = self._text(data.rstrip(b"\0"), at)
            elif kind in b"xX":
                said |= self._pax(data, at)
            elif kind == b"g":
                self._require_harmless(self._pax(data, at), at)
            at += _BLOCK + _round_up(nbytes)
        self._refuse(
            "too many extension headers before a member", at, LimitError, expected=f"at most {MOST_EXTENSIONS}"
        )

    def member(self, at: int, header: bytes, said: Mapping[str, str]) -> TarMember:
        """The member with this header, which extension headers may have given another name and size."""
        name = said.get("path") or self._name(header, at)
        kind = header[156:157]
        if sparse := next((key for key in said if key.startswith("GNU.sparse.")), None):
            self._refuse_kind("a sparse file", said.get("GNU.sparse.name", name) or sparse)
        if kind in _REFUSED:
            self._refuse_kind(_REFUSED[kind], name)
        if kind not in b"0\x005\x37":
            self._refuse_kind(f"of type {shown(kind)}", name)
        is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        nbytes = self._pax_size(said["size"], at) if "size" in said else self._size_in(header, at)
        if is_folder and nbytes:
            self._refuse("a folder with data", at, found=f"{shown(name)}, {nbytes} bytes")
        end = at + _BLOCK + nbytes
        if end > self._size:
            raise FormatError(
                "cut short", file=self._path, where=shown(name), expected=f"{end} bytes", found=f"{self._size} bytes"
            )
        return TarMember(name.rstrip("/") if is_folder else name, is_folder, at + _BLOCK, nbytes)

    def _refuse_kind(self, kind: str, name: str) -> NoReturn:
        raise UnsafeFileError(
            f"the member is {kind}", file=self._path, where=shown(name), expected="plain files and folders"
        )

    def _require_checksum(self, header: bytes, at: int) -> None:
        """Refuse a header whose bytes, added with or without their signs, are not what it says."""
        rest = header[:148] + b" " * 8 + header[156:]
        found = sum(rest)
        signed = found - 256 * sum(byte > 127 for byte in rest)
        field = header[148:156].strip(b" \0")
        said = int(field, 8) if field and not field.strip(b"01234567") else None
        if said not in (found, signed):
            self._refuse(
                "not a tar header, or a damaged one", at, expected=f"a checksum of {found:o}", found=shown(field)
            )

    def _size_in(self, header: bytes, at: int) -> int:
        """The size field: octal digits, or base 256 behind a first bit that is set."""
        field = header[124:136]
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if field[0] & 0x80 or digits.strip(b"01234567"):
            negative = field[0] & 0xC0 == 0xC0 or digits.startswith(b"-")
            self._refuse("a negative size" if negative else "a size that is no number", at, found=shown(field))
        return int(digits, 8) if digits else 0

    def _name(self, header: bytes, at: int) -> str:
        name = header[:100].split(b"\0")[0]
        prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return self._text(prefix + b"/" + name if prefix else name, at)

    def _text(self, raw: bytes, at: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("a member's name is not UTF-8", at, found=shown(raw))

    def _pax(self, data: bytes, at: int) -> dict[str, str]:
        """The records of a pax header: `LENGTH KEY=VALUE` and a newline each, the length that of the whole record."""
        records: dict[str, str] = {}
        begin = 0
        while begin < len(data):
            digits = data[begin : begin + 8].split(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            record = data[begin + len(digits) + 1 : begin + length]
            key, equals, value = record[:-1].partition(b"=")
            if begin + length > len(data) or length < len(digits) + 4 or not equals or record[-1:] != b"\n":
                self._refuse("a pax record that breaks its rule", at, found=shown(data[begin : begin + 40]))
            if key in (b"path", b"size", b"GNU.sparse.name") or key.startswith(b"GNU.sparse."):
                records[self._text(key, at)] = self._text(value, at)
            begin += length
        return records

    def _require_harmless(self, records: Mapping[str, str], at: int) -> None:
        """Refuse global records that would rename or resize every member after them."""
        if records:
            self._refuse("a pax record for all members that only one can have", at, found=shown(", ".join(records)))

    def _pax_size(self, text: str, at: int) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > 20:
            self._refuse("a size that is no number", at, found=shown(text))
        return int(text)

    def _require_end(self, at: int) -> None:
        """Refuse anything but zeros from the first block of zeros on."""
        if self._size - at > LARGEST_END_BYTES:
            self._refuse(
                "too much after its end", at, LimitError, expected=f"at most {LARGEST_END_BYTES} bytes of zeros",
                found=f"{self._size - at} bytes",
            )  # fmt: skip
        while at < self._size:
            block = self._read(at, min(2**20, self._size - at), "zeros")
            if block.strip(b"\0"):
                self._refuse(
                    "something stands after its end", at, expected="zeros",
                    hint="Two archives in one file? Cut or unpack it",
                )  # fmt: skip
            at += len(block)
