"""A model is written beside what others keep in a folder: nothing of theirs changes, whatever fails and whenever."""

from __future__ import annotations

import errno
import logging
import os
import shutil
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
from gptj.errors import CheckpointWarning, GPTJError, WriteError
from gptj.writing.shared_directory import SharedDirectory

SMALL = GPTJConfig(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2, rotary_dim=2)
OURS = ["config.json", "manifest.json", "model.safetensors"]


def write(directory: Path, seed: int = 1, **options: Any) -> Path:
    options = {"beside_others": True, "fs": WatchedFileSystem(), **options}
    return write_checkpoint(directory, SMALL, lambda row: array_of(row, seed=seed), **options)


def others(directory: Path) -> Path:
    """What a trainer and a user have in a folder: checkpoints, logs, notes, a link, a FIFO, an empty folder."""
    for name in ("checkpoint-2", "checkpoint-10"):
        (directory / name).mkdir(parents=True)
        (directory / name / "model.safetensors").write_bytes(name.encode())
        (directory / name / "config.json").write_text("{}")
    (directory / "runs" / "today").mkdir(parents=True)
    (directory / "runs" / "today" / "events").write_text("loss")
    (directory / "runs" / "empty").mkdir(mode=0o700)
    (directory / "training_args.bin").write_bytes(b"arguments")
    (directory / "README.md").write_text("mine")
    (directory / "README.md").chmod(0o600)
    (directory / "latest").symlink_to("checkpoint-10")
    (directory / "broken").symlink_to("nowhere")
    os.mkfifo(directory / "pipe")
    for folder in (*directory.rglob("*"), directory):
        if folder.is_dir() and not folder.is_symlink():
            os.utime(folder, (1_000_000_000, 1_000_000_000))
    return directory


def contents(path: Path) -> Any:
    if path.is_symlink():
        return path.readlink()
    return path.read_bytes() if path.is_file() else None


