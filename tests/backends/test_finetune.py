"""Fine-tuning in each wing: AdamW's meaning, resumed runs, mixed precision, the folder at the end, the command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_samples import write_sample_adapter
from click.testing import CliRunner
from finetune_samples import TEXT, lines_file, text_file, tuned_model

from gptj.checkpoint import open_checkpoint, verify_checkpoint
from gptj.command.main import gptj_command
from gptj.config.schema import schema
from gptj.errors import CheckpointWarning, FormatError, InputError, WriteError
from gptj.finetune import Settings, finetune, job
from gptj.finetune.curve import read_curve
from gptj.reading.safetensors_file import read_safetensors
from gptj.text.tokenizer import GPTJTokenizer

SETTINGS = Settings(steps=8, batch=3, length=16, lr=3e-3, save_every=3, eval_every=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tuned_model(tmp_path_factory.mktemp("tuned") / "model", n_layer=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return text_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    return text_file(tmp_path_factory.mktemp("data"), TEXT[:200])


def step_of(wing, folder: Path, settings: Settings = SETTINGS):
    room = importlib.import_module(f"gptj.{wing.name}.finetune")
    return room.TrainingStep(room.open_model(folder, settings), settings)


def losses(folder: Path) -> list[float]:
    return [row.loss for row in read_curve(folder / "loss.csv")]


def weights(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


# ---- AdamW


IDS = np.array([[5, 9, 3, 3, 250, 7], [1, 2, 3, 4, 5, 0]], np.int32)
LABELS = np.array([[-100, 9, 3, 3, 250, 7], [1, 2, 3, 4, -100, -100]], np.int32)


def test_three_updates_are_the_papers_adamw(wing, model):
    """Against NumPy in float64, with the gradients that the wing itself computed: moments, corrections, decay."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5)
    step = step_of(wing, model, settings)
    names = [row.name for row in schema(step.model.config)]
    value = {name: step.read(name).astype(np.float64).copy() for name in names}
    first, second = ({name: np.zeros_like(value[name]) for name in names} for _ in range(2))
    for n, (rate, factor) in enumerate([(1e-3, 1.0), (5e-4, 0.25), (2e-3, 1.0)], 1):
        before = {name: array.copy() for name, array in step.moments()}
        step.accumulate(IDS, LABELS, factor=1.0)
        step.update(rate, factor=factor)
        after = dict(step.moments())
        for name in names:
            gradient = (after[f"first.{name}"].astype(np.float64) - 0.9 * before[f"first.{name}"]) / 0.1
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = np.sqrt(second[name] / (1 - 0.999**n)) + 1e-8
            decay = 0.5 if value[name].ndim > 1 else 0.0
            value[name] -= rate * (first[name] / (1 - 0.9**n) / root + decay * value[name])
    for name in names:
        large = np.abs(first[name]) > 1e-6  # where the gradient is not lost in the moments' own rounding
        found = np.abs(step.read(name) - value[name])[large]
        assert found.max(initial=0) <= 5e-5 * 2e-3 + 1e-6 * np.abs(value[name]).max(), name


def test_accumulated_gradients_are_the_sum_and_discarded_ones_leave_no_trace(wing, model):
    one = step_of(wing, model)
    one.accumulate(IDS, LABELS, factor=1.0)
    both = step_of(wing, model)
    both.accumulate(IDS, LABELS, factor=1.0)
    both.discard()
    learnt = (LABELS[:, 1:] != -100).sum(1)
    for row, share in enumerate(learnt / learnt.sum()):
        both.accumulate(IDS[row : row + 1], LABELS[row : row + 1], factor=float(share))
    assert both.gradient_norm() == pytest.approx(one.gradient_norm(), rel=1e-5)
    one.update(1e-3, factor=1.0)
    both.update(1e-3, factor=1.0)
    both_moments = dict(both.moments())
    for name, value in one.moments():
        assert np.abs(both_moments[name] - value).max() <= 1e-5 * np.abs(value).max(initial=1e-9), name


def test_recomputed_blocks_give_the_same_gradient(wing, model):
    step, plain = step_of(wing, model), step_of(wing, model)
    step.model.gradient_checkpointing_enable()
    step = type(step)(step.model, SETTINGS)
    for one in (step, plain):
        one.accumulate(IDS, LABELS, factor=1.0)
    assert step.gradient_norm() == pytest.approx(plain.gradient_norm(), rel=1e-6)


# ---- whole runs


