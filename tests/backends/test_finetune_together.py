"""Fine-tuning across processes against fine-tuning in one: the same losses, also from checkpoint to checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import launched
import numpy as np
import pytest
from finetune_samples import lines_file, tuned_model

from gptj.checkpoint import open_checkpoint
from gptj.errors import InputError
from gptj.finetune import Settings, finetune
from gptj.finetune.curve import read_curve

WINGS = ("pt", "tf", "flax")
CUTS = {"pt": ("fsdp:2:1", "tp_fsdp:2:2", "tp"), "tf": ("dp:2:1", "dp:4:1", "dp"),
        "flax": ("fsdp:2:1", "tp_fsdp:2:2", "tp")}  # fmt: skip
"""By which the parts of a run are cut; TensorFlow trains whole copies alone."""

WORKER = Path(__file__).parents[1] / "support" / "finetune_together.py"
SETTINGS: dict[str, Any] = {"steps": 7, "batch": 4, "lr": 0.01, "pack": False, "seed": 3, "clip": 0.5,
                            "accumulate": 2, "eval_every": 3}  # fmt: skip
OPTIONS = ("--steps", 7, "--batch", 4, "--lr", 0.01, "--pad", "--seed", 3, "--clip", 0.5, "--accumulate", 2,
           "--eval-every", 3)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("together")
    tuned_model(place / "m", n_head=4)
    lines_file(place)
    return place


@pytest.fixture(scope="module")
def alone(place, wing) -> Path:
    out = place / f"alone-{wing.name}"
    finetune(place / "m", place / "data.jsonl", out, Settings(**SETTINGS), backend=wing.name,
             evaluation=place / "data.jsonl")  # fmt: skip
    return out


def leave(wing: Any) -> None:
    importlib.import_module(f"gptj.{wing.name}.parallel").leave_processes()


def part(wing: Any, place: Path, out: Path, updates: int, words: str) -> None:
    """A part of the run, in as many processes (jax: two, with as many devices between them) as the mesh has."""
    devices = int(words[-1]) * int(words[-3])
    processes = 2 if wing.name == "flax" else devices
    said = launched.run(
        processes, WORKER, wing.name, place / "m", place / "data.jsonl", out, updates, words, json.dumps(SETTINGS),
        XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}",
    )  # fmt: skip
    assert [one[0] for one in said] == [0] * processes, said[0][2][-3000:]


def test_a_run_goes_on_on_other_numbers_of_processes_with_the_losses_of_one(place, alone, wing):
    out, (few, many, last) = place / f"cut-{wing.name}", CUTS[wing.name]
    part(wing, place, out, 2, few)
    finetune(place / "m", place / "data.jsonl", out, Settings(**SETTINGS), backend=wing.name, resume=True,
             evaluation=place / "data.jsonl", stop=lambda: True)  # fmt: skip
    leave(wing)
    part(wing, place, out, 5, many)
    said = launched.run(
        2, "-m", "gptj", "finetune", place / "m", place / "data.jsonl", out, *OPTIONS, "--backend", wing.name,
        "--eval", place / "data.jsonl", "--resume", "--strategy", last,
    )  # fmt: skip
    assert [one[0] for one in said] == [0, 0], said
    first, second = (one[1] + one[2] for one in said)
    assert "goes on from update 5" in first and "7/7  loss" in first and "written" in first
    assert not any(word in second for word in ("goes on", "loss", "written"))
    mine, expected = (read_curve(folder / "loss.csv") for folder in (out, alone))
    for field in ("loss", "gradient_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose(
            [getattr(row, field) for row in mine], [getattr(row, field) for row in expected], rtol=1e-5
        )
    measured = [[row.eval_loss for row in rows if row.eval_loss is not None] for rows in (mine, expected)]
    np.testing.assert_allclose(*measured, rtol=1e-5)
    assert len(measured[0]) == 3
    found, whole = (open_checkpoint(folder) for folder in (out, alone))
    assert found.tensors.keys() == whole.tensors.keys()
    worst = max(float(np.abs(found.read(name) - whole.read(name)).max()) for name in whole.tensors)
    assert worst < 1e-4  # AdamW makes of gradients near 0 steps of its rate, whatever their digits


def test_a_run_of_one_process_goes_on_in_several(place, alone, wing):
    """The other way: its checkpoint is a whole model's."""
    out = place / f"begun-{wing.name}"
    third = out / "checkpoints" / "step-00000003"
    finetune(place / "m", place / "data.jsonl", out, Settings(**SETTINGS), backend=wing.name,
             evaluation=place / "data.jsonl", stop=lambda: os.path.lexists(third))  # fmt: skip
    part(wing, place, out, 99, "dp:2:1")
    mine, expected = (read_curve(folder / "loss.csv") for folder in (out, alone))
    np.testing.assert_allclose([row.loss for row in mine], [row.loss for row in expected], rtol=1e-5)


def test_what_cannot_be_trained_so_is_said_once_and_ends_all(place, wing):
    strategy = CUTS[wing.name][0].partition(":")[0]
    with pytest.raises(InputError, match="lora"):
        finetune(
            place / "m", place / "data.jsonl", place / "no", Settings(lora=2), backend=wing.name, cut=(strategy, None)
        )
    with pytest.raises(InputError, match="device"):
        finetune(place / "m", place / "data.jsonl", place / "no", backend=wing.name, device="cpu", cut=(strategy, None))
    if wing.name == "tf":
        with pytest.raises(InputError, match=r"trains no model in parts \(expected dp, found fsdp\)"):
            finetune(place / "m", place / "data.jsonl", place / "no", backend="tf", cut=("fsdp", None))
    leave(wing)
    said = launched.run(
        2, "-m", "gptj", "finetune", place / "m", place / "data.jsonl", place / "no", "--batch", 3, "--backend",
        wing.name, "--strategy", strategy,
    )  # fmt: skip
    assert [one[0] for one in said] == [1, 1]
    lines = [line for one in said for line in one[2].splitlines() if "gptj: " in line]
    assert len(lines) == 1 and "batch" in lines[0] and "multiple of 2" in lines[0]
    assert not (place / "no").exists()


def test_an_adapter_beside_a_strategy_is_refused_in_one_line(place, wing):
    words = ("finetune", place / "m", place / "data.jsonl", place / "no", "--lora", 2, "--backend", wing.name)
    alone = [sys.executable, "-m", "gptj", *map(str, words), "--strategy", "dp"]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "gptj: InputError: --lora" in done.stderr


def test_the_first_process_killed_ends_the_other_with_one_line(place, wing):
    out = place / f"killed-{wing.name}"
    running = launched.start(
        2, "-m", "gptj", "finetune", place / "m", place / "data.jsonl", out, "--steps", 10**6, "--batch", 4, "--pad",
        "--save-every", 1, "--backend", wing.name, "--strategy", CUTS[wing.name][0].partition(":")[0],
    )  # fmt: skip
    while not (out / "checkpoints" / "step-00000002").exists() and all(one.poll() is None for one in running):
        time.sleep(0.01)
    running[0].kill()
    (_, _), (_, said) = (one.communicate(timeout=60) for one in running)
    lines = [line for line in said.splitlines() if "[Gloo]" not in line]
    assert running[1].returncode == 1 and len(lines) == 1 and "gptj: ProcessError: process" in lines[0], said
