"""`convert`, its dry run and `inspect` say each thing once, as a warning or as a note."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from gptj_conversion.convert import convert
from lawful.weights import VALUE_HEAD
from mesh_samples import write_mesh_sample
from test_mesh_optimizers import with_chain
from weight_changes import arrays, as_bin, renamed, store, with_more

from gptj.checkpoint import write_checkpoint
from gptj.command import main as cli
from gptj.errors import CheckpointWarning
from gptj.parity.revealing import revealing_config, revealing_fill


def model(path: Path, change: Callable[[Path], object]) -> tuple[str, ...]:
    change(write_checkpoint(path, revealing_config(n_layer=1), revealing_fill(0)))
    return ()


def without_bias(path: Path, to: str = "safetensors") -> tuple[str, ...]:
    def change(folder: Path) -> None:
        tensors = arrays(folder)
        del tensors["lm_head.bias"]
        store(folder, tensors)
        if to == "bin":
            as_bin(lambda _: tensors)(folder)

    return model(path, change)


def older_step(path: Path) -> tuple[str, ...]:
    sample = write_mesh_sample(path)
    shutil.copytree(sample.step_directory, sample.path / "step_9")
    (sample.path / "step_9" / "shard_1" / "3.npz").unlink()
    return ("--config", str(sample.config_file))


def older_step_of_another_chain(path: Path) -> tuple[str, ...]:
    sample = with_chain(path, "Adafactor")
    shutil.copytree(sample.step_directory, sample.path / "step_9")
    (sample.path / "step_9" / "shard_1" / "3.npz").unlink()
    return ("--config", str(sample.config_file))


def chain(name: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda path: ("--config", str(with_chain(path, name).config_file))


# How the source is made, which gives the options, and what is to be said once.
SOURCES: dict[str, tuple[Callable[[Path], tuple[str, ...]], tuple[str, ...]]] = {
    "an older step": (older_step, ("not the newest",)),
    "plain Adam": (chain("plain Adam"), ("not the original's",)),
    "a schedule alone": (chain("a schedule alone"), ("not the original's",)),
    "an older step of another chain": (older_step_of_another_chain, ("not the newest", "not the original's")),
    "Adam's moments": (
        lambda path: ("--config", str(write_mesh_sample(path, layout="full").config_file)),
        ("Adam's moments",),
    ),
    "a value head": (lambda path: model(path, with_more(VALUE_HEAD)), ("v_head.summary.weight",)),
    "a value head in a .bin": (
        lambda path: model(path, as_bin(lambda t: {**t, **VALUE_HEAD})),
        ("v_head.summary.weight",),
    ),
    "a wrapper": (lambda path: model(path, renamed(lambda name: "module." + name)), ("module.",)),
    "no lm_head.bias": (without_bias, ("lm_head.bias",)),
    "no lm_head.bias in a .bin": (lambda path: without_bias(path, "bin"), ("lm_head.bias",)),
}


def told(monkeypatch: pytest.MonkeyPatch, *words: object) -> list[str]:
    """What a command says on stderr, as in a process of its own."""
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    with warnings.catch_warnings():
        warnings.simplefilter("default", CheckpointWarning)
        monkeypatch.setattr(warnings, "showwarning", cli._show_warning)
        done = CliRunner().invoke(cli.gptj_command, [*map(str, words)], catch_exceptions=False, standalone_mode=False)
    return [line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith(("warning: ", "note: "))]


@pytest.mark.parametrize("command", ["convert", "dry run", "inspect"])
@pytest.mark.parametrize("source", SOURCES)
def test_each_thing_is_said_once(tmp_path, monkeypatch, source, command):
    make, facts = SOURCES[source]
    options = make(tmp_path / "model")
    words = ["inspect"] if command == "inspect" else ["convert"]
    words += [tmp_path / "model", *([] if command == "inspect" else [tmp_path / "out"]), *options]
    lines = told(monkeypatch, *words, *(["--dry-run"] if command == "dry run" else []))
    for fact in facts:
        assert sum(fact in line for line in lines) == 1, lines
    for line in lines:
        assert sum(line in other for other in lines) == 1, lines


def test_what_a_command_says_again_in_another_run_is_said_again(tmp_path, monkeypatch):
    options = older_step(tmp_path / "model")
    for out in ("one", "two"):
        lines = told(monkeypatch, "convert", tmp_path / "model", tmp_path / out, *options)
        assert sum("not the newest" in line for line in lines) == 1


def test_python_hears_it_as_a_warning_and_the_manifest_keeps_it(tmp_path):
    options = chain("plain Adam")(tmp_path / "model")
    with pytest.warns(CheckpointWarning, match="not the original's") as heard:
        convert(tmp_path / "model", tmp_path / "out", config=options[1], fingerprint=False)
    assert len(heard) == 1
