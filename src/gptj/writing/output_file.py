"""A file that is written, forced to the disk, and read again from there.

What is read back comes from the disk, not from memory: once the file has been forced there, the kernel is asked to drop
its pages, where it can be asked. Large runs of bytes that lie page by page go past the page cache, where a file system
has that way: to find pages for them, and fill those, is a quarter of a conversion's CPU time (28.1 s in place of 21.3
for 12.1 GB). What must go through it is forced and dropped window by window, so that it never fills.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from gptj.errors import WriteError
from gptj.reading.buffers import PAGE_BYTES, begins_a_page
from gptj.writing.file_system import FileSystem, call_at, write_error

__all__ = ["BLOCK_BYTES", "Checksum", "OutputFile", "whole_file"]

BLOCK_BYTES = 2**22
"""The bytes that are read back at a time; into one buffer, since fresh memory costs more than reading."""

DIRECT_BYTES = 2**20
"""The bytes from which a run goes past the page cache; a shorter one waits for the disk longer than it saves."""

WINDOW_BYTES = 2**27
"""The bytes that are written, or read back, before the kernel is asked to drop it from memory."""


class Checksum(Protocol):
    """The interface of hashlib's objects."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """The checksum of everything so far."""


class OutputFile:
    """A file of the stage, written from the front; `rewrite` goes back to room that was left."""

    def __init__(self, fs: FileSystem, path: Path) -> None:
        self.path = path
        self._fs = fs
        self._descriptor = call_at(path, fs.create, path)
        self.nbytes = 0
        self._in_memory = 0
        self._may_be_direct = True

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        while view:
            direct = self._write_direct(view)
            count = direct or call_at(self.path, self._fs.write, self._descriptor, view)
            if count <= 0:
                raise WriteError("nothing was written", file=self.path)
            view = view[count:]
            self.nbytes += count
            self._in_memory += count - direct
            if self._in_memory >= WINDOW_BYTES:
                call_at(self.path, self._fs.fsync, self._descriptor)
                self._drop_pages()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`, over what stands there or beyond the end, for formats that are not streamed."""
        end = self.nbytes
        call_at(self.path, self._fs.seek, self._descriptor, offset)
        self.nbytes = offset
        self.write(data)
        self.nbytes = max(end, self.nbytes)

    def read_at(self, offset: int, count: int) -> bytes:
        """The bytes at `offset`, fewer than `count` where the file or the system gives no more."""
        call_at(self.path, self._fs.seek, self._descriptor, offset)
        buffer = memoryview(bytearray(count))
        found = call_at(self.path, self._fs.read_into, self._descriptor, buffer)
        return bytes(buffer[:found])

    def rewrite(self, data: bytes) -> None:
        """Put `data` at the front, over what stands there, and finish."""
        assert len(data) <= self.nbytes
        self.write_at(0, data)

    def finish(self) -> tuple[str, list[str]]:
        """Force the file to the disk and read it again; returns the sha256 of what it now holds, and []."""
        [whole] = self.read_back([sys.maxsize], hashlib.sha256)
        return whole, []

    def read_back(self, parts: Sequence[int], checksum: Callable[[], Checksum]) -> list[str]:
        """Force the file to the disk, read it again and close it.

        Args:
            parts: the bytes of each part, one after the other, that is to have a checksum of its own.
            checksum: makes one.

        Returns:
            The checksum of each part of what the file now holds. Bytes after the last part count into none, and
            are for the caller to rule out by the file's size.
        """
        fs = self._fs
        call_at(self.path, fs.fsync, self._descriptor)
        self._drop_pages()
        call_at(self.path, fs.seek, self._descriptor, 0)
        sums = [checksum() for _ in parts]
        left = [*parts]
        number = 0
        for block in self._blocks():
            while len(block) and number < len(parts):
                taken = block[: left[number]]
                sums[number].update(taken)
                left[number] -= len(taken)
                block = block[len(taken) :]
                number += left[number] == 0
        self.close()
        return [part.hexdigest() for part in sums]

    def close(self) -> None:
        """Close the file; closing it twice does no harm."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            call_at(self.path, self._fs.close, descriptor)

    def _write_direct(self, view: memoryview) -> int:
        """The bytes of `view` that were written past the page cache, 0 where that is no way for them."""
        pages = len(view) // PAGE_BYTES * PAGE_BYTES
        placed = pages >= DIRECT_BYTES and self.nbytes % PAGE_BYTES == 0 and begins_a_page(view)
        if not placed or not self._may_be_direct:
            return 0
        try:
            return self._fs.write_direct(self._descriptor, view[:pages])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise write_error(self.path, error) from error
        self._may_be_direct = False
        return 0

    def _blocks(self) -> Iterator[memoryview]:
        """The file from here to its end; each block is overwritten by the next."""
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while count := call_at(self.path, self._fs.read_into, self._descriptor, buffer):
            yield buffer[:count]
            self._in_memory += count
            if self._in_memory >= WINDOW_BYTES:
                self._drop_pages()

    def _drop_pages(self) -> None:
        """Drop from memory what the disk has."""
        self._in_memory = 0
        with contextlib.suppress(OSError):  # an advice; who cannot take it compares with what memory holds
            self._fs.drop_pages(self._descriptor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Callable[[bytes | memoryview], object]]:
    """Give what writes a single file, which takes its place when all of it is on the disk, or not at all.

    Raises:
        WriteError: it could not be written.
    """
    # Processes of two machines that share a folder may have one number: in containers it is often the same.
    stage = path.with_name(f".{path.name}.gptj-stage-{secrets.token_hex(6)}")
    try:
        with stage.open("xb") as stream:
            yield stream.write
            stream.flush()
            os.fsync(stream.fileno())
        stage.replace(path)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            stage.unlink()
