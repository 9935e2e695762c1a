"""S1: a disk that is really full, and files that may not grow: an error that says so, and no damage."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj.checkpoint import verify_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.parity.revealing import revealing_fill

# 2.2 MB in float32. The writer asks first for what is sure (two bytes a number), so 1.6 MB let it begin.
CONFIG = GPTJConfig(vocab_size=1024, n_positions=32, n_embd=128, n_layer=2, n_head=4, rotary_dim=8)
ROOM = 1_600_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", CONFIG, revealing_fill(0))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 1.6 MB, or None where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def convert(source: Path, target: Path, *options: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "gptj", "convert", str(source), str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_S1_a_full_disk_is_said_and_what_stood_there_stands(source: Path, tmp_path: Path, full_disk: Path | None):
    folder = full_disk or tmp_path / "disk"
    limit = None if full_disk else ROOM // 2  # where nothing may be mounted, files that may not grow serve as well
    small = CONFIG.replace(n_layer=1, n_embd=16)
    target = write_checkpoint(folder / "model", small, revealing_fill(1))
    before = contents(folder)
    for overwrite in (True, False):
        name = "model" if overwrite else "other"
        done = convert(source, folder / name, *(["--overwrite"] if overwrite else []), limit=limit)
        assert done.returncode == 1 and "WriteError" in done.stderr and "Traceback" not in done.stderr
        assert "space" in done.stderr.lower() or "smaller size" in done.stderr
        assert contents(folder) == before
    assert verify_checkpoint(target)


def test_S1_too_little_space_for_what_is_sure_is_said_before_any_work(source: Path, full_disk: Path | None):
    if full_disk is None:
        return  # nothing may be mounted here; the same check runs without a disk in core/test_checkpoint_faults.py
    done = convert(source, full_disk / "model", "--dtype", "float64")
    assert done.returncode == 1 and "not enough space" in done.stderr
    assert list(full_disk.iterdir()) == []


@pytest.mark.parametrize("to", ["safetensors", "bin", "flax", "tf", "mesh"])
def test_S1_files_that_may_not_grow_are_said(source: Path, tmp_path: Path, to: str):
    options = ["--to", to, *(["--shards", "1"] if to == "mesh" else [])]
    done = convert(source, tmp_path / "out", *options, limit=200_000)
    assert done.returncode == 1 and "ulimit -f" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
