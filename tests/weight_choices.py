"""Folders with two different sets of weights, and every way in which people choose the second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from weight_changes import WEIGHTS, Arrays, write_bin

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights

__all__ = ["CHOICES", "FOREIGN", "SETS", "chosen_weights", "named", "two_sets"]


def chosen_weights() -> Arrays:
    """What the second set of weights holds; the first is `revealing_fill(0)`."""
    config = revealing_config()
    return {name: array.astype(np.float32) for name, array in revealing_weights(config, seed=1).items()}


def single(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if name.endswith(".bin"):
            write_bin(folder / name, chosen_weights())
        else:
            save_file(chosen_weights(), folder / name, {"format": "pt"})

    return make


def shards(index: str, pattern: str) -> Callable[[Path], None]:
    """Two shards, called after the pattern, and an index of this name."""

    def make(folder: Path) -> None:
        tensors = chosen_weights()
        places = {}
        for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
            name = pattern.format(f"{number:05}-of-00002")
            if name.endswith(".bin"):
                write_bin(folder / name, {key: tensors[key] for key in part})
            else:
                save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
            places.update(dict.fromkeys(part, name))
        total = sum(array.nbytes for array in tensors.values())
        (folder / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))

    return make


# The set's name, how it is made, and one of its shards where it has some.
SETS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "model.fp16.safetensors": (single("model.fp16.safetensors"), None),
    "model.non_ema.safetensors": (single("model.non_ema.safetensors"), None),
    "other.safetensors": (single("other.safetensors"), None),
    "model.safetensors.index.json": (
        shards("model.safetensors.index.json", "model-{}.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
    "model.safetensors.index.fp16.json": (
        shards("model.safetensors.index.fp16.json", "model.fp16-{}.safetensors"),
        "model.fp16-00001-of-00002.safetensors",
    ),
    "model.safetensors.index.bf16.json": (
        shards("model.safetensors.index.bf16.json", "model-{}.bf16.safetensors"),
        "model-00002-of-00002.bf16.safetensors",
    ),
    "model.fp16.safetensors.index.json": (
        shards("model.fp16.safetensors.index.json", "model.fp16-{}.safetensors"),
        "model.fp16-00002-of-00002.safetensors",
    ),
}
FOREIGN: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "pytorch_model.bin": (single("pytorch_model.bin"), None),
    "pytorch_model.fp16.bin": (single("pytorch_model.fp16.bin"), None),
    "pytorch_model.bin.index.json": (
        shards("pytorch_model.bin.index.json", "pytorch_model-{}.bin"),
        "pytorch_model-00001-of-00002.bin",
    ),
    "pytorch_model.bin.index.fp16.json": (
        shards("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-{}.bin"),
        "pytorch_model.fp16-00002-of-00002.bin",
    ),
}


def two_sets(path: Path, name: str, *, manifest: bool = True) -> Path:
    """A folder with `revealing_fill(0)` in model.safetensors and the chosen weights in the set of this name."""
    write_checkpoint(path, revealing_config(), revealing_fill(0))
    (SETS | FOREIGN)[name][0](path)
    if not manifest:
        (path / "manifest.json").unlink()
    assert (path / WEIGHTS).exists()
    return path


def named(folder: Path, name: str, way: str) -> tuple[Path, tuple[str, ...]]:
    """The path to give and the options, for a way of naming a set."""
    shard = (SETS | FOREIGN)[name][1]
    if way == "its name":
        return folder, ("--weights", name)
    if way == "its path":
        return folder, ("--weights", str(folder / name))
    if way == "in place of the folder":
        return folder / name, ()
    assert shard is not None
    return (folder, ("--weights", shard)) if way == "a shard's name" else (folder / shard, ())


def _choices() -> Iterator[tuple[str, str]]:
    for name, (_, shard) in SETS.items():
        ways = ["its name", "its path"] + (["in place of the folder"] if not name.endswith(".json") else [])
        for way in ways + (["a shard's name", "a shard in place of the folder"] if shard else []):
            yield name, way


CHOICES = [*_choices()]
"""A set of safetensors, and a way of naming it."""