def snapshot(directory: Path) -> dict[str, Any]:
    """Mode, kind and contents of everything below, by its path."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_mode, contents(path))
        for path in [*directory.rglob("*")]
        if path.is_symlink() or path.exists()
    }


def identities(directory: Path) -> dict[str, Any]:
    """What a program that has it open would see change: the files themselves, and when they were changed."""
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {str(path): (one.st_ino, one.st_mtime_ns, one.st_nlink, one.st_uid) for path, one in found.items()}


def require_whole(directory: Path) -> None:
    """Every file and tensor is as its manifest says; of the others, those that might be weights are named."""
    with pytest.warns(CheckpointWarning, match=r"not checked.*'training_args\.bin'"):
        assert verify_checkpoint(directory).tensors


def test_a_model_stands_beside_the_others_of_which_nothing_is_touched(tmp_path: Path) -> None:
    target = others(tmp_path / "x")
    before, known = snapshot(target), identities(target)
    write(target, extra_files={"generation_config.json": b"{}"})
    after = snapshot(target)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == sorted([*OURS, "generation_config.json"])
    found = identities(target)
    assert {name: found[name] for name in known} == known
    require_whole(target)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert all((target / name).stat().st_nlink == 1 for name in OURS)
    read = open_checkpoint(target).read("transformer.wte.weight")
    assert (read == array_of(next(r for r in rows() if r.name == "transformer.wte.weight"), seed=1)).all()


def rows() -> Any:
    from gptj.config.schema import schema

    return schema(SMALL)


def test_the_current_folder_is_written_into_where_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(others(tmp_path / "x"))
    write(Path())
    require_whole(Path())
    for place in (tmp_path / "x", tmp_path / "x" / "checkpoint-2"):
        monkeypatch.chdir(place)
        with pytest.raises(WriteError, match="current folder"):
            write(tmp_path / "x", overwrite=True)


@pytest.mark.parametrize("name", [*OURS, "model.safetensors.index.json", "generation_config.json"])
def test_a_file_that_would_be_replaced_needs_overwrite(tmp_path: Path, name: str) -> None:
    target = others(tmp_path / "x")
    (target / name).write_bytes(b"theirs")
    before = snapshot(target)
    extra = {"generation_config.json": b"{}"}
    with pytest.raises(WriteError, match=rf"is not empty: it holds '{name}'.*Say overwrite"):
        write_checkpoint(target, SMALL, lambda row: pytest.fail("asked"), beside_others=True, extra_files=extra)
    assert snapshot(target) == before
    write(target, overwrite=True, extra_files=extra)
    after = snapshot(target)
    assert {key: after[key] for key in before if key != name} == {key: before[key] for key in before if key != name}
    require_whole(target)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (target / "checkpoint-2").stat().st_mtime == 1_000_000_000


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model-00001-of-00002.msgpack",
     "model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"],
)  # fmt: skip
def test_weights_that_would_be_taken_for_the_models_are_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    target = others(tmp_path / "x")
    (target / name).write_bytes(b"precious")
    before = snapshot(target)
    with pytest.raises(WriteError, match=r"would be taken for this model's weights.*Move it away"):
        write(target, overwrite=overwrite)
    assert snapshot(target) == before


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_what_bears_our_name_and_is_no_plain_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    target = others(tmp_path / "x")
    make = {"folder": Path.mkdir, "link": lambda path: path.symlink_to("README.md"), "fifo": os.mkfifo}[kind]
    make(target / "config.json")
    before = snapshot(target)
    for overwrite, words in ((False, "Say overwrite"), (True, "'config.json', which is not a plain file")):
        with pytest.raises(WriteError, match=words):
            write(target, overwrite=overwrite)
    assert snapshot(target) == before


def test_a_file_that_appears_under_our_name_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = others(tmp_path / "x")

    class Slow(WatchedFileSystem):
        def before(self, name: str, *arguments: Any) -> None:
            if name == "link" and arguments[1].name == "config.json":
                (target / "config.json").write_text("theirs")

    before = snapshot(target)
    with pytest.raises(WriteError, match=r"config\.json: could not be written: File exists"):
        write(target, fs=Slow())
    after = snapshot(target)
    assert after.pop("config.json")[1] == b"theirs" and after == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_S5_a_folder_that_takes_no_files_is_refused_before_any_work(tmp_path: Path) -> None:
    target = others(tmp_path / "x")
    target.chmod(0o500)
    try:
        if os.access(target, os.W_OK):

            def allowed(path: Any, mode: int) -> bool:
                return Path(path) != target

            with pytest.MonkeyPatch.context() as patch, pytest.raises(WriteError, match="You may not write there"):
                patch.setattr(os, "access", allowed)  # root may write anywhere
                write_checkpoint(target, SMALL, lambda row: pytest.fail("asked"), beside_others=True)
        else:
            with pytest.raises(WriteError, match="You may not write there"):
                write_checkpoint(target, SMALL, lambda row: pytest.fail("asked"), beside_others=True)
    finally:
        target.chmod(0o700)
    assert not (target / "config.json").exists()


def test_S4_a_reader_finds_no_model_or_the_whole_one(tmp_path: Path) -> None:
    target = others(tmp_path / "x")
    seen: set[str] = set()

    class Reading(WatchedFileSystem):
        def before(self, name: str, *arguments: Any) -> None:
            try:
                checkpoint = open_checkpoint(target)
            except GPTJError:
                seen.add("none")
            else:
                assert all(np.isfinite(checkpoint.read(name)).all() for name in checkpoint.tensors)
                seen.add("whole")

    write(target, fs=Reading())
    assert seen == {"none", "whole"}


# ---- whatever fails

SCENES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "beside others": (False, ()),
    "beside others, no links": (False, ("link",)),
    "beside others, over a model": (True, ()),
    "beside others, over a model, no exchange": (True, ("exchange",)),
}


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: a sweep makes thousands of files and lets them go again."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def small_others(directory: Path, *, has_model: bool) -> Path:
    """Fewer others, for the sweeps; a link or FIFO cannot be carried along where there are no links."""
    (directory / "checkpoint-2" / "inner").mkdir(parents=True)
    (directory / "checkpoint-2" / "inner" / "model.safetensors").write_text("theirs")
    (directory / "README.md").write_text("mine")
    (directory / "README.md").chmod(0o600)
    if has_model:
        write(directory, 0)
        (directory / "latest").symlink_to("checkpoint-2")
    return directory


def prepared(folder: Path, n: int) -> Path:
    target = folder / str(n) / "x"
    target.parent.mkdir()
    shutil.copytree(folder / "old", target, symlinks=True)
    return target


def start(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The options of a scene's writer, what it finds, and what it leaves when nothing disturbs it."""
    has_model, without = SCENES[name]
    old = snapshot(small_others(folder / "old", has_model=has_model))
    options = {"overwrite": has_model}
    new = snapshot(write(prepared(folder, 0), **options, fs=FailingFileSystem(0, 0, without=without)))
    return options, old, new


