"""`gptj parity compare` and the page on traces: what they say and how they end, without a framework."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mutants import MUTANTS
from recorded import facts_of, inputs_of, recorded_taps, small_batch, write_sample

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import GPTJError, InputError, WriteError
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import open_trace, write_trace
from gptj.parity.trace_record import batch_of_prompts, probe_batch, weights_sha256

PAGE = Path(__file__).parents[2] / "docs" / "traces.md"
CONFIG = revealing_config(n_layer=2, n_positions=512)


def run(*arguments: object):
    return CliRunner().invoke(gptj_command, ["parity", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    write_checkpoint(folder / "model", CONFIG, revealing_fill())
    write_checkpoint(folder / "other", revealing_config(n_layer=1), revealing_fill())
    write_sample(folder / "base", CONFIG)
    write_sample(folder / "right", CONFIG, "float32")
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "epsilon 1e-6")
    write_sample(folder / "wrong", CONFIG, "float32", mutant=mutant)
    return folder


def test_traces_that_agree_end_with_0(folder):
    done = run("compare", folder / "base", folder / "right")
    assert done.exit_code == 0
    assert "right agrees with base: all 34 taps" in done.output


def test_a_difference_ends_with_1_and_the_reference_tells_where_it_was_born(folder):
    bare = run("compare", folder / "base", folder / "wrong")
    told = run("compare", folder / "base", folder / "wrong", "--reference", folder / "model")
    assert (bare.exit_code, told.exit_code) == (1, 1)
    assert "block 0, ln_1: born there, in one of the two" in bare.output
    assert "block 0, ln_1: born there, 7.4e-02 where" in told.output
    assert "; looks like: epsilon 1e-06\n" in told.output


def test_json_has_every_tap_and_the_verdicts(folder):
    done = run("compare", folder / "base", folder / "wrong", "--reference", folder / "model", "--json")
    found = json.loads(done.stdout)
    [pair] = found["pairs"]
    assert found["passed"] is False and pair["first"]["tap"] == "h.0.ln_1" and len(pair["taps"]) == 34
    assert {origin["trace"]: origin["verdict"] for origin in pair["origins"]} == {
        "base": "came in",
        "wrong": "born there",
    }
    assert [tap["tap"] for tap in found["born"]["wrong"]] == ["h.0.ln_1", "h.1.ln_1", "ln_f"]


def test_verbose_prints_every_tap(folder):
    lines = run("compare", folder / "base", folder / "right", "--verbose").output.splitlines()
    assert sum(line.startswith("right  ") for line in lines) == 34


@pytest.mark.parametrize(
    "arguments", [["compare"], ["compare", "base"], ["compare", "base", "right", "--weights", "x"], ["record"],
                  ["record", "model", "-o", "x"], ["record", "model", "--backend", "pt"], []]
)  # fmt: skip
def test_misuse_ends_with_2(folder, arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": 1}, "n_layer"), ({"rotary_dim": 6}, "rotary_dim"), ({"n_inner": 80}, "n_inner"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"activation_function": "relu"}, "activation_function"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"), ({"n_positions": 256}, "n_positions"),
        ({"n_head": 2, "rotary_dim": 6, "layer_norm_epsilon": 1e-3}, "n_head, rotary_dim, layer_norm_epsilon"),
    ],
)  # fmt: skip
def test_a_reference_of_another_model_is_refused(folder, tmp_path, change, named):
    other = revealing_config(**{"n_layer": 2, "n_positions": 512} | change)
    write_checkpoint(tmp_path / "other", other, revealing_fill())
    done = run("compare", folder / "base", folder / "right", "--reference", tmp_path / "other")
    assert isinstance(done.exception, InputError) and f"config: {named}: of another model" in str(done.exception)
    assert done.exception.exit_status == 2


def test_a_trace_of_another_epsilon_than_the_references_is_judged_by_the_references(folder, tmp_path):
    """In either order, and whichever trace is the more exact: the config of the weights is the judge."""
    config = revealing_config(n_layer=2, n_positions=512, layer_norm_epsilon=1e-6)
    write_sample(tmp_path / "ported", config, weights=revealing_weights(CONFIG))
    for order in (["ported", "right"], ["right", "ported"]):
        paths = [(tmp_path if name == "ported" else folder) / name for name in order]
        done = run("compare", *paths, "--reference", folder / "model")
        assert done.exit_code == 1
        assert "ported: block 0, ln_1 is not what its inputs give" in done.output
        assert "; looks like: epsilon 1e-06" in done.output
        assert "config's layer_norm_epsilon differs: 1e-06 in ported, judged by 1e-05" in done.output


UNJUDGED = [
    ["compare", "base", "nothing"], ["compare", "base", "model"], ["compare", "base", "broken"],
    ["compare", "base", "base"], ["compare", "base", "right", "--reference", "other"],
    ["compare", "base", "right", "--reference", "nothing"], ["compare", "base", "right", "--names", "nothing.toml"],
    ["compare", "base", "right", "--html", "nothing/page.html"], ["report", "nothing"], ["report", "broken"],
    ["record", "nothing", "--backend", "pt", "-o", "out"], ["record", "model", "--backend", "pt", "-o", "base"],
    ["ladder", "nothing"], ["matrix", "nothing"], ["nothing"], ["model", "nothing"], ["model", "other"],
    ["compare", "base"], ["compare", "base", "right", "--what"], ["model", "--path", "int8"],
    ["record", "model", "--backend", "pt", "-o", "out", "--prompts", "prompts", "--seed", "1"],
    ["ladder", "model", "--prompts", "prompts", "--seed", "0"],
    ["model", "model", "--prompts", "prompts", "--seed", "0"], ["model", "other", "--sensitivity"],
    ["compare", "base", "right", "--overwrite"], ["matrix", "model", "--overwrite"], ["model", "--overwrite"],
]  # fmt: skip
"""Calls that can tell nothing, each by its own fault."""


@pytest.mark.parametrize("arguments", UNJUDGED, ids=" ".join)
def test_what_cannot_be_judged_ends_with_2(folder, monkeypatch, arguments):
    monkeypatch.setattr("gptj.backends.Backend.missing", ())  # as where every framework is installed
    monkeypatch.chdir(folder)
    (folder / "broken").write_bytes(b"x" * 100)
    (folder / "prompts").write_text('{"token_ids": [1]}\n')
    done = run(*arguments)
    assert isinstance(done.exception, GPTJError | SystemExit)
    assert getattr(done.exception, "exit_status", done.exit_code) == 2, done.output
    if "--seed" in arguments:
        assert "--seed is of random tokens, and --prompts leaves none to draw" in done.output
    if arguments[-1] == "--overwrite":
        assert "--overwrite is for --html FILE" in done.output


def test_the_processes_end_so(folder):
    """Of 0, 1 and 2, as a shell sees them, a broken program and a reader that has left included."""
    program = [sys.executable, "-c", "import sys; from gptj.command.main import main; sys.exit(main())"]
    broken = "import gptj.parity.trace as t; t.open_trace = None; from gptj.command.main import main; main()"
    cases = [
        (program, "right", 0),
        (program, "wrong", 1),
        (program, "nothing", 2),
        ([sys.executable, "-c", broken], "wrong", 2),
    ]
    for command, other, status in cases:
        done = subprocess.run([*command, "parity", "compare", folder / "base", folder / other], capture_output=True)
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("command", [(), ("compare",), ("record",), ("matrix",), ("ladder",), ("report",)])
def test_the_help_says_how_it_ends(command, monkeypatch):
    monkeypatch.setattr("gptj.backends.Backend.missing", ())
    said = " ".join(run(*command, "--help").output.split())
    assert re.search(r"exit status is .*\b2 where", said), said


def test_record_replaces_nothing_unasked(folder):
    (folder / "there").write_text("x")
    done = run("record", folder / "model", "--backend", "pt", "-o", folder / "there")
    assert isinstance(done.exception, WriteError) and (folder / "there").read_text() == "x"


def test_steps_are_taken_from_gradients_alone(folder):
    done = run("record", folder / "model", "--backend", "pt", "--steps", "-o", folder / "none")
    assert done.exit_code == 2 and "give --gradients too" in done.output and not (folder / "none").exists()


def test_prompts_that_say_how_to_continue_are_refused(folder):
    (folder / "prompts").write_text('{"token_ids": [1], "temperature": 0.5}\n')
    done = run("record", folder / "model", "--backend", "pt", "-o", folder / "out", "--prompts", folder / "prompts")
    assert isinstance(done.exception, InputError) and "line 1: temperature" in str(done.exception)


def test_parity_of_a_folder_goes_on_as_it_was(folder, monkeypatch):
    monkeypatch.setattr("gptj.backends.Backend.missing", ())  # as where every framework is installed
    help_text = run("--help").output
    assert "parity [OPTIONS] DIR" in help_text and "--skip-manifest" in help_text and "record --help" in help_text
    assert "TRACE TRACE..." in run("compare", "--help").output
    done = run(folder / "nothing", "--backends", "pt")
    assert isinstance(done.exception, GPTJError) and "nothing" in str(done.exception)


def test_prompts_are_padded_left():
    batch = batch_of_prompts([[5, 6, 7], [8, 9]])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [0, 8, 9]], "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 1]], "labels": [[-100, 6, 7], [-100, -100, 9]],
    }  # fmt: skip
    for none in ([], [[1], []]):
        with pytest.raises(InputError, match="no token"):
            batch_of_prompts(none)
    assert probe_batch(CONFIG, seed=1)["input_ids"].shape == probe_batch(CONFIG)["labels"].shape == (4, 24)


def test_the_hash_of_weights_is_the_manifests_with_or_without_one(tmp_path):
    path = write_checkpoint(tmp_path / "model", CONFIG, revealing_fill())
    with_manifest = weights_sha256(path)
    (path / "manifest.json").unlink()
    assert weights_sha256(path) == with_manifest


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_pages_ten_lines_write_a_trace_that_can_be_compared(tmp_path, monkeypatch):
    batch = small_batch(CONFIG)
    taps = recorded_taps(CONFIG, batch, "float32")
    write_checkpoint(tmp_path / "model", CONFIG, revealing_fill())
    monkeypatch.chdir(tmp_path)
    write_sample(tmp_path / "base.safetensors", CONFIG)
    names = {
        "embedding": taps["embedding"], "ln_1": taps["h.0.ln_1"], "q": np.ascontiguousarray(taps["h.0.q"]),
        "input_ids": batch.input_ids, "mask": batch.attention_mask, "positions": batch.position_ids,
    }  # fmt: skip
    writing, reading = blocks("python")
    exec(writing, dict(names))
    assert [*open_trace("mine.safetensors").places] == ["embedding", "h.0.ln_1", "h.0.q"]
    space: dict[str, object] = {}
    exec(reading, space)
    assert space["found"].passed


def test_the_pages_mapping_is_one(tmp_path):
    (tmp_path / "names.toml").write_text(blocks("toml")[0])
    names = TapNames.from_file(tmp_path / "names.toml")
    assert names.resolve("transformer.h.3.attn.q_proj")[0] == "h.3.q"
    assert names.resolve("transformer.h.3.attn") is None
    batch = small_batch(CONFIG)
    write_trace(tmp_path / "t", recorded_taps(CONFIG, batch), facts_of(CONFIG), inputs=inputs_of(batch))
    assert run("compare", tmp_path / "t", tmp_path / "t", "--names", tmp_path / "names.toml").exit_code == 1
