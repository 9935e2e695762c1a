"""One rule cuts weights into files: the writers', the dry run's and the index's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import array_of
from gptj_conversion.convert import convert, plan

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.writing import shards
from gptj.writing.shards import ShardCutter, cut_sizes, index_text, shard_name

NARROW = GPTJConfig(vocab_size=5, n_positions=4, n_embd=2, n_layer=1, n_head=1, rotary_dim=2)


@pytest.mark.parametrize(
    ("sizes", "limit", "counts"),
    [
        ([], 8, []),
        ([(4, 1), (4, 1), (1, 1)], 8, [2, 1]),
        ([(9, 1), (9, 1)], 8, [1, 1]),
        ([(4, 1), (9, 1), (4, 1)], 8, [1, 1, 1]),
        ([(4, 2), (8, 8)], 99, [1, 1]),
        ([(8, 2), (8, 8)], 99, [2]),
        ([(0, 1), (0, 1)], 1, [2]),
    ],
)
def test_a_file_ends_where_the_next_tensor_would_be_too_much_or_unaligned(sizes, limit, counts):
    assert cut_sizes(sizes, limit) == counts


def test_files_that_are_there_already_are_counted_and_full():
    cutter = ShardCutter(8, count=3)
    assert cutter.begins(1) and not cutter.begins(1) and cutter.count == 4


def test_more_files_than_five_digits_count_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "_MOST_SHARDS", 2)
    with pytest.raises(InputError, match=r"max_shard_bytes: too small .*at most 2 shards"):
        cut_sizes([(1, 1)] * 3, 1)


def test_an_index_says_what_is_where_and_how_much_there_is():
    text = index_text({"b": shard_name("x.bin", 1, 2), "a": shard_name("x.bin", 2, 2)}, 7)
    assert json.loads(text) == {
        "metadata": {"total_size": 7},
        "weight_map": {"b": "x-00001-of-00002.bin", "a": "x-00002-of-00002.bin"},
    }


@pytest.mark.parametrize("to", ["safetensors", "bin", "flax"])
@pytest.mark.parametrize("limit", [60, 100, 10_000])
def test_a_dry_run_names_the_files_that_are_written_whatever_the_dtypes(tmp_path: Path, to: str, limit: int) -> None:
    """8-byte tensors behind an odd number of 2-byte ones begin a file, where readers view the data in place."""
    source = write_checkpoint(
        tmp_path / "in", NARROW, array_of, dtype=lambda row: "float16" if row.name.endswith("weight") else "float64"
    )
    options = {"to": to, "max_shard_bytes": limit, "tokenizer": "none"}
    planned = plan(source, tmp_path / "out", **options)
    out = convert(source, tmp_path / "out", fingerprint=False, **options)
    manifest = json.loads((out / "manifest.json").read_text())
    held: dict[str, list[int]] = {}
    for record in manifest["tensors"].values():
        [name] = record["files"]
        held.setdefault(name, []).append(np.dtype(record["dtype"]).itemsize * int(np.prod(record["shape"])))
    assert {file.name: (file.tensors, file.nbytes) for file in planned.files} == {
        name: (len(sizes), sum(sizes)) for name, sizes in held.items()
    }
    if len(held) > 1:
        [path] = out.glob("*.index.json")
        assert sorted(set(json.loads(path.read_text())["weight_map"].values())) == sorted(held)
