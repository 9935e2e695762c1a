"""A file is compared with what the disk gives back: its pages are dropped between being written and being read.

Large runs of bytes go past the page cache where they can; where they cannot, the same bytes go through it.
"""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest
from failing_disks import WatchedFileSystem

from gptj.errors import WriteError
from gptj.reading.buffers import PAGE_BYTES, ReusedBuffer, page_aligned
from gptj.writing.file_system import FileSystem
from gptj.writing.output_directory import OutputDirectory

HEADER = b"h" * 64
DATA = bytes(np.random.default_rng(0).integers(0, 256, 20_000, np.uint8))
MEANT = [hashlib.sha256(part).hexdigest() for part in (HEADER, DATA)]


def write(target: Path, fs: FileSystem) -> list[str]:
    """Space for a header, then the data, then the header: as weights are written. Returns the checksums read back."""
    with OutputDirectory(target, fs=fs) as output:
        file = output.create("weights")
        file.write(bytes(len(HEADER)))
        file.write(DATA)
        file.rewrite(HEADER)
        sums = file.read_back([len(HEADER), len(DATA)], hashlib.sha256)
        output.commit()
    return sums


class _Noting(WatchedFileSystem):
    """Notes the calls for the file; `drop_pages` is what the kernel says to that."""

    def __init__(self, refusal: OSError | None = None) -> None:
        super().__init__()
        self.refusal = refusal
        self.calls: list[str] = []

    def before(self, name: str, *arguments: object) -> None:
        if not self.calls or self.calls[-1] != name:
            self.calls.append(name)
        if name == "drop_pages" and self.refusal is not None:
            raise self.refusal


def test_the_pages_are_dropped_when_the_disk_has_them_and_before_they_are_read(tmp_path: Path) -> None:
    fs = _Noting()
    assert write(tmp_path / "x", fs) == MEANT
    at = fs.calls.index("fsync")
    assert fs.calls[at : at + 5] == ["fsync", "drop_pages", "seek", "read_into", "close"]


def test_a_large_file_is_forced_and_dropped_window_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj.writing.output_file.WINDOW_BYTES", 1000)
    fs = _Noting()
    with OutputDirectory(tmp_path / "x", fs=fs) as output:
        file = output.create("weights")
        for _ in range(5):
            file.write(bytes(600))
        written = ["write", "fsync", "drop_pages"]
        at = fs.calls.index("write")
        assert fs.calls[at:] == [*written, *written, "write"]
        assert file.finish()[0] == hashlib.sha256(bytes(3000)).hexdigest()
        output.commit()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE])
def test_a_kernel_that_cannot_drop_them_is_read_from_memory(tmp_path: Path, number: int) -> None:
    fs = _Noting(OSError(number, "not here"))
    assert write(tmp_path / "x", fs) == MEANT
    assert "drop_pages" in fs.calls and (tmp_path / "x" / "weights").read_bytes() == HEADER + DATA


def test_a_system_without_the_call_is_read_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    assert write(tmp_path / "x", FileSystem()) == MEANT


def test_what_the_disk_gives_back_is_what_is_compared(tmp_path: Path) -> None:
    """A disk that holds another bit than memory does is noticed, as soon as memory has let the page go."""

    class Rotten(FileSystem):
        def drop_pages(self, descriptor: int) -> None:
            [stage] = tmp_path.glob(".x.gptj-stage-*")
            path = stage / "weights"
            if path.exists():
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)

    assert write(tmp_path / "x", Rotten()) != MEANT
    with pytest.raises(WriteError, match="what was read back differs"), OutputDirectory(tmp_path / "y") as output:
        output.fs = _Changing(tmp_path)
        output.write_file("config.json", b"{}")


class _Changing(FileSystem):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def drop_pages(self, descriptor: int) -> None:
        [path] = self.folder.glob(".y.gptj-stage-*/config.json")
        path.write_bytes(b"[]")


def test_short_transfers_are_continued(tmp_path: Path) -> None:
    class Short(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:700])

        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            return super().read_into(descriptor, buffer[:1100])

    assert write(tmp_path / "x", Short()) == MEANT


PAGES = 5


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj.writing.output_file.DIRECT_BYTES", 2 * PAGE_BYTES)


