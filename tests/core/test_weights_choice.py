"""`--weights` and `weights=` choose a set in every command that opens a folder, however the set and its name are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gptj_conversion.convert import convert
from gptj_conversion.verify import verify
from weight_changes import WEIGHTS
from weight_choices import CHOICES, FOREIGN, SETS, chosen_weights, named, two_sets

from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import CheckpointWarning, FormatError, GPTJError, MissingFileError
from gptj.parity.fingerprint import check_fingerprint
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.pretrained import prepare

pytestmark = pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")


def run(*words: object) -> str:
    """A command in this process: what it prints."""
    done = CliRunner().invoke(gptj_command, [*map(str, words)], catch_exceptions=False, standalone_mode=False)
    assert done.exit_code == 0, done.output
    return done.output


def is_chosen(folder: Path) -> bool:
    opened, expected = open_checkpoint(folder), chosen_weights()
    return opened.tensors.keys() == expected.keys() and all(
        np.array_equal(opened.read(name), array) for name, array in expected.items()
    )


@pytest.mark.parametrize(("name", "way"), CHOICES)
def test_convert_takes_the_chosen_set(tmp_path, name, way):
    path, options = named(two_sets(tmp_path / "model", name), name, way)
    run("convert", path, tmp_path / "out", "--no-fingerprint", *options)
    assert is_chosen(tmp_path / "out")


@pytest.mark.parametrize("way", ["its name", "its path", "a shard's name", "a shard in place of the folder"])
@pytest.mark.parametrize("name", FOREIGN)
def test_convert_takes_the_chosen_set_of_another_format(tmp_path, name, way):
    if FOREIGN[name][1] is None and "shard" in way:
        way = "in place of the folder"
    path, options = named(two_sets(tmp_path / "model", name), name, way)
    run("convert", path, tmp_path / "out", "--no-fingerprint", *options)
    assert is_chosen(tmp_path / "out")


@pytest.mark.parametrize(("name", "way"), CHOICES)
def test_inspect_and_loading_take_the_chosen_set(tmp_path, name, way):
    path, options = named(two_sets(tmp_path / "model", name), name, way)
    assert json.loads(run("inspect", path, "--json", *options))["shards"] == (2 if SETS[name][1] else 1)
    loading = prepare("causal_lm", path, weights=options[1] if options else None)
    held = {spec.name: array for spec, array in loading.arrays(mmap=False)}
    assert all(np.array_equal(held[key], array) for key, array in chosen_weights().items())


@pytest.mark.parametrize("name", [name for name in SETS if "fp16" in name])
def test_a_variant_is_its_file_or_its_index(tmp_path, name):
    loading = prepare("causal_lm", two_sets(tmp_path / "model", name), overrides={"variant": "fp16"})
    assert all(np.array_equal(a, chosen_weights()[spec.name]) for spec, a in loading.arrays(mmap=False))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("door", ["weights", "variant", "alone"])
def test_weights_that_are_no_safetensors_say_how_these_are_converted(tmp_path, name, door):
    folder = two_sets(tmp_path / "model", name)
    options = {"weights": {"weights": name}, "variant": {"overrides": {"variant": "fp16"}}, "alone": {}}[door]
    if door == "alone":
        (folder / WEIGHTS).unlink()
    if door == "variant" and "fp16" not in name:
        with pytest.raises(MissingFileError, match=r"model\.fp16\.safetensors"):
            prepare("causal_lm", folder, **options)
        return
    with pytest.raises(FormatError, match="not safetensors weights") as caught:
        prepare("causal_lm", folder, **options)
    words = caught.value.hint.removeprefix("Convert it first: gptj ").split()
    assert words[:2] == ["convert", str(folder)] and words[3:] == ([] if door == "alone" else ["--weights", name])
    run(*words[:2], tmp_path / "out", "--no-fingerprint", *words[3:])
    assert is_chosen(tmp_path / "out")


@pytest.mark.parametrize("name", [*SETS, *FOREIGN])
def test_what_lies_beside_the_weights_that_are_taken_is_said(tmp_path, name):
    folder = two_sets(tmp_path / "model", name)
    if name == "other.safetensors":  # a name that nothing looks for
        assert open_checkpoint(folder).weight_files[0].name == WEIGHTS
        return
    with pytest.warns(CheckpointWarning, match=rf"model\.safetensors is taken.*found .*{name}"):
        opened = open_checkpoint(folder)
    assert opened.weight_files[0].name == WEIGHTS


@pytest.mark.parametrize("weights", ["none.safetensors", "pytorch_model.fp16.bin", "model-00001-of-00002.safetensors"])
def test_weights_that_are_not_there_are_named(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("gptj.backends.Backend.missing", ())  # as where every framework is installed
    folder = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(0))
    for command in (("inspect",), ("verify",), ("parity", "--backends", "pt"), ("convert", tmp_path / "out")):
        words = [command[0], folder, *command[1:], "--weights", weights]
        with pytest.raises(GPTJError, match=weights):
            run(*words)


# ---- verify


def written(path: Path, to: str, **options: object) -> Path:
    source = write_checkpoint(path / "source", revealing_config(), revealing_fill(0))
    return convert(source, path / "out", to=to, **options)


FILES = {"safetensors": ".safetensors", "bin": ".bin", "flax": ".msgpack", "tf": ".h5"}


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("sharded", [False, True])
def test_verify_checks_the_chosen_set_beside_another(tmp_path, to, sharded):
    folder = written(tmp_path, to, max_shard_bytes=20_000 if sharded else 10**9)
    name = next(p.name for p in folder.iterdir() if FILES[to] in p.name and sharded == p.name.endswith("index.json"))
    stem = name.removesuffix(".index.json").partition(".")[0]
    other = f"{stem}{FILES[to]}" if sharded else f"{stem}{FILES[to]}.index.json"
    single(folder / other, to) if sharded else (folder / other).write_text("{}")
    if sharded:
        with pytest.raises(GPTJError):  # what would be loaded is no longer what was written
            verify(folder)
    shards = [p.name for p in folder.iterdir() if "-of-" in p.name][:1]
    for weights in (name, str(folder / name), *shards):
        assert verify(folder, weights=weights, fingerprint=True).weights_format == to
        run("verify", folder, "--weights", weights, "--fingerprint")
    with pytest.raises(MissingFileError, match="not of these weights"):
        verify(folder, weights=other)


def single(path: Path, to: str) -> None:
    """Other weights of the same format."""
    source = write_checkpoint(path.parent.parent / "second", revealing_config(), revealing_fill(1))
    out = convert(source, path.parent.parent / "second-out", to=to, fingerprint=False)
    shutil.move(out / path.name, path)


@pytest.mark.parametrize("name", SETS)
def test_verify_says_that_a_manifest_is_of_other_weights(tmp_path, name):
    folder = two_sets(tmp_path / "model", name)
    with pytest.raises(MissingFileError, match="the manifest is not of these weights"):
        verify(folder, weights=name)
    with pytest.raises(FormatError, match="not those of the manifest"):
        verify_checkpoint(folder, weights=name)
    assert verify(folder).weights_files == verify(folder, weights=WEIGHTS).weights_files == {WEIGHTS}


def test_a_fingerprint_is_compared_with_the_weights_that_the_manifest_lists(tmp_path):
    folder = written(tmp_path, "safetensors", max_shard_bytes=20_000)
    single(folder / WEIGHTS, "safetensors")
    assert check_fingerprint(folder) == check_fingerprint(folder, weights="model.safetensors.index.json")
    with pytest.raises(GPTJError, match="forward pass"):
        check_fingerprint(folder, weights=WEIGHTS)
    assert prepare("causal_lm", folder, weights="model.safetensors.index.json", verify=True)
