"""How far one folder lies from another: sizes, divergence, agreement, and where the first difference is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from recorded import small_batch, write_sample

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.two_folders import compare_two, require_one_shape

CONFIG = revealing_config(n_layer=2, n_positions=512)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("first") / "first", CONFIG, "float32", batch=small_batch(CONFIG))


def tuned(folder, change, batch=None):
    """A trace of weights of which one was changed."""
    name, by = change
    weights = {**revealing_weights(CONFIG)}
    weights[name] = weights[name] * np.float32(by)
    batch = small_batch(CONFIG) if batch is None else batch
    return write_sample(folder / "tuned", CONFIG, "float32", batch=batch, weights=weights)


def test_a_folder_is_equal_to_itself(first, tmp_path):
    again = write_sample(tmp_path / "again", CONFIG, "float64", batch=small_batch(CONFIG))
    found = compare_two("pt", first, again)
    assert found.equal and found.agreement == 1 and 0 <= found.divergence[1] < 1e-9 and found.greedy is None
    assert 0 < max(found.taps.values()) < 1e-5


def test_a_tuned_weight_is_measured_and_its_tap_named(first, tmp_path):
    second = tuned(tmp_path, ("transformer.h.1.mlp.fc_out.weight", 1.5))
    found = compare_two("pt", first, second)
    [pair] = found.comparison.pairs
    assert not found.equal and pair.first.tap == "h.1.fc_out"
    assert all(size == 0 for tap, size in found.taps.items() if tap.startswith("h.0."))
    assert 0.2 < found.taps["h.1.fc_out"] < 0.6  # the bias stays
    lines = [*found.lines()]
    assert lines[0].startswith("pt: tuned first lies beyond rounding from first in block 1, fc_out: ")
    a, b = (
        trace.read("logits").astype(np.float64)
        for trace in (first, tuned(tmp_path, ("transformer.h.1.mlp.fc_out.weight", 1.5)))
    )
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    counted = small_batch(CONFIG).attention_mask == 1
    kl = (p * np.log(p / q)).sum(-1)[counted]
    assert found.divergence == pytest.approx((kl.mean(), kl.max()), rel=1e-6) and kl.max() > 1e-6
    assert found.agreement == (a.argmax(-1) == b.argmax(-1))[counted].mean()
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_is_not_finite_is_said(first, tmp_path):
    with np.errstate(invalid="ignore", over="ignore"):
        found = compare_two("pt", first, tuned(tmp_path, ("transformer.h.1.mlp.fc_out.weight", np.nan)))
    assert not found.equal and np.isnan(found.taps["logits"]) and np.isnan(found.divergence[0])
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["taps"]["logits"] == "nan"


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 1}, {"n_head": 2}, {"vocab_size": 224}, {"rotary_dim": 6}, {"n_inner": 80},
     {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-6}],
    ids=str,
)  # fmt: skip
def test_folders_of_other_models_are_refused_by_the_field(tmp_path, change):
    other = revealing_config(**{"n_layer": 2, "n_positions": 512, **change})
    [field] = change
    with pytest.raises(InputError, match=f"B/config.json: config: {field}: of another model"):
        require_one_shape(CONFIG, other, file="B/config.json")


def test_the_command_refuses_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("gptj.backends.Backend.missing", ())  # as where every framework is installed
    write_checkpoint(tmp_path / "a", CONFIG, revealing_fill())
    write_checkpoint(tmp_path / "b", revealing_config(n_layer=1), revealing_fill())

    def run(*arguments):
        return CliRunner().invoke(gptj_command, ["parity", *map(str, arguments), "--backends", "flax"])

    assert "config: n_layer" in str(run(tmp_path / "a", tmp_path / "b").exception)
    assert "plain or prepared or compiled" in str(run(tmp_path / "a", tmp_path / "a", "--path", "int8").exception)
    assert run(tmp_path / "a", "--path", "int8").exit_code == 2
    assert run(tmp_path / "a", tmp_path / "a", "--skip-manifest").exit_code == 2
