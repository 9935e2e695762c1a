"""The demo without a framework: what it ships, what it says when frameworks are missing, differ, or are not there."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from demo_block import shape
from gptj_conversion.convert import convert, describe
from gptj_conversion.verify import verify
from rich.console import Console

from gptj.checkpoint import verify_checkpoint
from gptj.command.demo import journey
from gptj.config import GPTJConfig
from gptj.errors import BackendError, WriteError
from gptj.text.tokenizer import GPTJTokenizer

MEGABYTES = 6


def heard(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)


def text_of(console: Console) -> str:
    return console.file.getvalue()


def test_the_model_of_verse_is_small_and_has_all_that_a_conversion_needs(tmp_path):
    files = [path for path in Path(journey.HERE).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 1e6
    facts = describe(journey.SHAKESPEARE)
    assert (facts.shards, facts.dtype, facts.problems) == (8, "bfloat16", ())
    assert len(verify(journey.SHAKESPEARE).tensors) == 55
    out = convert(journey.SHAKESPEARE, tmp_path / "out")
    config, tokenizer = GPTJConfig.from_file(out), GPTJTokenizer.from_pretrained(out)
    assert config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1 == config.vocab_size - 1
    assert f"{facts.parameters:,} parameters" in (journey.SHAKESPEARE / "README.md").read_text()


def test_without_a_framework_the_folder_is_kept_and_the_error_says_how_to_install_one(tmp_path, monkeypatch):
    monkeypatch.setattr(journey, "installed_backends", lambda: ())
    monkeypatch.setattr("gptj.backends.installed_backends", lambda: ())
    monkeypatch.delenv("GPTJ_BACKEND", raising=False)
    console = heard()
    with pytest.raises(BackendError, match=r"no framework is installed.*gptj-multibackend\[pt\]"):
        journey.run_demo(None, console, keep=tmp_path / "verse")
    assert len(verify_checkpoint(tmp_path / "verse").tensors) == 55
    assert "converted" in text_of(console) and "verified" in text_of(console)


def test_a_place_that_is_taken_is_refused_before_anything_is_run(tmp_path, monkeypatch):
    (tmp_path / "verse").mkdir()
    (tmp_path / "verse" / "mine").touch()
    monkeypatch.setattr(journey, "run_in_process", lambda *arguments: pytest.fail("a framework was started"))
    with pytest.raises(WriteError, match=r"not empty: it holds 'mine'\. Name another folder"):
        journey.run_demo(("pt",), heard(), keep=tmp_path / "verse")
    assert [path.name for path in (tmp_path / "verse").iterdir()] == ["mine"]


def answers(monkeypatch: pytest.MonkeyPatch, **ids: list[int]) -> None:
    """Let each backend's process say that it made these tokens."""
    made = {name: json.dumps({"token_ids": one, "text": "ROMEO:\n[Exit]\n"}) for name, one in ids.items()}
    monkeypatch.setattr(journey, "run_in_process", lambda command, name: made[name])


def test_frameworks_that_write_something_else_are_named(monkeypatch):
    answers(monkeypatch, pt=[1, 2], tf=[1, 2], flax=[1, 3])
    console = heard()
    assert not journey._write_verse(Path("verse"), ("pt", "tf", "flax"), console)
    assert "Flax wrote something else than PyTorch" in text_of(console) and "the same" not in text_of(console)


@pytest.mark.parametrize(
    ("names", "words"), [(("pt", "tf"), "PyTorch and TensorFlow wrote the same"), (("tf",), "TensorFlow")]
)
def test_frameworks_that_write_the_same_are_named_and_the_text_stands_there_once(monkeypatch, names, words):
    answers(monkeypatch, pt=[1, 2], tf=[1, 2])
    console = heard()
    assert journey._write_verse(Path("verse"), names, console)
    assert words in text_of(console) and text_of(console).count("    ROMEO:\n    [Exit]\n") == 1


def test_a_framework_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(journey, "installed_backends", lambda: ("pt", "flax"))
    console = heard()
    journey._say_what_is_missing(console)
    assert text_of(console).strip() == 'TensorFlow is not installed: pip install "gptj-multibackend[tf]"'


@pytest.mark.parametrize("keep", [None, Path("elsewhere")])
def test_the_last_lines_are_commands_that_follow_each_other(keep):
    console = heard()
    journey._say_what_next(keep, "pt", console)
    commands = [line.split() for line in text_of(console).splitlines() if line.startswith("  gptj ")]
    folder = "verse" if keep is None else "elsewhere"
    kept = [["gptj", "demo", "--keep", folder]] if keep is None else []
    assert commands[: len(kept)] == kept and all(folder in command for command in commands)


def test_the_shape_of_the_readmes_block_leaves_out_seconds_and_errors_and_nothing_else():
    text = "  12.3 s  PyTorch\n\n  PyTorch   1.2e-06   3.4e-07   128 of 128\n"
    assert shape(text) == "# s  PyTorch\n\n  PyTorch # #   128 of 128\n"
    assert shape(text.replace("12.3", " 4.5").replace("1.2e-06", "9.9e-07")) == shape(text)
    assert shape(text.replace("128 of", "127 of")) != shape(text)


def test_every_line_fits_a_terminal_of_80_columns():
    rows = [journey._Row("TensorFlow", 3.3e-06, 2.3e-06, 2.9e-06, 128, 128)]
    console = heard()
    console.print(journey._table(rows))
    assert max(map(len, text_of(console).splitlines())) <= 80
    assert re.search(r"TensorFlow +3\.3e-06 +2\.3e-06 +- +128 of 128", text_of(console))
