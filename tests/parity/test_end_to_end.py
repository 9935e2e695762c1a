"""The proof itself: the backends that are installed here, each in its own process, give the oracle's answers.

Collected only where GPTJ_TEST_BACKENDS names backends; one that is named and not installed fails.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapter_samples import write_sample_adapter
from click.testing import CliRunner
from pretended_hub import pretend_hub
from weight_choices import two_sets

from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.parity.record import Record
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_tensor
from gptj.parity.run import open_oracle, run_parity


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_all_backends_agree_with_the_oracle_and_with_each_other(checkpoint, backend_names, dtype):
    report = run_parity(checkpoint, backend_names, dtype=dtype)
    report.raise_if_failed()
    assert not report.divergences
    if dtype in ("float64", "float32"):
        assert all(text.same == text.tokens for text in report.texts)


def test_all_agree_with_an_adapter_at_work(checkpoint, backend_names, tmp_path):
    adapter = write_sample_adapter(tmp_path / "adapter", "patterns")
    report = run_parity(checkpoint, backend_names, adapter=adapter)
    report.raise_if_failed()
    assert not report.divergences and all(text.same == text.tokens for text in report.texts)


def test_another_model_agrees_too(backend_names, tmp_path):
    """More layers than ten, the whole head rotating, exact GELU, a tied head, another epsilon, few positions."""
    config = revealing_config(
        n_layer=11,
        rotary_dim=None,
        activation_function="gelu",
        tie_word_embeddings=True,
        layer_norm_epsilon=1e-6,
        n_positions=64,
    )
    directory = write_checkpoint(tmp_path / "model", config, revealing_fill(1))
    run_parity(directory, backend_names, seed=1).raise_if_failed()


@pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_the_chosen_weights_are_compared(backend_names, tmp_path, name):
    folder = two_sets(tmp_path / "model", name)
    run_parity(folder, backend_names[:1], weights=name).raise_if_failed()


def test_one_wrong_tensor_is_caught_and_its_operation_named(checkpoint, backend_names, tmp_path, monkeypatch):
    """The proof can fail: a checkpoint whose block 1 lost its fc_out bias, judged by the right one."""

    def without_bias(spec):
        value = revealing_tensor(spec)
        return np.zeros_like(value) if spec.name == "transformer.h.1.mlp.fc_out.bias" else value

    wrong = write_checkpoint(tmp_path / "wrong", revealing_config(), without_bias)
    monkeypatch.setattr("gptj.parity.run.open_oracle", lambda *_, **options: open_oracle(checkpoint, **options))
    report = run_parity(wrong, backend_names[:1])
    assert not report.passed
    assert [(d.stage, d.looks_like) for d in report.divergences] == [("block 1, fc_out", "bias dropped")]


def test_a_record_names_its_versions_and_environment(checkpoint, backend_names, tmp_path):
    run_parity(checkpoint, backend_names[:1], keep=tmp_path)
    facts = Record.load(tmp_path / backend_names[0]).facts
    assert {"gptj", "python", "numpy"} < set(facts["versions"]) and facts["environment"]["OMP_WAIT_POLICY"]


def test_a_repository_is_compared_in_the_revision_that_is_named(backend_names, tmp_path, monkeypatch):
    asked = pretend_hub(monkeypatch, tmp_path)
    owner = tmp_path / "remote" / "someone"
    owner.mkdir(parents=True)
    write_checkpoint(owner / "tiny", revealing_config(n_layer=1), revealing_fill(0))
    monkeypatch.setattr("gptj.command.main.ENVIRONMENT", {})
    words = ["parity", "someone/tiny", "--revision", "float16", "--backends", backend_names[0], "--json"]
    done = CliRunner().invoke(gptj_command, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"] is True
    assert {(call["repo_id"], call["revision"]) for call in asked} == {("someone/tiny", "float16")}


def test_two_folders_are_compared_in_a_process_each(backend_names, checkpoint, tmp_path):
    def tuned(spec):
        value = revealing_tensor(spec)
        return value * np.float32(1.01) if spec.name == "transformer.h.1.mlp.fc_in.weight" else value

    other = write_checkpoint(tmp_path / "tuned", revealing_config(), tuned)
    (tmp_path / "prompts").write_text('{"token_ids": [5, 6, 7]}\n{"token_ids": [8]}\n')
    given = ["parity", str(checkpoint), str(other), "--backends", backend_names[0], "--prompts", tmp_path / "prompts"]
    done = CliRunner().invoke(gptj_command, [*map(str, given), "--json"])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    [one] = found["backends"]
    assert not found["equal"] and one["comparison"]["pairs"][0]["first"]["tap"] == "h.1.fc_in"
    assert one["taps"]["h.1.ln_1"] == 0 and 0.005 < one["taps"]["h.1.fc_in"] < 0.015
    assert len(one["comparison"]["texts"]) == 2 and 0 < one["greedy"] <= 1


def test_a_folder_is_compared_with_itself_on_another_path(backend_names, checkpoint):
    given = ["parity", str(checkpoint), str(checkpoint), "--backends", backend_names[0], "--path", "prepared"]
    done = CliRunner().invoke(gptj_command, [*given, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["equal"] is True
