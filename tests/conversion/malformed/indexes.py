"""Indexes of safetensors whose entries are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_samples import write_sample
from gptj_conversion.convert import convert

from malformed import Malformed

TITLE = "indexes"
INDEX = "model.safetensors.index.json"


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Makes a sharded model whose index was changed."""

    def make(folder: Path) -> None:
        write_sample(folder / "in", max_shard_bytes=3000)
        index = json.loads((folder / "in" / INDEX).read_text())
        change(index)
        (folder / "in" / INDEX).write_text(json.dumps(index))

    return make


def door(folder: Path) -> object:
    return convert(folder / "in", folder / "out")


CASES = [
    Malformed("weight_map is text", spoilt(lambda index: index.update(weight_map="x")), door, "weight_map"),
    Malformed("metadata is a list", spoilt(lambda index: index.update(metadata=[1])), door, "metadata"),
]
