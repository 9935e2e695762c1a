"""`gptj parity matrix` and `ladder`: what they hand on, print and end with; no framework runs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from gptj.checkpoint import write_checkpoint
from gptj.command import invariance
from gptj.command.main import gptj_command
from gptj.config.schema import schema
from gptj.parity.findings import Findings, LadderRung, MeasureFound
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.parity.run import open_reference

CONFIG = revealing_config(n_layer=1, n_inner=192)  # that the TPU's format can hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("command") / "model", CONFIG, revealing_fill(0))


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    monkeypatch.setattr(invariance, "installed_backends", lambda: ("pt",))


def run(*arguments):
    return CliRunner().invoke(gptj_command, ["parity", *map(str, arguments)])


@pytest.mark.parametrize("holds", [True, False])
def test_the_matrix_is_printed_and_its_verdict_is_the_exit_status(folder, monkeypatch, holds):
    row = MeasureFound("pt", "cached", "logits", 0.25, 1.0 if holds else 0.125, holds)
    found = Findings("holds" if holds else "differs", "headline", str(folder), matrix=(row,))
    monkeypatch.setattr("gptj_conversion.round_trip.through_formats", lambda *_: ({}, []))
    monkeypatch.setattr("gptj.parity.matrix.run_matrix", lambda *_, **__: found)
    done = run("matrix", folder)
    assert done.exit_code == (0 if holds else 1)
    assert "cached: logits" in done.output and all(len(line) <= 80 for line in done.output.splitlines()[1:])
    assert json.loads(run("matrix", folder, "--json").output)["matrix"][0]["holds"] == holds


def test_every_format_gives_the_weights_back(folder, monkeypatch):
    seen = {}

    def look(directory, names, *, folders, **_):
        for name, place in folders.items():
            _, read = open_reference(place)
            seen[name] = {row.name: read(row.name, "float32") for row in schema(CONFIG)}
        return Findings("holds", "headline", str(directory))

    monkeypatch.setattr("gptj.parity.matrix.run_matrix", look)
    done = run("matrix", folder)
    assert done.exit_code == 0, done.output
    assert {*seen} == {"safetensors", "mesh", "bin", "flax", "tf"}
    _, read = open_reference(folder)
    for name, tensors in seen.items():
        for tensor, values in tensors.items():
            assert (values == read(tensor, "float32")).all(), (name, tensor)


def test_a_format_that_cannot_hold_the_model_is_named(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "gptj.parity.matrix.run_matrix", lambda *_, **options: given.update(options) or Findings("holds", "headline")
    )
    folder = write_checkpoint(tmp_path / "model", revealing_config(n_layer=1), revealing_fill(0))
    assert run("matrix", folder).exit_code == 0
    assert {*given["folders"]} == {"safetensors", "bin", "flax", "tf"}
    (note,) = given["notes"]
    assert note.startswith("There is no row through mesh: n_inner")


def test_the_ladder_is_printed(folder, monkeypatch):
    rung = LadderRung("pt", "bfloat16", 0.01, 1e-5, 0.99, 0.97, 8)
    found = Findings("holds", "headline", str(folder), ladder=(rung,))
    monkeypatch.setattr("gptj.parity.ladder.run_ladder", lambda *_, **__: found)
    done = run("ladder", folder)
    assert done.exit_code == 0
    assert "bfloat16" in done.output and "97" in done.output
    assert json.loads(run("ladder", folder, "--json").output)["ladder"][0]["rung"] == "bfloat16"


@pytest.mark.parametrize(
    "arguments", [["matrix"], ["matrix", "DIR", "--dtype", "int8"], ["ladder", "DIR", "--path", "x"]]
)
def test_misuse_is_two(folder, arguments):
    assert run(*(folder if word == "DIR" else word for word in arguments)).exit_code == 2
