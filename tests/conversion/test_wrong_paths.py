"""A path that is no checkpoint gets a message that says what it is and what to give in its place."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard
from checkpoint_samples import write_sample
from click.testing import CliRunner
from gptj_conversion.convert import convert, describe, open_source
from mesh_samples import write_mesh_sample

from gptj.command import main as cli
from gptj.errors import FormatError, GPTJError, UnsafeFileError


def refusal(path: Path, **options: str) -> str:
    with pytest.raises(GPTJError) as caught:
        describe(path, **options)
    with pytest.raises(GPTJError):
        open_source(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"source_format": "mesh"}])
def test_a_shards_folder_names_the_step_folder(tmp_path, options):
    sample = write_mesh_sample(tmp_path / "model")
    said = refusal(sample.step_directory / "shard_0", **options)
    assert "one shard of a TPU checkpoint" in said and f"Give '{sample.step_directory}'" in said
    assert f"Give '{sample.step_directory}'" in refusal(sample.step_directory / "shard_1" / "3.npz")


def test_the_folder_above_the_model_names_it(tmp_path):
    sample = write_mesh_sample(tmp_path / "bucket" / "model")
    assert f"the folder above one. Give '{sample.path}'" in refusal(tmp_path / "bucket")


def test_a_folder_with_an_archive_names_it(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "step_7.tar.zst").write_bytes(b"")
    assert "downloads/step_7.tar.zst'" in refusal(tmp_path / "downloads")


@pytest.fixture
def archive(tmp_path) -> bytes:
    sample = write_mesh_sample(tmp_path / "model", layers=1, heads=2, head_dim=2, vocab_per_shard=2)
    with tarfile.open(tmp_path / "x", "w") as out:
        out.add(sample.step_directory, "step_7")
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.GZ", "x.tar", "x.tar.zst", "x.tar.zstd"])
def test_a_gzip_archive_says_how_to_unpack_it(tmp_path, archive, name):
    (tmp_path / name).write_bytes(gzip.compress(archive))
    said = refusal(tmp_path / name)
    assert f"{name}: this is a gzip file" in said and "tar xzf" in said


PAGES = {
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an HTML page, after blank lines": b"\n\n  <html lang=en>",
    "an XML page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON file": b'{"error": "Entry not found"}',
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "an empty file": b"",
    "nothing but zeros": bytes(20_000),
    "a bzip2 file": b"BZh91AY&SY",
    "an xz file": b"\xfd7zXZ\0\0\4",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
}


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("name", ["x.tar", "x.tar.zst", "x.tar.zstd"])
def test_what_lies_under_an_archives_name_is_named(tmp_path, kind, name):
    (tmp_path / name).write_bytes(PAGES[kind])
    assert f"{name}: this is {kind.split(',')[0]}" in refusal(tmp_path / name)


def test_weights_under_an_archives_name_are_named(tmp_path):
    write_sample(tmp_path / "model")
    (tmp_path / "x.tar").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    assert "x.tar: this is a safetensors file" in refusal(tmp_path / "x.tar")
    convert(tmp_path / "model", tmp_path / "bin", to="bin")
    (tmp_path / "y.tar.zst").write_bytes((tmp_path / "bin" / "pytorch_model.bin").read_bytes())
    assert "y.tar.zst: this is a PyTorch file" in refusal(tmp_path / "y.tar.zst")


@pytest.mark.parametrize("name", ["step_7", "x.zst", "x.tar.zst.part", "download"])
def test_an_archive_is_known_by_what_is_in_it(tmp_path, archive, name):
    (tmp_path / name).write_bytes(archive if name == "step_7" else zstandard.compress(archive))
    assert describe(tmp_path / name).step == 7


def test_a_json_file_as_the_source_names_its_folder(tmp_path):
    write_sample(tmp_path / "model")
    said = refusal(tmp_path / "model" / "config.json")
    assert "this is a JSON file" in said and f"Give the folder that holds it: '{tmp_path / 'model'}'" in said


# ---- the hub's cache


@pytest.fixture
def hub(tmp_path) -> Path:
    repository = tmp_path / "huggingface" / "hub" / "models--x--y"
    (repository / "snapshots").mkdir(parents=True)
    for revision in ("aaa", "bbb"):
        write_sample(repository / "snapshots" / revision)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    return repository


@pytest.mark.parametrize("below", [".", "snapshots", "..", "../.."])
def test_the_hubs_cache_names_the_snapshots_to_give_and_mains_first(hub, below):
    path = (hub / below).resolve()
    said = refusal(path)
    assert "the cache of the Hugging Face Hub" in said
    one, other = (f"'{hub / 'snapshots' / revision}'" for revision in ("bbb", "aaa"))
    assert f"Give {one} or {other}" in said
    assert describe(hub / "snapshots" / "bbb").format == "safetensors"


def test_the_hubs_cache_without_its_refs_still_names_the_snapshot(hub):
    (hub / "refs" / "main").unlink()
    assert "snapshots/aaa' or " in refusal(hub)


@pytest.mark.parametrize("below", [".", "step_7"])
def test_a_tpu_checkpoint_in_the_hubs_cache_is_read_through_its_links(tmp_path, below):
    repository = tmp_path / "models--x--y"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    sample = write_mesh_sample(repository / "snapshots" / "aaa")
    for number, file in enumerate(sorted(sample.path.glob("**/*.npz"))):
        file.rename(repository / "blobs" / f"{number}")
        file.symlink_to(repository / "blobs" / f"{number}")
    assert describe(sample.path / below).step == 7
    (repository / "blobs" / "0").rename(tmp_path / "elsewhere")
    (repository / "blobs" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="is a link out of its folder"):
        open_source(sample.step_directory)


def test_a_cache_with_no_snapshot_is_no_checkpoint(tmp_path):
    (tmp_path / "models--x--y" / "snapshots").mkdir(parents=True)
    with pytest.raises(FormatError, match="a folder of the hub's cache"):
        describe(tmp_path / "models--x--y")


def test_the_command_line_says_it_in_one_line(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    command = [sys.executable, "-m", "gptj", "convert", sample.step_directory / "shard_0", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode in (1, 2) and "one shard of a TPU checkpoint" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_what_no_one_knows_is_still_refused(tmp_path):
    (tmp_path / "x.dat").write_bytes(b"\x01\x02\x03" * 40)
    with pytest.raises(FormatError, match=r"x\.dat: a file that holds no model's weights"):
        describe(tmp_path / "x.dat")


@pytest.mark.parametrize("name", ["text.txt", "config.json"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "FILE", "hi"], ["score", "FILE", "TEXT"], ["serve", "FILE"], ["verify", "FILE"],
        ["generate", "DIR", "hi", "--adapter", "FILE"], ["inspect", "FILE"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_file_in_a_folders_place_is_said_to_be_one(tmp_path, words, name):
    folder = write_sample(tmp_path / "model")
    (folder / "text.txt").write_text("Once upon a time")
    told = {"FILE": str(folder / name), "DIR": str(folder), "TEXT": str(folder / "text.txt")}
    found = CliRunner().invoke(cli.gptj_command, [told.get(word, word) for word in words])
    assert isinstance(found.exception, GPTJError), found.output
    assert re.search(
        rf"{re.escape(name)}: (not a (directory|folder)|a file that|this is a JSON file)", str(found.exception)
    )


def test_a_weights_file_stands_for_its_folder(tmp_path):
    folder = write_sample(tmp_path / "model")
    found = CliRunner().invoke(cli.gptj_command, ["generate", str(folder / "model.safetensors"), "hi"])
    assert "directory" not in str(found.exception), "it goes on to what is missing in the folder"