@pytest.fixture(scope="module")
def whole(wing, model, data, measured, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run") / "out"
    outcome = finetune(model, data, folder, SETTINGS, backend=wing.name, device="cpu", evaluation=measured)
    assert outcome.finished and outcome.step == 8
    return folder


def test_a_run_learns_and_its_folder_opens(wing, whole, model):
    found = losses(whole)
    assert found[-1] < found[0] - 0.3
    assert (whole / "loss.png").exists()
    verify_checkpoint(whole)
    loaded = wing.model("causal_lm").from_pretrained(whole)
    assert loaded.config == wing.model("causal_lm").from_pretrained(model).config  # dropout, too, is the config's again
    tokenizer = GPTJTokenizer.from_pretrained(whole)
    assert tokenizer.encode(TEXT) == GPTJTokenizer.from_pretrained(model).encode(TEXT)
    made = loaded.generate(np.array([tokenizer.encode("line 1")]), max_new_tokens=2)
    assert wing.numpy(made).shape[1] == len(tokenizer.encode("line 1")) + 2
    assert json.loads((whole / "manifest.json").read_text())["provenance"]["fine_tuned"]["backend"] == wing.name


def test_what_lies_beside_the_weights_goes_along(wing, data, tmp_path):
    model = tuned_model(tmp_path / "model", n_layer=1)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (model / "generation_config.json").write_text('{"max_new_tokens": 7}')
    settings = dataclasses.replace(SETTINGS, steps=1)
    with pytest.warns(CheckpointWarning, match="no chat template is applied to a text"):
        finetune(model, data, tmp_path / "out", settings, backend=wing.name, device="cpu")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_the_weights_are_the_best_evaluations(whole):
    rows = read_curve(whole / "loss.csv")
    best = min((row for row in rows if row.eval_loss is not None), key=lambda row: row.eval_loss)
    ours, theirs = weights(whole), weights(whole / "checkpoints" / f"step-{best.step:08d}")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(wing, whole, model, data, measured, tmp_path, stop_at):
    arguments = {"backend": wing.name, "device": "cpu", "evaluation": measured}
    seen = []
    stopped = finetune(
        model, data, tmp_path / "out", SETTINGS, **arguments, report=seen.append, stop=lambda: len(seen) + 1 == stop_at
    )
    assert not stopped.finished and stopped.step == stop_at
    assert not (tmp_path / "out" / "config.json").exists()
    finished = finetune(model, data, tmp_path / "out", SETTINGS, **arguments, resume=True)
    assert finished.finished
    assert losses(tmp_path / "out") == losses(whole)
    mine, theirs = weights(tmp_path / "out"), weights(whole)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_keeps_float32_parameters_and_learns_alike(wing, whole, model, data, tmp_path, dtype):
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    step = step_of(wing, model, settings)
    step.accumulate(IDS, LABELS, factor=1.0)
    assert {value.dtype for _, value in step.moments()} == {np.dtype(np.float32)}
    assert step.read("lm_head.weight").dtype == np.float32
    finetune(model, data, tmp_path / "out", settings, backend=wing.name, device="cpu")
    narrow, wide = losses(tmp_path / "out"), losses(whole)
    assert narrow != wide, "computed in float32"
    assert np.abs(np.array(narrow) - wide).max() <= 0.02
    assert weights(tmp_path / "out")["lm_head.weight"].dtype == np.float32


def test_a_float16_run_that_only_overflows_is_an_error(wing, data, tmp_path):
    """A head's bias beyond float16 makes every logit infinite; the weights are never moved, and status 0 would lie."""
    model = tuned_model(tmp_path / "model", n_layer=1, biases={"lm_head.bias": 1e5})
    arguments = ["finetune", model, data, tmp_path / "out", "--backend", wing.name, "--device", "cpu"]
    done = CliRunner().invoke(
        gptj_command, [*map(str, arguments), "--dtype", "float16", "--steps", "3", "--batch", "2"]
    )
    said = str(done.exception)
    assert isinstance(done.exception, InputError), done.output
    assert "--dtype: every gradient overflowed float16, so nothing was learnt" in said and "bfloat16" in said
    assert not (tmp_path / "out" / "config.json").exists(), "no model is left that looks trained"


def test_prompts_are_masked_and_windows_padded(wing, model, tmp_path):
    settings = dataclasses.replace(SETTINGS, pack=False, length=32, accumulate=2, steps=None, epochs=2)
    path = lines_file(tmp_path)
    outcome = finetune(model, path, tmp_path / "out", settings, backend=wing.name, device="cpu")
    tokenizer = GPTJTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert outcome.tokens == 2 * sum(len(tokenizer.encode(line["completion"])) + 1 for line in lines)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_another_setting_or_other_data_are_refused_by_name(wing, model, data, tmp_path):
    arguments = {"backend": wing.name, "device": "cpu"}
    finetune(model, data, tmp_path / "out", SETTINGS, **arguments, stop=lambda: True)
    with pytest.raises(InputError, match="--lr: another than the run that is to be resumed"):
        finetune(model, data, tmp_path / "out", dataclasses.replace(SETTINGS, lr=1e-3), **arguments, resume=True)
    with pytest.raises(InputError, match="DATA"):
        other = text_file(tmp_path, TEXT[1:], "other.txt")
        finetune(model, other, tmp_path / "out", SETTINGS, **arguments, resume=True)


def test_what_cannot_be_a_run_is_refused_before_a_model_is_loaded(wing, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_open", None)  # where the model would be loaded
    adapter = write_sample_adapter(tmp_path / "adapter")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 10, "warmup": 50}, r"--warmup: longer than the run .expected at most 10, found 50."),
        ({"length": 4096}, "--length: longer than the model's positions"),
        ({"lora": 4097}, "--lora: more than a matrix has .expected at most n_embd"),
    ]
    for change, words in changes:
        settings = Settings(**{"length": 16, "steps": 4, **change})
        with pytest.raises(InputError, match=words):
            finetune(model, data, tmp_path / "out", settings, backend=wing.name)
    with pytest.raises(InputError, match="a LoRA adapter without its base model"):
        finetune(adapter, data, tmp_path / "out", SETTINGS, backend=wing.name)
    with pytest.raises(FormatError, match=f"{data.name}: not a directory"):
        finetune(data, data, tmp_path / "out", SETTINGS, backend=wing.name)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    with pytest.raises(WriteError, match=r"no room for its checkpoints .expected [0-9,]+ bytes free, found 100,000"):
        finetune(model, data, tmp_path / "out", SETTINGS, backend=wing.name)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(
        gptj_command, ["finetune", *map(str, (model, data, tmp_path / "out")), "--eval-every", "3"]
    )
    assert done.exit_code == 2 and "--eval-every: nothing is measured; give --eval too" in done.output
    done = CliRunner().invoke(gptj_command, ["finetune", str(model), "-", str(tmp_path / "out")])
    assert done.exit_code == 2 and "DATA: - is no file" in done.output


