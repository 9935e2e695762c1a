"""`gptj export` before any framework: what is refused, with the reason and the way, and that nothing is left."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from adapter_samples import write_sample_adapter

from gptj.command.export import ELSEWHERE, FORMATS, write
from gptj.command.main import gptj_command
from gptj.errors import BackendError, FormatError, InputError, MissingFileError, WriteError


def export(*words: object) -> None:
    gptj_command.main(["export", *map(str, words)], standalone_mode=False)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_what_others_write_better_is_refused_with_the_way(tmp_path: Path, target: str) -> None:
    place, out = tmp_path / "a model", tmp_path / "out"
    place.mkdir()
    with pytest.raises(InputError, match=f"--to {target}: ") as caught:
        export(place, out, "--to", target)
    assert f"'{place}'" in str(caught.value.hint) and not out.exists()


@pytest.mark.parametrize(
    ("said", "meant"), [("ct2", "ctranslate2"), ("SavedModel", "savedmodel"), ("pt2", "torch-export"), ("ONNX", "onnx")]
)
def test_a_format_by_another_name_is_guessed(tmp_path: Path, said: str, meant: str) -> None:
    with pytest.raises(click.BadParameter, match=f"Did you mean {meant}"):
        export(tmp_path, tmp_path / "out", "--to", said)


class Model:
    """Stands for a loaded model."""


@pytest.fixture
def wing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A framework that is not there: `write` is what its writer does."""
    made = SimpleNamespace(write=lambda model, folder: None)
    loads = SimpleNamespace(from_pretrained=lambda directory, **options: Model())
    monkeypatch.setattr("gptj.backends.backend", lambda name: SimpleNamespace(GPTJForCausalLM=loads))
    writers = SimpleNamespace(write_torch_export=lambda model, folder: made.write(model, folder))
    find = importlib.import_module
    monkeypatch.setattr("importlib.import_module", lambda name: writers if name.endswith(".export") else find(name))
    return made


def run(folder: Path, out: Path) -> None:
    write(folder, out, FORMATS["torch-export"], dtype=None, weights=None)


def test_the_tokenizer_and_the_config_go_along(tmp_path: Path, wing: Any) -> None:
    def writes(model: Any, folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"w")

    wing.write = writes
    place = tmp_path / "model"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (place / name).write_text(name)
    run(place, tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert found == ["config.json", "deep", "deep/weights", "tokenizer.json"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("of a library"), KeyboardInterrupt()]
)
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, wing: Any, error: BaseException) -> None:
    def writes(model: Any, folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"w")
        raise error

    wing.write = writes
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
        run(place, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_stands_there_is_not_replaced(tmp_path: Path, wing: Any) -> None:
    wing.write = lambda model, folder: pytest.fail("written")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(WriteError, match=r"is not empty .*Name another"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(WriteError, match="no such folder"):
        run(tmp_path, tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("target", ["torch-export", "ctranslate2", "vllm"])
def test_a_folder_that_is_no_models_is_refused_before_a_way_is_said(tmp_path: Path, target: str) -> None:
    """ "vLLM opens this folder as it is" would be a lie of one that is not there, or an adapter's."""
    with pytest.raises(MissingFileError, match="no such directory"):
        export(tmp_path / "nothing", tmp_path / "out", "--to", target)
    (tmp_path / "file").write_text("a text")
    with pytest.raises(FormatError, match=r"file: not a directory .found a file of 6 bytes"):
        export(tmp_path / "file", tmp_path / "out", "--to", target)
    adapter = write_sample_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"adapter: a LoRA adapter without its base model\. Merge it"):
        export(adapter, tmp_path / "out", "--to", target)


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"onnx and onnxscript cannot be imported\. Run: pip install"):
        write(tmp_path, tmp_path / "out", FORMATS["onnx"], dtype=None, weights=None)


@pytest.mark.parametrize("limit", ["nan", "inf", "1.5", "1e30", "-1", "0"])
def test_a_limit_of_documents_is_whole_or_a_part(tmp_path: Path, limit: str) -> None:
    with pytest.raises(click.UsageError, match=r"limit|not in the range"):
        gptj_command.main(["eval", str(tmp_path), "--tasks", "a", "--limit", limit], standalone_mode=False)


def test_evaluation_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gptj.harness", raising=False)
    for limit in ("3", "0.5"):
        with pytest.raises(BackendError, match=r'lm_eval cannot be imported.*pip install "gptj-multibackend\[eval\]"'):
            gptj_command.main(["eval", str(tmp_path), "--tasks", "a", "--limit", limit], standalone_mode=False)
    # In an interpreter of its own: pytest's loader, which has an installed plugin's modules, runs none as a program.
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('gptj.harness', run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and re.match(r"gptj: .*lm_eval cannot be imported.*pip install", ran.stderr), ran.stderr
