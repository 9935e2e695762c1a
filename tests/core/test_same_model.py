"""Processes whose hosts have copies of a model's folder: what must be the same in each, and what is read to know it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from watching import count_reads

from gptj import GPTJConfig
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.errors import InputError
from gptj.parity.revealing import revealing_fill
from gptj.reading import safetensors_file
from gptj.reading.same_model import require_same_model

CONFIG = GPTJConfig(vocab_size=90, n_positions=16, n_embd=32, n_layer=2, n_head=2, rotary_dim=4)


@pytest.fixture
def here(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "here", CONFIG, revealing_fill(0), max_shard_bytes=40_000)


def ask(folders: list[Path], facts: list[dict[str, str]] | None = None) -> list[str]:
    """What each of so many processes is refused with, "" where it is not."""
    texts: dict[int, str] = {}
    barrier = threading.Barrier(len(folders), timeout=20)

    def gather_of(rank: int) -> Callable[[str], list[str]]:
        def gather(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait()
            found = [texts[n] for n in range(len(folders))]
            barrier.wait()
            return found

        return gather

    def process(rank: int) -> str:
        try:
            more = {} if facts is None else facts[rank]
            require_same_model(open_checkpoint(folders[rank]), rank, gather_of(rank), facts=more)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(folders)) as pool:
        return [*pool.map(process, range(len(folders)))]


def change_one_number(folder: Path, name: str, at: int) -> None:
    tensor = open_checkpoint(folder).tensors[name]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset + 4 * (at % (tensor.nbytes // 4)))
        value = np.frombuffer(stream.read(4), np.float32) + 1
        stream.seek(-4, 1)
        stream.write(value.tobytes())


def test_one_folder_is_not_read(here):
    with count_reads(safetensors_file) as counted:
        assert ask([here] * 3) == ["", "", ""] and not counted


def test_a_copy_is_read_once_by_those_who_share_it(here, tmp_path):
    there = shutil.copytree(here, tmp_path / "there")
    with count_reads(safetensors_file) as counted:
        assert ask([here, here, there, there]) == [""] * 4
    whole = sum(tensor.nbytes for tensor in open_checkpoint(here).tensors.values())
    assert sum(counted) == 2 * whole


@pytest.mark.parametrize("name, at", (("transformer.wte.weight", -1), ("transformer.h.1.mlp.fc_in.weight", 2000),
                                      ("lm_head.bias", 77), ("transformer.h.0.ln_1.weight", 20)))  # fmt: skip
def test_one_number_anywhere_is_enough(here, tmp_path, name, at):
    there = shutil.copytree(here, tmp_path / "there")
    change_one_number(there, name, at)
    said = ask([here, there, here, there])
    assert [bool(words) for words in said] == [False, True, False, True]
    assert name in said[1] and "another than the first" in said[1] and said[1] == said[3]


def test_other_configs_and_other_options_are_told(here, tmp_path):
    other = dataclasses.replace(CONFIG, layer_norm_epsilon=1e-6)
    there = write_checkpoint(tmp_path / "there", other, revealing_fill(0), max_shard_bytes=40_000)
    assert "config.json" in ask([here, there])[1]
    said = ask([here, here], [{"options": "a"}, {"options": "b"}])
    assert said[0] == "" and "options" in said[1]
