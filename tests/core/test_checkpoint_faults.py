"""Whatever fails, and whenever: the old directory or the new one stands, never a mixture, and nothing lies about.

The n-th system call of the writer is made to fail, for n = 1, 2, ... until a run succeeds; then the same with a
process that is killed at the n-th call, and with a disk that stays broken from the n-th call on.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import array_of
from failing_disks import FailingFileSystem, KillingFileSystem, WatchedFileSystem

from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import GPTJError, WriteError
from gptj.writing.file_system import FileSystem
from gptj.writing.output_directory import OutputDirectory

SMALL = GPTJConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2, rotary_dim=2)


def write(directory: Path, seed: int, **options: Any) -> None:
    write_checkpoint(directory, SMALL, lambda row: array_of(row, seed=seed), overwrite=True, **options)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]] | None:
    if not directory.exists():
        return None
    return {p.name: (stat.S_IMODE(p.stat().st_mode), p.read_bytes()) for p in directory.iterdir()}


def make_old(directory: Path) -> None:
    write(directory, 0, max_shard_bytes=200, fs=WatchedFileSystem())
    (directory / "README.md").write_text("carried over")
    (directory / "config.json").chmod(0o600)


SCENES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "a new directory": (False, ()),
    "an old directory": (True, ()),
    "an old directory, no exchange, no links": (True, ("exchange", "link")),
}


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: a sweep makes thousands of files and lets them go again."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def scene_maker(name: str, folder: Path) -> Any:
    """A function that sets the stage anew: the target's path, its state, and what the file system lacks."""
    has_old, without = SCENES[name]
    count = 0
    if has_old:
        make_old(folder / "old")

    def prepare() -> tuple[Path, Any, tuple[str, ...]]:
        nonlocal count
        count += 1
        target = folder / str(count) / "x"
        target.parent.mkdir()
        if has_old:
            shutil.copytree(folder / "old", target)
        return target, snapshot(target), without

    return prepare


def finished(scene: Any) -> Any:
    """What an undisturbed run leaves."""
    target, _, _ = scene()
    write(target, 1, fs=WatchedFileSystem())
    return snapshot(target)


# EIO everywhere; EPERM and EINVAL are also what a link and an exchange say where the system has none.
@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, errno.EIO) for name in SCENES), ("an old directory", errno.EPERM), ("an old directory", errno.EINVAL)],
)
def test_S3_when_any_one_call_fails_the_old_directory_stands_and_nothing_lies_about(
    memory_path: Path, name: str, number: int
) -> None:
    scene = scene_maker(name, memory_path)
    new = finished(scene)
    failed: set[str] = set()
    for n in range(1, 1000):
        target, old, without = scene()
        fs = FailingFileSystem(n, number, without=without)
        try:
            write(target, 1, fs=fs)
        except WriteError as error:
            assert snapshot(target) == old, fs.failed
            assert error.file and str(target.parent) in error.file
            assert error.errno == number
            assert {p.name for p in target.parent.iterdir()} <= {"x"}, fs.failed
            failed.add(str(fs.failed))
        else:
            assert snapshot(target) == new, fs.failed
            if fs.failed is None:
                break
    else:
        pytest.fail("no run succeeded")
    assert n > 50
    assert {"mkdir", "create", "write", "seek", "read_into", "fsync", "close", "rename", "names", "status"} <= failed


@pytest.mark.parametrize("name", SCENES)
def test_S3_when_a_disk_stays_broken_nothing_is_mixed_and_the_next_run_clears_up(memory_path: Path, name: str) -> None:
    scene = scene_maker(name, memory_path)
    new = finished(scene)
    for n in range(1, 1000):
        target, old, without = scene()
        fs = FailingFileSystem(n, errno.EIO, for_good=True, without=without)
        try:
            write(target, 1, fs=fs)
        except WriteError:
            # Between the two renames of a system without exchange there is nothing; the next run puts it back.
            assert snapshot(target) in ((old, new, None) if "exchange" in without else (old, new)), fs.failed
        if fs.failed is None:
            break
        with OutputDirectory(target, overwrite=True):
            assert snapshot(target) in (old, new)
        write(target, 1, fs=WatchedFileSystem())
        assert snapshot(target) == new
        assert [p.name for p in target.parent.iterdir()] == ["x"], fs.failed
    else:
        pytest.fail("no run succeeded")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_checkpoint_faults import scene_of_the_dead
