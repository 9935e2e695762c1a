"""Zip archives whose members are stored, written from front to end."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from gptj.reading.zip_layout import (
    END,
    END64,
    ENTRY,
    FULL16,
    FULL32,
    JANUARY_1980,
    LOCAL,
    LOCATOR64,
    WIDE_LOCAL,
    ZIP64_FROM,
)

__all__ = ["StoredZipWriter"]


class StoredZipWriter:
    """Writes a stored zip from front to end, to the byte as np.savez does: fixed dates, 64-bit local headers.

    Args:
        write: takes the bytes, one run after the other.
        alignment: members begin at multiples of it, behind a padding field in their header; 1 for none, as np.savez.
    """

    def __init__(self, write: Callable[[bytes | memoryview], object], *, alignment: int = 1) -> None:
        self._write = write
        self._alignment = alignment
        self._entries: list[bytes] = []
        self._at = 0

    def add(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a member whose data are these parts, one after the other; a memoryview is of bytes."""
        raw = name.encode("utf-8")
        crc32, nbytes = 0, 0
        for part in parts:
            crc32 = zlib.crc32(part, crc32)
            nbytes += len(part)
        large = nbytes >= ZIP64_FROM
        version = 45 if large else 20
        size = FULL32 if large else nbytes
        extra = WIDE_LOCAL.pack(1, 16, nbytes, nbytes)
        extra += self._padding(self._at + LOCAL.size + len(raw) + len(extra))
        local = LOCAL.pack(b"PK\x03\x04", version, 0, 0, 0, JANUARY_1980, crc32, size, size, len(raw), len(extra))
        header_at = self._at
        for data in (local, raw, extra, *parts):
            self._write(data)
            self._at += len(data)
        self._entries.append(self._entry(raw, version, crc32, nbytes, header_at))

    def _padding(self, at: int) -> bytes:
        """An extra field, of the kind that torch uses, after which the next byte is aligned."""
        if at % self._alignment == 0:
            return b""
        count = -(at + 4) % self._alignment
        return struct.pack("<2sH", b"FB", count) + b"Z" * count

    def finish(self) -> None:
        """Write the directory."""
        directory = b"".join(self._entries)
        count, at = len(self._entries), self._at
        self._write(directory)
        if at > ZIP64_FROM or len(directory) > ZIP64_FROM or count > FULL16:
            wide = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, len(directory), at)
            self._write(wide + LOCATOR64.pack(b"PK\x06\x07", 0, at + len(directory), 1))
        few, low = min(count, FULL16), min(at, FULL32)
        self._write(END.pack(b"PK\x05\x06", 0, 0, few, few, len(directory), low, 0))

    @staticmethod
    def _entry(raw: bytes, version: int, crc32: int, nbytes: int, header_at: int) -> bytes:
        wide: list[int] = []
        if nbytes >= ZIP64_FROM:
            wide += [nbytes, nbytes]
        if header_at > ZIP64_FROM:
            wide.append(header_at)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = FULL32 if nbytes >= ZIP64_FROM else nbytes
        at = FULL32 if header_at > ZIP64_FROM else header_at
        version = 45 if wide else version
        return (
            ENTRY.pack(
                b"PK\x01\x02", version | 3 << 8, version, 0, 0, 0, JANUARY_1980, crc32, size, size,
                len(raw), len(extra), 0, 0, 0, 0o600 << 16, at,
            )
            + raw
            + extra
        )  # fmt: skip
