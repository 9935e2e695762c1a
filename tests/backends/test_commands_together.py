"""`gptj score` and `gptj generate` across processes: the answers of one, in the order of their lines, said once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import launched
import numpy as np
import pytest
from finetune_samples import tuned_model

WINGS = ("pt", "flax")
TEXTS = "".join(f"text {n}: {'fox ' * (n % 3)}\n" for n in range(5))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("together")
    tuned_model(place / "m", n_head=4)
    (place / "texts").write_text(TEXTS)
    return place


def one(wing: Any, *words: Any) -> str:
    command = [sys.executable, "-m", "gptj", *map(str, words), "--backend", wing.name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def two(wing: Any, *words: Any) -> str:
    said = launched.run(2, "-m", "gptj", *words, "--backend", wing.name)
    assert [status for status, _, _ in said] == [0, 0], said
    assert said[1][1] == ""
    return said[0][1]


@pytest.mark.parametrize("strategy", ("tp", "dp"))
def test_scores_are_those_of_one_process(place, wing, strategy):
    words = ("score", place / "m", place / "texts", "--json", "--tokens")
    mine, expected = json.loads(two(wing, *words, "--strategy", strategy)), json.loads(one(wing, *words))
    assert [row["line"] for row in mine["documents"]] == [1, 2, 3, 4, 5]
    for found, wanted in zip(mine["documents"], expected["documents"], strict=True):
        assert found["token_ids"] == wanted["token_ids"] and found["bytes"] == wanted["bytes"]
        np.testing.assert_allclose(found["log_likelihoods"], wanted["log_likelihoods"], rtol=1e-5)


def test_prompts_are_dealt_out_and_printed_in_their_order(place, wing):
    words = ("generate", place / "m", "--prompts", place / "texts", "--seed", 5, "--max-new-tokens", 6,
             "--batch-size", 2)  # fmt: skip
    assert two(wing, *words, "--strategy", "dp") == one(wing, *words)


def test_fewer_prompts_than_copies_are_refused(place, wing):
    said = launched.run(
        2, "-m", "gptj", "generate", place / "m", "one", "--max-new-tokens", 2, "--backend", wing.name,
        "--strategy", "dp",
    )  # fmt: skip
    assert [status for status, _, _ in said] == [1, 1]
    lines = [line for *_, err in said for line in err.splitlines() if "gptj: " in line]
    assert len(lines) == 1 and "2 copies" in lines[0]


def test_a_process_that_no_launcher_started_says_that_it_cuts_nothing(place, wing):
    words = ("generate", place / "m", "one", "--max-new-tokens", 2, "--backend", wing.name, "--strategy", "tp")
    command = [sys.executable, "-m", "gptj", *map(str, words)]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert alone.count("warning: --strategy: one process") == 1 and "torchrun --nproc-per-node=2" in alone
    assert launched.run(1, "-m", "gptj", *words)[0][::2] == (0, "")  # which a launcher did


@pytest.mark.parametrize("words", (("score", "m", "absent"), ("generate", "m", "--prompts", "absent")))
def test_a_file_that_is_missing_is_said_once(place, wing, words):
    paths = [place / word if word in ("m", "absent") else word for word in words]
    said = launched.run(2, "-m", "gptj", *paths, "--backend", wing.name, "--strategy", "tp")
    assert all(status for status, _, _ in said)
    assert sum(err.count("absent") for *_, err in said) == 1


@pytest.mark.parametrize(
    ("words", "field"),
    (
        (("generate", "m", "word " * 999, "--strategy", "tp", "--tp", 3), "mesh"),
        (("generate", "m", "word " * 999, "--strategy", "dp", "--tp", 2), "tp"),
        (("score", "m", "absent", "--strategy", "tp", "--dp", 5), "mesh"),
        (("finetune", "m", "absent", "out", "--strategy", "fsdp", "--dp", 3), "mesh"),
        (("finetune", "m", "absent", "out", "--strategy", "fsdp", "--dp", 2, "--batch", 3), "batch"),
    ),
)
def test_a_mesh_that_does_not_fit_is_said_before_all_else(place, wing, words, field):
    paths = [place / word if word in ("m", "absent", "out") else word for word in words]
    said = launched.run(2, "-m", "gptj", *paths, "--backend", wing.name)
    lines = [line for *_, err in said for line in err.splitlines() if "[Gloo]" not in line]
    assert [status for status, _, _ in said] == [1, 1]
    assert len(lines) == 1 and lines[0].startswith(f"gptj: InputError: {field}: "), lines
