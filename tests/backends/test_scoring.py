"""`score` in every wing: the oracle's log-likelihoods, in any batch, dtype and state of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from adapter_samples import KINDS, sample_pairs, write_sample_adapter
from tokenizer_samples import small
from wings import FLOAT32_ABSOLUTE

from gptj.adapters import AdapterConfig
from gptj.errors import InputError
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_weights

CONFIG = revealing_config()
PREFIX = 7


def rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


TEXTS = rows(3, 17, 0, 1, 40, 17, 2)


def agree(found, expected, bound: float) -> bool:
    """Whether tokens and greedy choices are the same, and the log-likelihoods as near as logits may be."""
    assert len(found) == len(expected)
    return all(
        one.token_ids.tolist() == other.token_ids.tolist()
        and one.greedy.tolist() == other.greedy.tolist()
        and np.abs(one.log_likelihoods - other.log_likelihoods).max(initial=0) <= bound
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.feature("log-likelihoods: model.score", "causal_lm")
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", FLOAT32_ABSOLUTE)])
def test_scores_are_the_oracles(wing, revealing, oracle, dtype, bound):
    expected = oracle().score(TEXTS, prefix_token_id=PREFIX)
    model = revealing(dtype=dtype)
    for batch_size in (None, 2):
        assert agree(model.score(TEXTS, prefix_token_id=PREFIX, batch_size=batch_size), expected, bound)


def test_continuations_and_windows_are_the_oracles(wing, revealing, oracle, monkeypatch):
    monkeypatch.setattr("gptj.generation.scoring.likelihood.LOGITS_AT_ONCE", 5 * CONFIG.vocab_size)
    contexts, continuations = [[1, 2, 3], [1, 2, 3], [], TEXTS[4]], [[4], [5], [6, 7], TEXTS[1]]
    model = revealing()
    for options in ({}, {"max_length": 17}, {"max_length": 9, "stride": 4}):
        options["prefix_token_id"] = PREFIX
        expected = oracle().score(contexts, continuations, **options)
        assert agree(model.score(contexts, continuations, **options), expected, FLOAT32_ABSOLUTE)
        assert agree(model.score(TEXTS, **options), oracle().score(TEXTS, **options), FLOAT32_ABSOLUTE)


def test_a_prepared_model_scores_the_same(wing, folder, oracle):
    model = wing.model("causal_lm").from_pretrained(folder(), inference=True)
    expected = oracle().score(TEXTS, prefix_token_id=PREFIX)
    assert agree(model.score(TEXTS, prefix_token_id=PREFIX), expected, FLOAT32_ABSOLUTE)


def test_a_tied_head_scores_the_same(wing, revealing, oracle):
    found = revealing(tie_word_embeddings=True).score(TEXTS[:2], prefix_token_id=PREFIX)
    assert agree(found, oracle(tie_word_embeddings=True).score(TEXTS[:2], prefix_token_id=PREFIX), FLOAT32_ABSOLUTE)


def test_logits_that_a_device_holds_score_the_same(wing, revealing, oracle, monkeypatch):
    """As on a GPU, where the host sees sums of parts alone."""
    module = __import__(f"gptj.{wing.name}.generate", fromlist=["on_host"])
    monkeypatch.setattr(module, "on_host", lambda logits: False)
    expected = oracle().score(TEXTS, prefix_token_id=PREFIX)
    assert agree(revealing().score(TEXTS, prefix_token_id=PREFIX), expected, FLOAT32_ABSOLUTE)


def test_bfloat16_is_near(wing, revealing, oracle):
    expected = oracle().score(TEXTS, prefix_token_id=PREFIX)
    found = revealing(dtype="bfloat16").score(TEXTS, prefix_token_id=PREFIX)
    assert all(
        np.abs(one.log_likelihoods - other.log_likelihoods).max(initial=0) < 0.2
        for one, other in zip(found, expected, strict=True)
    )


def test_rows_may_be_the_wings_own_arrays(wing, revealing):
    model = revealing()
    native = model._native(np.array([TEXTS[1], TEXTS[5]]))
    expected = model.score([TEXTS[1], TEXTS[5]], prefix_token_id=PREFIX)
    assert agree(model.score(native, prefix_token_id=PREFIX), expected, 0)
    assert agree(model.score(list(native), prefix_token_id=PREFIX), expected, 0)


def test_the_likeliest_continuation_is_what_generate_writes(wing, revealing):
    model = revealing()
    made = wing.numpy(model.generate([TEXTS[0]], max_new_tokens=5, do_sample=False, eos_token_id=None))[0, 3:].tolist()
    first, second = model.score([TEXTS[0]] * 2, [made, [*made[:4], (made[4] + 1) % CONFIG.vocab_size]])
    assert first.is_greedy and not second.is_greedy and second.greedy[:4].all()


def test_outputs_that_the_config_asks_for_are_not_made_for_nothing(wing, revealing, oracle):
    model = revealing(output_hidden_states=True, output_attentions=True)
    assert agree(
        model.score(TEXTS[:2], prefix_token_id=PREFIX),
        oracle().score(TEXTS[:2], prefix_token_id=PREFIX),
        FLOAT32_ABSOLUTE,
    )


def test_params_are_flaxs_alone(wing, revealing, oracle):
    model = revealing()
    if wing.name != "flax":
        with pytest.raises(InputError, match="params"):
            model.score([[1]], prefix_token_id=PREFIX, params={})
        return
    found = revealing(dtype="float64").score(TEXTS[:2], prefix_token_id=PREFIX, params=model.params)
    assert agree(found, oracle().score(TEXTS[:2], prefix_token_id=PREFIX), FLOAT32_ABSOLUTE)


def test_an_adapter_at_work_counts(wing, folder, tmp_path):
    path = write_sample_adapter(tmp_path / "adapter", "all")
    model = wing.model("causal_lm").from_pretrained(folder())
    plain = model.score(TEXTS[:2], prefix_token_id=PREFIX)
    model.load_adapter(path)
    pairs = sample_pairs(AdapterConfig(**KINDS["all"]))
    adapted = Oracle(CONFIG, revealing_weights(CONFIG), adapter=pairs).score(TEXTS[:2], prefix_token_id=PREFIX)
    found = model.score(TEXTS[:2], prefix_token_id=PREFIX)
    assert agree(found, adapted, FLOAT32_ABSOLUTE) and not agree(found, plain, 0.01)


def test_the_example_of_the_page_runs(wing, folder, tmp_path, monkeypatch):
    source = folder(vocab_size=300, n_layer=1, bos_token_id=299, eos_token_id=299)
    path = shutil.copytree(source, tmp_path / "gpt-j-6b")
    monkeypatch.chdir(tmp_path)
    small().save_pretrained(path)
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("gptj.pt", f"gptj.{wing.name}")
    names = {}
    exec(code, names)
    assert names["score"].token_ids.tolist() == small().encode("To be, or not to be")
    assert names["best"].log_likelihood < 0 and names["best"].n_bytes == 3
