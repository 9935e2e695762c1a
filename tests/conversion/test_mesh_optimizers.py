"""Whatever the optimizer kept, the parameters and the step are a TPU checkpoint's last leaves, and the rest is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gptj_conversion.convert import convert, describe, plan
from gptj_conversion.mesh.reader import open_mesh
from mesh_samples import MeshSample, same_bits, write_mesh_sample, write_shard

from gptj.checkpoint import open_checkpoint
from gptj.errors import CheckpointWarning, ConfigError, SchemaError
from gptj.reading.manifest import Manifest

COUNT = np.int32(7)


def factored(leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Adafactor's row and column means and its whole second moment, of which a matrix has the first two alone."""
    none = np.zeros(1, np.float32)
    return (leaf.mean(1), leaf.mean(0), none) if leaf.ndim == 2 else (none, none, leaf)


def rows_of(leaves, part):
    return [factored(leaf)[part] for leaf in leaves]


CHAINS = {
    "plain Adam": lambda p: [COUNT, *p, *p],
    "Adam, with weight decay and a schedule first": lambda p: [COUNT, COUNT, *p, *p],
    "SGD with momentum": lambda p: [*p],
    "SGD with momentum and a schedule": lambda p: [*p, COUNT],
    "a schedule alone": lambda p: [COUNT],
    "Adafactor": lambda p: [COUNT, *rows_of(p, 0), *rows_of(p, 1), *rows_of(p, 2)],
    # 4 * (10 layers + 6) + 3 leaves are as many as those of a slim checkpoint of another depth
    "Adafactor with a schedule": lambda p: [COUNT, *rows_of(p, 0), *rows_of(p, 1), *rows_of(p, 2), COUNT],
    "accumulated gradients of Adam": lambda p: [COUNT, COUNT, COUNT, *p, *p, COUNT, *p],
    "accumulated gradients of SGD": lambda p: [COUNT, COUNT, *p],
    "Lion, in 16 bits": lambda p: [COUNT, *(leaf.astype(np.float16) for leaf in p)],
    "whether the last step was finite": lambda p: [COUNT, np.bool_(True), COUNT, COUNT, *p, *p],
    "noise with a key of its own": lambda p: [COUNT, np.zeros(2, np.uint32), *p],
    "an average of the parameters": lambda p: [COUNT, *p, *p, COUNT, COUNT, *p],
}


def leaves_of(folder: Path) -> list[np.ndarray]:
    leaves = []
    for number in range(16):
        with np.load(folder / f"{number}.npz") as arrays:
            leaves += [arrays[name] for name in arrays.files]
    return leaves


def with_chain(path: Path, chain: str, **sizes: int) -> MeshSample:
    """A slim sample, with what this optimizer keeps before its parameters."""
    sample = write_mesh_sample(path, **sizes)
    for folder in sorted(sample.step_directory.iterdir()):
        leaves = leaves_of(folder)
        shutil.rmtree(folder)
        write_shard(folder, [*CHAINS[chain](leaves[:-1]), *leaves])
    return sample


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layers", [1, 2, 11])
def test_the_parameters_of_any_chain_are_read_bit_for_bit(tmp_path, chain, layers):
    sample = with_chain(tmp_path / "model", chain, layers=layers, heads=2, head_dim=2)
    source = open_mesh(sample.path, config=sample.config_file)
    assert (source.layers, source.context.step, source.layout) == (layers, 7, "other")
    for name, expected in sample.tensors.items():
        assert same_bits(source.read(name), expected), name


@pytest.mark.parametrize("chain", ["plain Adam", "Adafactor with a schedule"])
def test_a_conversion_says_that_the_state_of_another_optimizer_is_left(tmp_path, chain):
    sample = with_chain(tmp_path / "model", chain)
    said = "is the state of an optimizer that is not the original's, and left out"
    assert any(said in problem for problem in describe(sample.path).problems)
    planned = plan(sample.path, tmp_path / "out", config=sample.config_file)
    assert any(said in note for note in planned.notes)
    assert not any(said in problem for problem in planned.source.problems)  # once is enough
    with pytest.warns(CheckpointWarning, match=said):
        convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert any(said in note for note in Manifest.from_file(tmp_path / "out" / "manifest.json").provenance["notes"])


@pytest.mark.parametrize("layout", ["slim", "full"])
def test_a_conversion_says_that_adams_moments_are_left(tmp_path, layout):
    sample = write_mesh_sample(tmp_path / "model", layout=layout)
    for options in ({}, {"to": "mesh", "shards": 2}):
        notes = plan(sample.path, tmp_path / "out", config=sample.config_file, **options).notes
        assert any("Adam's moments" in note for note in notes) == (layout == "full")


def test_a_training_config_of_another_depth_contradicts_a_chain_too(tmp_path):
    sample = with_chain(tmp_path / "model", "plain Adam", layers=2)
    sample.config_file.write_text(json.dumps({**sample.training_config, "layers": 3}))
    with pytest.raises(ConfigError, match="layers is 3, the files show 2"):
        open_mesh(sample.path, config=sample.config_file)


def test_leaves_after_the_parameters_are_refused(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    for folder in sorted(sample.step_directory.iterdir()):
        leaves = leaves_of(folder)
        shutil.rmtree(folder)
        write_shard(folder, [*leaves, COUNT])
    with pytest.raises(SchemaError, match="the last ones are not those of one"):
        open_mesh(sample.path, config=sample.config_file)


# ---- which step


def test_an_older_step_than_the_newest_is_said_in_every_place(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    shutil.copytree(sample.step_directory, sample.path / "step_9")
    (sample.path / "step_9" / "shard_1" / "3.npz").unlink()
    said = "step_7 is taken, and not the newest: step_9/shard_1/3.npz: shard 1 is not complete"
    assert said in describe(sample.path).problems
    assert said in plan(sample.path, tmp_path / "out", config=sample.config_file).notes
    with pytest.warns(CheckpointWarning, match=said):
        convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert said in Manifest.from_file(tmp_path / "out" / "manifest.json").provenance["notes"]


def test_the_folders_step_counts_and_the_one_inside_is_mentioned(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    sample.step_directory.rename(sample.path / "step_5")
    facts = describe(sample.path)
    assert facts.step == 5
    assert any("called step_5, and the step inside is 7" in problem for problem in facts.problems)
    convert(sample.path, tmp_path / "out", config=sample.config_file, to="mesh", shards=2)
    assert (tmp_path / "out" / "step_5").is_dir()


def test_a_folder_of_another_name_has_the_step_inside(tmp_path):
    sample = write_mesh_sample(tmp_path / "model")
    sample.step_directory.rename(tmp_path / "slim")
    facts = describe(tmp_path / "slim")
    assert facts.step == 7 and not any("inside" in problem for problem in facts.problems)


def test_a_checkpoint_with_its_optimizer_and_one_without_give_the_same_tensors(tmp_path):
    one = write_mesh_sample(tmp_path / "one", seed=3)
    with_chain(tmp_path / "two", "Adafactor with a schedule", seed=3)
    convert(tmp_path / "one", tmp_path / "one-out", config=one.config_file)
    with pytest.warns(CheckpointWarning, match="not the original's"):
        convert(tmp_path / "two", tmp_path / "two-out", config=one.config_file)
    first, second = (Manifest.from_file(tmp_path / f"{name}-out" / "manifest.json") for name in ("one", "two"))
    assert first.sha256 == second.sha256
    assert open_checkpoint(tmp_path / "two-out").tensors.keys() == one.tensors.keys()
