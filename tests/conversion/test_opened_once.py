"""One opening for one question: a file's header is parsed once, and an archive unpacked once, in every door."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner
from gptj_conversion.convert import convert, describe, plan
from gptj_conversion.hf.torch_bin import read_bin
from gptj_conversion.mesh.tar import open_tar
from mesh_samples import write_mesh_sample
from test_tar import compressed, packed
from weight_changes import as_bin, renamed

from gptj.checkpoint import open_checkpoint, plan_load, write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import CheckpointWarning
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.reading.safetensors_file import read_safetensors
from gptj.reading.weight_names import plain_names

READERS = {".safetensors": read_safetensors, ".bin": read_bin}


@contextlib.contextmanager
def counted(function: Callable[..., Any], argument: str | None = None) -> Iterator[Counter[Any]]:
    """How often a function is called in the block, by the value of one of its arguments; wherever it was imported."""
    calls: Counter[Any] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is function.__code__:
            calls[frame.f_locals[argument] if argument else ""] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def two_sets(path: Path, suffix: str) -> Path:
    """A folder with the same weights in one file, and in two with an index."""
    model = write_checkpoint(path / "model", revealing_config(), revealing_fill(0))
    to = {".safetensors": "safetensors", ".bin": "bin"}[suffix]
    folder = convert(model, path / "sharded", to=to, max_shard_bytes=20_000, fingerprint=False)
    (folder / "manifest.json").unlink()
    single = convert(model, path / "single", to=to, fingerprint=False)
    name = next(file.name for file in single.iterdir() if file.suffix == suffix)
    shutil.copyfile(single / name, folder / name)
    return folder


DOORS: dict[str, Callable[[Path, Path], object]] = {
    "convert": lambda folder, out: convert(folder, out, to="flax", fingerprint=False),
    "plan": lambda folder, out: plan(folder, out, to="flax"),
    "describe": lambda folder, out: describe(folder),
    "gptj convert": lambda folder, out: run("convert", folder, out, "--to", "flax", "--no-fingerprint"),
}


def run(*words: object) -> None:
    done = CliRunner().invoke(gptj_command, [*map(str, words)], catch_exceptions=False, standalone_mode=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("door", DOORS)
def test_each_of_several_weight_sets_is_opened_once(tmp_path, suffix, door):
    folder = two_sets(tmp_path, suffix)
    files = {file for file in folder.iterdir() if file.suffix == suffix}
    with (
        counted(READERS[suffix], "path") as opened,
        pytest.warns(CheckpointWarning, match="several weight sets of the same names and shapes"),
    ):
        DOORS[door](folder, tmp_path / "out")
    assert opened == dict.fromkeys(files, 1) and len(files) > 2


@pytest.mark.parametrize("door", DOORS)
def test_one_set_is_opened_once(tmp_path, door):
    folder = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(0))
    with counted(read_safetensors, "path") as opened:
        DOORS[door](folder, tmp_path / "out")
    assert opened == {folder / "model.safetensors": 1}


def test_the_core_opens_each_of_several_weight_sets_once(tmp_path):
    folder = two_sets(tmp_path, ".safetensors")
    with (
        counted(read_safetensors, "path") as opened,
        pytest.warns(CheckpointWarning, match="several weight sets of the same names and shapes"),
    ):
        open_checkpoint(folder)
    assert opened == dict.fromkeys((file for file in folder.iterdir() if file.suffix == ".safetensors"), 1)


def test_stored_names_are_made_plain_once_for_a_load(tmp_path):
    folder = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(0))
    with counted(plain_names) as calls:
        opened = open_checkpoint(folder)
        plan_load(opened, opened.config, opened.head)
    assert calls.total() == 1


def test_an_archive_is_unpacked_once_for_its_plan_and_its_conversion(tmp_path):
    sample = write_mesh_sample(tmp_path / "mesh")
    archive = compressed(packed(sample.path, tmp_path / "slim.tar"))
    with counted(open_tar) as calls:
        run("convert", archive, tmp_path / "out", "--config", sample.config_file, "--no-fingerprint")
    assert calls.total() == 1


@pytest.mark.parametrize("door", ["convert", "describe"])
def test_the_set_that_is_taken_says_what_is_odd_about_it_and_the_others_do_not(tmp_path, door):
    folder = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(0))
    other = write_checkpoint(tmp_path / "other", revealing_config(), revealing_fill(0))
    renamed(lambda name: "module." + name)(folder)
    as_bin(lambda tensors: {"_orig_mod." + name: array for name, array in tensors.items()})(other)
    shutil.copyfile(other / "pytorch_model.bin", folder / "pytorch_model.bin")
    with pytest.warns(CheckpointWarning) as heard:
        DOORS[door](folder, tmp_path / "out")
    said = [str(one.message) for one in heard]
    assert [sum(word in line for line in said) for word in ("module.", "_orig_mod.")] == [1, 0], said