scene_of_the_dead(Path({folder!r}), {without!r})
"""


def scene_of_the_dead(folder: Path, without: tuple[str, ...]) -> None:
    """For each n, a child that is killed at call n; prints what each left. Runs in a process of its own."""
    write(folder / "new", 1)
    make_old(folder / "old")
    for n in range(1, 1000):
        target = folder / str(n) / "x"
        target.parent.mkdir()
        shutil.copytree(folder / "old", target)
        child = os.fork()
        if child == 0:
            write(target, 1, fs=KillingFileSystem(n, 0, without=without))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
    print(n)


@pytest.mark.parametrize("without", [(), ("exchange",)], ids=["exchange", "two renames"])
def test_S2_a_writer_killed_at_any_call_leaves_old_or_new_and_the_next_run_clears_up(
    memory_path: Path, without: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    code = KILLED.format(path=path, folder=str(memory_path), without=without)
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    count = int(answer.stdout)
    assert count > 50
    old, new = snapshot(memory_path / "old"), snapshot(memory_path / "new")
    new = {**(new or {}), "README.md": (old or {})["README.md"]}
    new["config.json"] = (0o600, new["config.json"][1])
    absent = 0
    for n in range(1, count):
        target = memory_path / str(n) / "x"
        absent += not target.exists()
        assert snapshot(target) in ((old, new, None) if without else (old, new)), n
        left = [p.name for p in target.parent.iterdir() if "stage" in p.name]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gptj"), OutputDirectory(target, overwrite=True):
            assert snapshot(target) in (old, new), n
        assert [p.name for p in target.parent.iterdir()] == ["x"], n
        assert ("process that died" in caplog.text) == bool(left)
        assert verify_checkpoint(target)
    assert absent <= (2 if without else 0)  # only between the two renames


def test_S8_each_file_is_forced_to_the_disk_before_the_swap_and_the_folders_around_it(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []

    class Recording(WatchedFileSystem):
        def before(self, name: str, *arguments: Any) -> None:
            if name == "fsync":
                events.append((name, Path(f"/proc/self/fd/{arguments[0]}").resolve().name))
            elif name in ("exchange", "unlink"):
                events.append((name, arguments[0].name))

    make_old(tmp_path / "x")
    write(tmp_path / "x", 1, fs=Recording())
    stage = f".x.gptj-stage-{os.getpid()}"
    names = [name for event, name in events if event == "fsync"]
    assert names == ["shard-1", "config.json", "manifest.json", stage, tmp_path.name]
    assert events.index(("fsync", stage)) < events.index(("exchange", stage)) < events.index(("fsync", tmp_path.name))
    assert all(events.index(("fsync", tmp_path.name)) < n for n, (event, _) in enumerate(events) if event == "unlink")


def test_S3_short_writes_and_reads_are_continued(tmp_path: Path) -> None:
    class Short(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:7])

        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            return super().read_into(descriptor, buffer[:11])

    write(tmp_path / "x", 1, fs=Short())
    assert verify_checkpoint(tmp_path / "x")


def test_S1_a_disk_that_takes_nothing_ends_in_an_error(tmp_path: Path) -> None:
    class Stuck(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return 0

    with pytest.raises(WriteError, match="nothing was written"):
        write(tmp_path / "x", 1, fs=Stuck())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", ["shard-1", "config.json", "manifest.json"])
def test_S9_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, damaged: str) -> None:
    class Lying(FileSystem):
        lies = False

        def read_into(self, descriptor: int, buffer: memoryview) -> int:
            count = super().read_into(descriptor, buffer)
            if Path(f"/proc/self/fd/{descriptor}").resolve().name == damaged and count:
                buffer[count - 1] ^= 1
            return count

    with pytest.raises(WriteError, match="what was read back differs from what was written"):
        write(tmp_path / "x", 1, fs=Lying())
    assert list(tmp_path.iterdir()) == []


def test_a_swap_that_can_be_neither_kept_nor_taken_back_deletes_nothing(tmp_path: Path) -> None:
    """The parent's fsync fails, then the exchange back: the new directory stands, the old one beside it."""

    class Broken(FileSystem):
        exchanged = 0

        def exchange(self, one: Path, other: Path) -> None:
            if self.exchanged:
                raise OSError(errno.EIO, "broken")
            self.exchanged += 1
            super().exchange(one, other)

        def fsync(self, descriptor: int) -> None:
            if self.exchanged:
                raise OSError(errno.EIO, "broken")

    make_old(tmp_path / "x")
    old = snapshot(tmp_path / "x")
    with pytest.raises(WriteError, match=r"nor taken back: broken\. The old directory is \.x\.gptj-stage-"):
        write(tmp_path / "x", 1, fs=Broken())
    assert verify_checkpoint(tmp_path / "x")
    assert snapshot(tmp_path / f".x.gptj-stage-{os.getpid()}") == old


def test_S1_too_little_space_is_noticed_before_any_tensor_is_asked_for(tmp_path: Path) -> None:
    class Full(FileSystem):
        def free_bytes(self, path: Path) -> int:
            return 100

    with pytest.raises(WriteError, match=r"not enough space \(expected \d+ bytes free, found 100 bytes\)"):
        write_checkpoint(tmp_path / "x", SMALL, lambda row: pytest.fail("asked"), fs=Full())
    assert list(tmp_path.iterdir()) == []


def test_S4_a_reader_beside_a_writer_sees_the_old_or_the_new_directory(tmp_path: Path) -> None:
    """Opened ahead of each of the writer's calls: every value is of one model, or a named error says why not."""
    target = tmp_path / "x"
    write(target, 0)
    seen: set[float] = set()
    known = [float(sum(np.abs(array_of(row, seed=seed)).sum(dtype=np.float64) for row in rows())) for seed in (0, 1)]

    class Reading(WatchedFileSystem):
        def before(self, name: str, *arguments: Any) -> None:
            checkpoint = open_checkpoint(target)
            seen.add(sum(float(np.abs(checkpoint.read(n)).sum(dtype=np.float64)) for n in checkpoint.tensors))

    write(target, 1, fs=Reading())
    assert sorted(seen) == pytest.approx(sorted(known))


def rows() -> Any:
    from gptj.config.schema import schema

    return schema(SMALL)


def test_the_sweep_can_fail(tmp_path: Path) -> None:
    """A writer that writes in place leaves a mixture, and the comparison sees it."""
    make_old(tmp_path / "x")
    old = snapshot(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{}")
    assert snapshot(tmp_path / "x") != old
    with pytest.raises(GPTJError):
        verify_checkpoint(tmp_path / "x")