class _Direct(WatchedFileSystem):
    """Notes each write and its bytes; a direct one is the kernel's own only in `WatchedFileSystem`'s fashion."""

    def __init__(self, error: OSError | None = None, *, most: int = 2**40) -> None:
        super().__init__()
        self.error, self.most = error, most
        self.writes: list[tuple[str, int]] = []

    def write(self, descriptor: int, data: memoryview) -> int:
        self.writes.append(("write", len(data)))
        return FileSystem.write(self, descriptor, data)

    def write_direct(self, descriptor: int, data: memoryview) -> int:
        self.writes.append(("write_direct", len(data)))
        if self.error:
            raise self.error
        return FileSystem.write(self, descriptor, data[: self.most])  # the folder may be in memory


def write_pages(target: Path, fs: FileSystem, *, header: int = PAGE_BYTES) -> bool:
    """A header, then pages and a bit. Returns whether what was read back, and what stands there, is that."""
    data = page_aligned(PAGES * PAGE_BYTES + 100)
    data[:] = np.random.default_rng(0).integers(0, 256, data.size)
    with OutputDirectory(target, fs=fs) as output:
        file = output.create("weights")
        file.write(bytes(header))
        file.write(data.data)
        [whole] = file.read_back([10**6], hashlib.sha256)
        output.commit()
    expected = bytes(header) + data.tobytes()
    return whole == hashlib.sha256(expected).hexdigest() and (target / "weights").read_bytes() == expected


@pytest.mark.usefixtures("short_runs")
def test_whole_pages_go_past_the_cache_and_the_rest_through_it(tmp_path: Path) -> None:
    fs = _Direct()
    assert write_pages(tmp_path / "x", fs)
    assert fs.writes == [("write", PAGE_BYTES), ("write_direct", PAGES * PAGE_BYTES), ("write", 100)]


@pytest.mark.usefixtures("short_runs")
def test_what_does_not_lie_at_a_page_goes_through_the_cache(tmp_path: Path) -> None:
    fs = _Direct()
    assert write_pages(tmp_path / "x", fs, header=64)
    assert {name for name, _ in fs.writes} == {"write"}


@pytest.mark.usefixtures("short_runs")
def test_a_direct_write_that_ends_inside_a_page_is_continued(tmp_path: Path) -> None:
    fs = _Direct(most=PAGE_BYTES + 700)
    assert write_pages(tmp_path / "x", fs)
    assert fs.writes[-1] == ("write", (PAGES - 1) * PAGE_BYTES - 600)


@pytest.mark.usefixtures("short_runs")
def test_a_file_system_that_refuses_direct_writes_gets_the_same_bytes(tmp_path: Path) -> None:
    fs = _Direct(OSError(errno.EINVAL, "not here"))
    assert write_pages(tmp_path / "x", fs)
    assert fs.writes[1:] == [("write_direct", PAGES * PAGE_BYTES), ("write", PAGES * PAGE_BYTES + 100)]


@pytest.mark.usefixtures("short_runs")
def test_a_full_disk_refuses_a_direct_write_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"weights.*Free some space"):
        write_pages(tmp_path / "x", _Direct(OSError(errno.ENOSPC, "No space left on device")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_runs")
def test_the_file_system_of_this_machine_takes_them_or_the_page_cache_does(tmp_path: Path) -> None:
    assert write_pages(tmp_path / "x", FileSystem())


@pytest.mark.usefixtures("short_runs")
def test_a_system_without_direct_writes_has_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    assert write_pages(tmp_path / "x", FileSystem())


def test_a_room_gives_each_array_the_same_pages_and_grows() -> None:
    room = ReusedBuffer()
    one = room.array((3, 5), np.dtype(np.float32))
    assert one.ctypes.data % PAGE_BYTES == 0 and one.shape == (3, 5)
    one[:] = 7
    assert (room.array((5,), np.dtype(np.float32)) == 7).all()
    large = room.array((4, 5000), np.dtype(np.float64))
    assert large.ctypes.data % PAGE_BYTES == 0 and large.dtype == np.float64 and large.shape == (4, 5000)
    assert room.array((), np.dtype(np.float32)).shape == ()
