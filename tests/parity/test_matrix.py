"""The matrix holds in every backend, each of its rows can fail, and the ladder's rungs stand in order."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from wings import Wing, named_backends

import gptj
from gptj.checkpoint import write_checkpoint
from gptj.parity.invariance_record import record_matrix, rows_of
from gptj.parity.ladder import NEW_TOKENS, PROMPTS, RUNGS, LadderQuestion, random_prompts
from gptj.parity.ladder_record import record_rung
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.parity.run import open_oracle

CONFIG = revealing_config(n_layer=2)
CALL = {"pt": "forward", "tf": "call", "flax": "__call__"}
QUICK = ("whole pass", "gradients", "step of SGD", "step of AdamW", "cached", "chunks", "embeddings", "saved")

pytestmark = pytest.mark.parametrize("backend", named_backends())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("matrix") / "model", CONFIG, revealing_fill(0))


def failed(folder: Path, backend: str, rows: tuple[str, ...] = QUICK, **options) -> list[str]:
    """The rows that do not hold."""
    return [row.against for row in record_matrix(folder, backend, rows=rows, **options) if not row.holds]


def plant(monkeypatch, backend, method, change):
    """Put `change(original, self, ...)` in the place of a method of the wing's model."""
    model = gptj.backend(backend).GPTJForCausalLM
    original = getattr(model, method)
    changed = functools.wraps(original)(lambda *arguments, **options: change(original, *arguments, **options))
    changed.__signature__ = inspect.signature(original)
    monkeypatch.setattr(model, method, changed)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own call
def test_every_row_holds(folder, backend):
    rows = record_matrix(folder, backend, folders={"copy": folder})
    assert [row.against for row in rows] == rows_of(backend, {"copy": folder})
    assert [row for row in rows if not row.holds] == []
    by_name = {row.against: row for row in rows}
    for name in ("whole pass", "gradients", "step of SGD", "step of AdamW"):
        assert by_name[name].difference > 0, "an answer of the framework's own arithmetic is not float64's"
    assert by_name["whole pass"].limit < 5e-5


def test_a_cached_step_at_a_wrong_position_turns_its_row_red(folder, backend, monkeypatch):
    def call(original, self, input_ids=None, *arguments, **options):
        if options.get("past_key_values") is not None and input_ids.shape[1] == 1:
            options["position_ids"] = options["position_ids"] + 1
        return original(self, input_ids, *arguments, **options)

    plant(monkeypatch, backend, CALL[backend], call)
    assert failed(folder, backend) == ["cached"]


def test_a_wrong_gradient_turns_its_row_red(folder, backend, monkeypatch):
    def differentiate(original, self, *arguments):
        loss, slopes = original(self, *arguments)
        name = "transformer.h.1.ln_1.weight"
        return loss, {**slopes, name: slopes[name] * 1.001}

    plant(monkeypatch, backend, "_differentiate", differentiate)
    assert failed(folder, backend) == ["gradients"]


def test_a_wrong_decay_turns_its_row_red(folder, backend, monkeypatch):
    module = importlib.import_module(f"gptj.{backend}.one_step")
    original = module.take_step
    monkeypatch.setattr(module, "take_step", lambda *given, **options: original(*given, **{**options, "decay": 0.0}))
    assert failed(folder, backend) == ["step of AdamW"]


def test_a_changed_bit_of_a_saved_file_turns_its_row_red(folder, backend, monkeypatch):
    def save(original, self, directory, *arguments, **options):
        original(self, directory, *arguments, **options)
        file = Path(directory) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-4] ^= 1
        file.write_bytes(data)

    plant(monkeypatch, backend, "save_pretrained", save)
    assert failed(folder, backend) == ["saved"]


def test_a_format_that_changes_a_value_turns_its_row_red(folder, backend, tmp_path):
    def fill(row):
        return revealing_fill(0)(row) + np.float32(row.name == "transformer.h.0.attn.k_proj.weight") * 1e-6

    other = write_checkpoint(tmp_path / "other", CONFIG, fill)
    folders = {"right": folder, "wrong": other}
    assert failed(folder, backend, ("through right", "through wrong"), folders=folders) == ["through wrong"]


def test_nan_turns_every_row_of_logits_red(folder, backend, monkeypatch):
    def call(original, self, *arguments, **options):
        output = original(self, *arguments, **options)
        return type(output)(**{**output, "logits": output["logits"] * float("nan")})

    plant(monkeypatch, backend, CALL[backend], call)
    rows = ("whole pass", "cached", "chunks", "embeddings", "padded left", "batch of 8")
    assert failed(folder, backend, rows) == [*rows]


def test_the_rungs_stand_in_order(folder, backend):
    Wing(backend).allow_float64()
    prompts = random_prompts(CONFIG)
    question = LadderQuestion.ask(open_oracle(folder), prompts["input_ids"], prompts["attention_mask"])
    found = {rung: record_rung(folder, backend, rung, question) for rung in RUNGS[backend]}
    errors = {rung: row.error for rung, row in found.items()}
    assert errors["float64"] < 1e-12 < errors["float32"] < 2e-5 < errors["float16"] < errors["bfloat16"] < 0.5
    assert found["float64"].kl < 1e-15 < found["bfloat16"].kl < 1e-2
    for row in found.values():
        assert 0.5 < row.top1 <= 1 and 0 <= row.greedy <= 1 and row.prompts == PROMPTS
    assert (found["float64"].top1, found["float64"].greedy) == (1, 1)
    assert question.greedy.shape[1] == NEW_TOKENS
    if "int8" in found:
        assert errors["float32"] < errors["int8"] < 0.5
