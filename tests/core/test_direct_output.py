"""Large runs of bytes go past the page cache where they can; where they cannot, the same bytes go through it."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from gptj.errors import WriteError
from gptj.reading.buffers import PAGE_BYTES, Room, page_aligned
from gptj.writing import output_directory
from gptj.writing.output_directory import FileSystem, OutputDirectory

PAGES = 5


class Watched(FileSystem):
    """Knows which transfers were direct; `refuses` names the call that a file system without O_DIRECT fails."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.direct: dict[int, bool] = {}
        self.transfers: list[tuple[str, bool, int]] = []

    def set_direct(self, descriptor: int, wanted: bool) -> None:
        if self.refuses == "set_direct":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        self.direct[descriptor] = wanted  # and not the kernel: the folder may be in memory

    def _transfer(self, name: str, descriptor: int, count: int) -> None:
        direct = self.direct.get(descriptor, False)
        self.transfers.append((name, direct, count))
        if direct and self.refuses == name:
            raise OSError(errno.EINVAL, "unaligned, it says")

    def write(self, descriptor: int, data: memoryview) -> int:
        self._transfer("write", descriptor, len(data))
        return super().write(descriptor, data)

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        self._transfer("read_into", descriptor, len(buffer))
        return super().read_into(descriptor, buffer)


@pytest.fixture(autouse=True)
def small_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_directory, "_DIRECT_BYTES", 2 * PAGE_BYTES)
    monkeypatch.setattr(output_directory, "_BLOCK_BYTES", 4 * PAGE_BYTES)


def data() -> memoryview:
    pages = page_aligned(PAGES * PAGE_BYTES + 100)
    pages[:] = np.random.default_rng(0).integers(0, 256, pages.size)
    return pages.data


def write(target: Path, fs: FileSystem, *, room: int = PAGE_BYTES) -> list[str]:
    """A header's room, then the data, then the header: as weights are written. Returns the checksums read back."""
    with OutputDirectory(target, fs=fs, overwrite=True) as output:
        file = output.create("weights")
        file.write(bytes(room))
        file.write(data())
        file.rewrite(b"h" * room)
        sums = file.read_back([room, len(data())], hashlib.sha256)
        output.commit()
    return sums


def meant(room: int = PAGE_BYTES) -> list[str]:
    return [hashlib.sha256(part).hexdigest() for part in (b"h" * room, data())]


def test_whole_pages_go_past_the_cache_and_the_rest_through_it(tmp_path: Path) -> None:
    fs = Watched()
    assert write(tmp_path / "x", fs) == meant()
    assert (tmp_path / "x" / "weights").read_bytes() == b"h" * PAGE_BYTES + bytes(data())
    assert fs.transfers[:4] == [
        ("write", False, PAGE_BYTES),
        ("write", True, PAGES * PAGE_BYTES),
        ("write", False, 100),
        ("write", False, PAGE_BYTES),
    ]
    assert next(direct for name, direct, _ in fs.transfers if name == "read_into")


@pytest.mark.parametrize("refuses", ["set_direct", "write", "read_into"])
def test_a_file_system_that_refuses_gets_the_same_bytes_through_the_cache(tmp_path: Path, refuses: str) -> None:
    assert write(tmp_path / "x", Watched(refuses)) == meant()
    assert (tmp_path / "x" / "weights").read_bytes() == b"h" * PAGE_BYTES + bytes(data())


def test_what_does_not_begin_at_a_page_goes_through_the_cache(tmp_path: Path) -> None:
    fs = Watched()
    assert write(tmp_path / "x", fs, room=64) == meant(64)
    assert not any(direct for name, direct, _ in fs.transfers if name == "write")


def test_this_machine_s_own_file_system_takes_them(tmp_path: Path) -> None:
    """Whatever it is: where it refuses, the page cache is the way."""
    assert write(tmp_path / "x", FileSystem()) == meant()
    assert (tmp_path / "x" / "weights").read_bytes() == b"h" * PAGE_BYTES + bytes(data())


def test_a_direct_read_is_what_is_compared(tmp_path: Path) -> None:
    """A disk that gives back another bit on a direct read is noticed."""

    class Lying(Watched):
        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            count = super().read_into(descriptor, buffer)
            if self.direct.get(descriptor) and count:
                buffer[-1] ^= 1
            return count

    assert write(tmp_path / "x", Lying()) != meant()


def test_short_transfers_are_continued_though_they_end_inside_a_page(tmp_path: Path) -> None:
    class Short(Watched):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:700])

        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            return super().read_into(descriptor, buffer[:1100])

    assert write(tmp_path / "x", Short()) == meant()


def test_S3_whichever_call_fails_nothing_is_left_or_everything_is_right(tmp_path: Path) -> None:
    class Failing(Watched):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.left = n
            self.failed: str | None = None

        def count(self, name: str) -> None:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        def set_direct(self, descriptor: int, wanted: bool) -> None:
            self.count("set_direct off" if not wanted else "set_direct on")
            super().set_direct(descriptor, wanted)

        def write(self, descriptor: int, data: memoryview) -> int:
            self.count("write")
            return super().write(descriptor, data)

        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            self.count("read_into")
            return super().read_into(descriptor, buffer)

    refused: set[str | None] = set()
    for n in range(1, 100):
        fs = Failing(n)
        target = tmp_path / str(n) / "x"
        target.parent.mkdir()
        try:
            assert write(target, fs) == meant()
        except WriteError as error:
            assert error.errno == errno.EIO
            assert list(target.parent.iterdir()) == []
            refused.add(fs.failed)
        else:
            assert (target / "weights").read_bytes() == b"h" * PAGE_BYTES + bytes(data())
            if fs.failed is None:
                break
            assert fs.failed == "set_direct on"
    assert refused == {"write", "read_into", "set_direct off"}


def test_a_room_gives_each_array_the_same_pages_and_grows() -> None:
    room = Room()
    one = room.array((3, 5), np.dtype(np.float32))
    assert one.ctypes.data % PAGE_BYTES == 0 and one.shape == (3, 5)
    one[:] = 7
    assert (room.array((5,), np.dtype(np.float32)) == 7).all()
    large = room.array((4, 5000), np.dtype(np.float64))
    assert large.ctypes.data % PAGE_BYTES == 0 and large.dtype == np.float64 and large.shape == (4, 5000)
    assert room.array((), np.dtype(np.float32)).shape == ()
