"""The frames of a zstandard file: walked without unpacking anything, then unpacked one by one, checksums and all.

libzstd reads a stream for as long as it finds one, so a file that ends in the middle of a frame looks complete if all
data had come before, and the frame's checksum, its last four bytes, is never compared. Each frame says its own length
in the headers of its blocks; so where a frame ends, and that the file ends there too, is known before it is unpacked.
The format is RFC 8878.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from gptj.errors import BackendError, FormatError, GPTJError, LimitError, install_line, shown
from gptj.reading.files import open_regular_file

__all__ = ["is_zstandard", "unpack"]

MOST_FRAMES = 100_000
ENOUGH_BLOCKS = 100_000
LEAST_BLOCK_BYTES = 64
"""Beyond `ENOUGH_BLOCKS`, how long a file's blocks must be in the mean; any writer's are hundreds of times as long."""

LARGEST_WINDOW_BYTES = 2**31

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_BLOCK = 2**20


def is_zstandard(head: bytes) -> bool:
    """Whether a file that begins with `head` is one: a frame, or one to be skipped, as pzstd writes first."""
    return head[:4] == _MAGIC or (len(head) >= 4 and int.from_bytes(head[:4], "little") in _SKIPPABLE)


def unpack(path: Path) -> Iterator[bytes]:
    """The file's unpacked bytes, some bytes at a time; whoever takes them decides how many are too many.

    Raises:
        FormatError: it is malformed, cut short, or has something else after its last frame.
        LimitError: more frames or smaller blocks than any writer makes.
        BackendError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise BackendError("zstandard is not installed", file=path, hint=install_line("convert")) from None
    with open_regular_file(path) as stream:
        frames = list(_Walk(stream, path).frames())
        if not frames:
            raise FormatError("a zstandard file without any data", file=path, expected="a frame that is not skipped")
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        for begin, end in frames:
            rest = _Range(stream, begin, end)
            part = io.BufferedReader(rest, _BLOCK)
            try:
                with decompressor.stream_reader(part, closefd=False) as reader:
                    while block := reader.read(_BLOCK):
                        yield block
            except zstandard.ZstdError as error:
                raise FormatError(
                    f"malformed zstandard: {shown(str(error), longest=120)}",
                    file=path,
                    where=f"the frame at byte {begin}",
                    hint="The file is damaged; fetch it again",
                ) from None
            if not rest.is_read:
                raise FormatError("changed while being read: it ends too early", file=path)


class _Range(io.RawIOBase):
    """Some bytes of a file."""

    def __init__(self, stream: BinaryIO, begin: int, end: int) -> None:
        self._stream = stream
        self._at = begin
        self._end = end

    @property
    def is_read(self) -> bool:
        """Whether all of them have been read."""
        return self._at == self._end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: self._end - self._at]  # type: ignore[arg-type]
        self._stream.seek(self._at)
        count: int = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


class _Walk:
    """Finds where the frames of a file begin and end."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._path = path
        self._size = os.fstat(stream.fileno()).st_size
        self._most_blocks = ENOUGH_BLOCKS + self._size // LEAST_BLOCK_BYTES
        self._stream = stream
        self._blocks = 0

    def frames(self) -> Iterator[tuple[int, int]]:
        """The first byte of each frame that has data, and the one after its last."""
        at, number = 0, 0
        while at < self._size:
            number += 1
            if number > MOST_FRAMES:
                self._refuse("too many frames", at, LimitError, expected=f"at most {MOST_FRAMES}")
            magic = self._read(at, 4, "a frame")
            if magic == _MAGIC:
                end = self._frame_end(at)
                yield at, end
            elif int.from_bytes(magic, "little") in _SKIPPABLE:
                end = at + 8 + int.from_bytes(self._read(at + 4, 4, "a frame to be skipped"), "little")
                if end > self._size:
                    self._refuse_cut(at, end)
            else:
                self._refuse(
                    "something stands after its last frame" if at else "not a zstandard file", at,
                    expected="the end, or another frame", found=shown(magic),
                )  # fmt: skip
            at = end

    def _refuse(self, problem: str, at: int, error: type[GPTJError] = FormatError, **facts: object) -> NoReturn:
        raise error(problem, file=self._path, where=f"byte {at}", **facts)  # type: ignore[arg-type]

    def _refuse_cut(self, at: int, end: int) -> NoReturn:
        self._refuse(
            "cut short in a zstandard frame", at, expected=f"{end} bytes at least", found=f"{self._size} bytes",
            hint="The file is not complete; fetch it again",
        )  # fmt: skip

    def _read(self, at: int, nbytes: int, what: str) -> bytes:
        if at + nbytes > self._size:
            self._refuse_cut(at, at + nbytes)
        self._stream.seek(at)
        data = b""
        while len(data) < nbytes:
            more = self._stream.read(nbytes - len(data))
            if not more:
                self._refuse(f"changed while being read: {what} ends too early", at)
            data += more
        return data

    def _frame_end(self, at: int) -> int:
        """The byte after a frame's last, from its header and those of its blocks."""
        descriptor = self._read(at + 4, 1, "a frame's header")[0]
        if descriptor & 0x08:
            self._refuse("a zstandard frame of a kind that is not known", at, found=f"descriptor 0x{descriptor:02x}")
        single = bool(descriptor & 0x20)
        content = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        begin = at + 5 + (not single)
        if any(self._read(begin, dictionary, "a frame's header")):
            self._refuse("needs a dictionary that it does not hold", at)
        at = begin + dictionary + content
        last = False
        while not last:
            self._blocks += 1
            if self._blocks > self._most_blocks:
                self._refuse("more blocks than a file of its size has", at, LimitError, expected=self._most_blocks)
            header = int.from_bytes(self._read(at, 3, "a block's header"), "little")
            last, kind, nbytes = bool(header & 1), header >> 1 & 3, header >> 3
            if kind == 3:
                self._refuse("a zstandard block of a kind that is not known", at)
            at += 3 + (1 if kind == 1 else nbytes)
        at += 4 if descriptor & 0x04 else 0
        if at > self._size:
            self._refuse_cut(at, at)
        return at
