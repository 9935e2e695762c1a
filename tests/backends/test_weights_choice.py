"""`gptj generate --weights` and `from_pretrained(weights=...)` run the chosen set in each wing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from weight_choices import FOREIGN, SETS, named, two_sets

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import FormatError
from gptj.parity.revealing import revealing_config, revealing_fill

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def expected(wing, tmp_path_factory):
    """What the chosen weights continue IDS with, and what the weights beside them do."""
    answers = []
    for seed in (1, 0):
        path = write_checkpoint(tmp_path_factory.mktemp("one") / "model", revealing_config(), revealing_fill(seed))
        model = wing.model("causal_lm").from_pretrained(path)
        answers.append(wing.numpy(model.generate([IDS], max_new_tokens=6))[0].tolist())
    assert answers[0] != answers[1]
    return answers[0]


@pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
@pytest.mark.parametrize("way", ["its name", "its path", "a shard's name", "a shard in place of the folder"])
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_generate_runs_the_chosen_set(wing, tmp_path, expected, monkeypatch, name, way):
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    if SETS[name][1] is None and "shard" in way:
        way = "in place of the folder"
    path, options = named(two_sets(tmp_path / "model", name), name, way)
    words = ["generate", str(path), *options, "--token-ids", " ".join(map(str, IDS)), "--json", "--max-new-tokens", "6"]
    done = CliRunner().invoke(gptj_command, [*words, "--backend", wing.name], catch_exceptions=False)
    assert json.loads(done.stdout)["token_ids"] == expected


@pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
def test_a_model_of_the_chosen_set_computes_with_it(wing, tmp_path, expected):
    folder = two_sets(tmp_path / "model", "model.safetensors.index.fp16.json")
    for options in ({"variant": "fp16"}, {"weights": "model.safetensors.index.fp16.json", "mmap": False}):
        model = wing.model("causal_lm").from_pretrained(folder, **options)
        assert np.array_equal(wing.numpy(model.generate([IDS], max_new_tokens=6))[0], expected)


@pytest.mark.parametrize("name", FOREIGN)
def test_generate_says_how_other_weights_are_converted(wing, tmp_path, monkeypatch, name):
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    folder = two_sets(tmp_path / "model", name)
    words = ["generate", str(folder), "--token-ids", "1 2", "--backend", wing.name, "--weights", name]
    with pytest.raises(FormatError, match=rf"gptj convert {folder} OUT --weights {name}"):
        CliRunner().invoke(gptj_command, words, catch_exceptions=False, standalone_mode=False)