@pytest.mark.parametrize(("name", "number"), [*((name, errno.EIO) for name in SCENES), ("beside others", errno.EPERM)])
def test_S3_when_any_one_call_fails_all_is_as_it_was_and_nothing_lies_about(
    memory_path: Path, name: str, number: int
) -> None:
    options, old, new = start(memory_path, name)
    failed: set[str] = set()
    for n in range(1, 1000):
        target = prepared(memory_path, n)
        fs = FailingFileSystem(n, number, without=SCENES[name][1])
        try:
            write(target, fs=fs, **options)
        except WriteError as error:
            assert snapshot(target) == old, (n, fs.failed)
            assert error.file and str(target.parent) in error.file and error.errno == number
            assert {path.name for path in target.parent.iterdir()} == {"x"}, (n, fs.failed)
            failed.add(str(fs.failed))
        else:
            assert snapshot(target) == new, (n, fs.failed)
            if fs.failed is None:
                break
    else:
        pytest.fail("no run succeeded")
    assert n > 50 and failed >= {"mkdir", "create", "write", "fsync", "rename", "names", "status"}


def require_no_mixture(target: Path, old: dict[str, Any], new: dict[str, Any], name: str) -> None:
    """Old or new; or, beside others, some of our files that make no model yet, since the config comes last."""
    found = snapshot(target)
    if "exchange" in SCENES[name][1] and not target.exists():
        return  # between two renames; the next run puts it back
    if found not in (old, new):
        assert not SCENES[name][0] and "config.json" not in found
        assert found == {**old, **{key: new[key] for key in found.keys() - old.keys()}}


def recover(target: Path) -> None:
    """What the next writer does before anything else."""
    with SharedDirectory(target, fate=lambda name: "keep"):
        pass


@pytest.mark.parametrize("name", SCENES)
def test_S3_when_a_disk_stays_broken_the_next_run_takes_back_what_was_placed(memory_path: Path, name: str) -> None:
    options, old, new = start(memory_path, name)
    partly = 0
    for n in range(1, 1000):
        target = prepared(memory_path, n)
        fs = FailingFileSystem(n, errno.EIO, for_good=True, without=SCENES[name][1])
        try:
            write(target, fs=fs, **options)
        except WriteError:
            require_no_mixture(target, old, new, name)
            partly += snapshot(target) not in (old, new)
        if fs.failed is None:
            break
        recover(target)
        assert snapshot(target) in (old, new), (n, fs.failed)
        write(target, overwrite=True)
        assert snapshot(target) == new
        assert [path.name for path in target.parent.iterdir()] == ["x"], (n, fs.failed)
    else:
        pytest.fail("no run succeeded")
    assert partly or name != "beside others"  # else the sweep never met what it is for


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_shared_directory import scene_of_the_dead
scene_of_the_dead(Path({folder!r}), {name!r})
"""


def scene_of_the_dead(folder: Path, name: str) -> None:
    """For each n, a child that is killed at call n. Runs in a process of its own; prints how many there were."""
    for n in range(1, 1000):
        target = prepared(folder, n)
        child = os.fork()
        if child == 0:
            write(target, overwrite=SCENES[name][0], fs=KillingFileSystem(n, 0, without=SCENES[name][1]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
    print(n)


@pytest.mark.parametrize("name", ["beside others", "beside others, over a model"])
def test_S2_a_writer_killed_at_any_call_leaves_no_mixture_and_the_next_run_clears_up(
    memory_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, old, new = start(memory_path, name)
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    code = KILLED.format(path=path, folder=str(memory_path), name=name)
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    count = int(answer.stdout)
    assert count > 50
    partly = 0
    for n in range(1, count):
        target = memory_path / str(n) / "x"
        require_no_mixture(target, old, new, name)
        partly += target.exists() and snapshot(target) not in (old, new)
        left = [path.name for path in target.parent.iterdir() if "stage" in path.name or "placing" in path.name]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gptj"):
            recover(target)
        assert snapshot(target) in (old, new), n
        assert ("process that died" in caplog.text) == bool(left)
        assert [path.name for path in target.parent.iterdir()] == ["x"], n
    assert bool(partly) == (name == "beside others")  # with one file of three, and with two


def test_the_next_run_leaves_a_model_that_was_placed_and_edited_alone(tmp_path: Path) -> None:
    """A writer that died between its last file and the clearing of its stage had done its work."""
    target = others(tmp_path / "x")

    class Dying(WatchedFileSystem):
        def before(self, name: str, *arguments: Any) -> None:
            if name == "unlink":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(target, fs=Dying())
    assert any("placing" in path.name for path in tmp_path.iterdir())
    text = (target / "config.json").read_text()
    (target / "config.json").unlink()
    (target / "config.json").write_text(text)
    recover(target)
    require_whole(target)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_S4_a_second_writer_is_told_who_is_writing(tmp_path: Path) -> None:
    target = others(tmp_path / "x")
    with SharedDirectory(target, fate=lambda name: "keep"), pytest.raises(WriteError, match="is being written by"):
        write(target)
