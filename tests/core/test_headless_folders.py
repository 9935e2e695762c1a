"""A folder without a language model's head: no command computes with one of random values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_samples import CONFIG, array_of

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.command.opened_model import OpenedModel, Request
from gptj.errors import SchemaError
from gptj.finetune import Settings, finetune
from gptj.parity.trace_record import record_trace

NO_HEAD = "not a whole causal language model .found no lm_head.weight and no lm_head.bias"


@pytest.fixture(params=["base", "sequence_classification", "question_answering"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, array_of, head=request.param)


@pytest.fixture(autouse=True)
def no_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework whose models are never asked for."""
    loads = SimpleNamespace(from_pretrained=lambda *words, **options: pytest.fail("the model was loaded"))
    for name in ("gptj.backend", "gptj.backends.backend"):
        monkeypatch.setattr(name, lambda name: SimpleNamespace(GPTJForCausalLM=loads))
    for room in ("command.opened_model", "finetune.job", "parity.trace_record"):
        monkeypatch.setattr(f"gptj.{room}.choose_backend", lambda name: "pt")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_no_text_is_made(folder: Path, quantize: str | None) -> None:
    opened = OpenedModel(Request(directory=folder, quantize=quantize), needs_tokenizer=False)
    with pytest.raises(SchemaError, match=NO_HEAD):
        opened.load(1)


def test_no_assistant_guesses(folder: Path, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", CONFIG, array_of)
    opened = OpenedModel(Request(directory=whole, assistant=folder), needs_tokenizer=False)
    with pytest.raises(SchemaError, match=NO_HEAD):
        opened.load_assistant(1)


@pytest.mark.parametrize("target", ["onnx", "torch-export", "savedmodel"])
def test_no_program_is_written(folder: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(SchemaError, match=NO_HEAD):
        gptj_command.main(["export", str(folder), str(tmp_path / "out"), "--to", target], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_no_run_of_training_begins(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("To be, or not to be")
    with pytest.raises(SchemaError, match=NO_HEAD):
        finetune(folder, tmp_path / "data.txt", tmp_path / "out", Settings(steps=1), backend="pt")
    assert not (tmp_path / "out").exists()


def test_inspect_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gptj_command.main(["inspect", str(folder)], standalone_mode=False)
    assert "no language model's head: it is a GPTJ" in capsys.readouterr().err


def test_no_trace_is_recorded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=NO_HEAD):
        record_trace(folder, "pt", tmp_path / "trace.safetensors")
    assert not (tmp_path / "trace.safetensors").exists()
