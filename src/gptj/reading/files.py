"""Regular files, read without buffering: what tells one from any other, and bytes into memory of the caller's."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptj.errors import FormatError, GPTJError, MissingFileError
from gptj.paths import kind_of_path

__all__ = ["ALIGNMENT", "BLOCK_BYTES", "FileIdentity", "file_identity", "open_regular_file", "read_into", "read_up_to"]

ALIGNMENT = 64
"""Bytes: data that begins at a multiple of this, in the file or in memory, is used by jax without a copy."""

BLOCK_BYTES = 16 * 2**20
"""Bytes that are read, cast, hashed or written at a time: the buffer beside the one tensor that is held."""

FileIdentity = tuple[int, int, int, int]


@contextlib.contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open for unbuffered reading; a FIFO or device is refused before it is opened.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is not a regular file, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = kind_of_path(status.st_mode)
            raise FormatError("not a regular file", file=path, expected="a regular file", found=kind)
        stream = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise MissingFileError("no such file", file=path) from None
    except GPTJError:
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be read: {error}", file=path) from None
    with stream:
        yield stream


def file_identity(stream: BinaryIO) -> FileIdentity:
    """The numbers that tell this file, in this state, from any other."""
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_into(stream: BinaryIO, out: memoryview, offset: int, *, file: Path, where: str) -> None:
    """Fill `out` with the file's bytes from `offset` on.

    Raises:
        FormatError: the file ends before, or cannot be read.
    """
    filled = 0
    try:
        stream.seek(offset)
        while filled < len(out):
            count: int = stream.readinto(out[filled:])  # type: ignore[attr-defined]
            if not count:
                raise FormatError(
                    "changed while being read: it ends too early",
                    file=file,
                    where=where,
                    expected=f"{offset + len(out)} bytes",
                    found=f"{offset + filled} bytes",
                )
            filled += count
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=file, where=where) from None


def read_up_to(stream: BinaryIO, count: int) -> bytes:
    """The next `count` bytes, or as many as there are."""
    pieces = []
    while count > 0 and (piece := stream.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