# ---- adapters


ADAPTED = dataclasses.replace(SETTINGS, lora=3, lora_targets=("q_proj", "fc_out"), lr=0.1)


def test_an_adapter_alone_trains_and_opens(wing, model, data, measured, tmp_path):
    before = weights(model)
    outcome = finetune(model, data, tmp_path / "out", ADAPTED, backend=wing.name, device="cpu", evaluation=measured)
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] - 0.1
    assert outcome.finished and not (tmp_path / "out" / "config.json").exists()
    stored = read_safetensors(tmp_path / "out" / "adapter_model.safetensors").tensors
    assert len(stored) == 4 and {tensor.dtype for tensor in stored.values()} == {"float32"}
    after = weights(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (3, 6, str(model))
    loaded = wing.model("causal_lm").from_pretrained(model)
    plain = wing.numpy(loaded(IDS).logits)
    loaded.load_adapter(tmp_path / "out")
    assert np.abs(wing.numpy(loaded(IDS).logits) - plain).max() > 1e-3


def test_an_adapters_run_that_was_stopped_goes_on_to_the_same_bits(wing, model, data, tmp_path):
    arguments = {"backend": wing.name, "device": "cpu"}
    finetune(model, data, tmp_path / "whole", ADAPTED, **arguments)
    seen = []
    finetune(model, data, tmp_path / "out", ADAPTED, **arguments, report=seen.append, stop=lambda: len(seen) == 3)
    finetune(model, data, tmp_path / "out", ADAPTED, **arguments, resume=True)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == other


def test_beside_an_adapter_the_base_is_kept_in_16_bits(wing, model, data, tmp_path):
    settings = dataclasses.replace(ADAPTED, dtype="bfloat16", checkpoint_gradients=True, accumulate=2)
    finetune(model, data, tmp_path / "out", settings, backend=wing.name, device="cpu")
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] - 0.1
    room = importlib.import_module(f"gptj.{wing.name}.finetune")
    assert "bfloat16" in str(room.open_model(model, settings).param_dtype)


def test_an_adapters_other_base_is_refused(wing, model, data, tmp_path):
    arguments = {"backend": wing.name, "device": "cpu"}
    finetune(model, data, tmp_path / "out", ADAPTED, **arguments, stop=lambda: True)
    other = tuned_model(tmp_path / "other", n_layer=1, seed=1)
    with pytest.raises(InputError, match="DIR: another than the run that is to be resumed"):
        finetune(other, data, tmp_path / "out", ADAPTED, **arguments, resume=True)


# ---- the command


def test_ctrl_c_saves_and_says_how_to_go_on(wing, model, data, tmp_path):
    arguments = [
        "finetune",
        str(model),
        str(data),
        str(tmp_path / "out"),
        "--backend",
        wing.name,
        "--device",
        "cpu",
        "--steps",
        "100000",
        "--save-every",
        "100000",
        "--length",
        "16",
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        environment = {**os.environ, "JAX_ENABLE_X64": "0"}
        command = [sys.executable, "-m", "gptj", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    said = ""
    while " 1/100000  loss" not in said and process.poll() is None:
        said += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, said + err
    [folder] = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(folder.name[5:])
    assert f"stopped after update {step} of 100000; {folder} has it" in err
    assert f"to go on: gptj finetune {model} {data} {tmp_path / 'out'}" in err and err.rstrip().endswith("--resume")
    assert len(open_checkpoint(folder).tensors) == 15
