"""Generation over each wing's own decoder: the oracle's greedy tokens, and the same whatever the batch or the cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutants import revealing_batch

from gptj.errors import ConfigError, InputError
from gptj.generation import GenerationConfig
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
IDS = revealing_batch(CONFIG).input_ids[:3, :9]
MASK = np.ones_like(IDS)
MASK[1, :4] = 0
NEW = 12


def tokens(wing, model, ids=IDS, **options):
    return wing.numpy(model.generate(ids, **options))


@pytest.mark.feature("generate: greedy, sampled, beams, streamed, padded prompts", "causal_lm")
def test_greedy_tokens_are_the_oracles(wing, revealing, oracle):
    expected, _ = oracle().generate(IDS, MASK, max_new_tokens=NEW)
    got = tokens(wing, revealing(), attention_mask=MASK, max_new_tokens=NEW, eos_token_id=None)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_a_prompt_gives_in_a_padded_batch_what_it_gives_alone(wing, revealing, options):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, **options}
    seeds = [5, 6, 7] if "do_sample" in options else [None] * 3
    batch = tokens(wing, revealing(), attention_mask=MASK, seed=seeds if seeds[0] else None, **settings)
    for row, (ids, mask, seed) in enumerate(zip(IDS, MASK, seeds, strict=True)):
        alone = tokens(wing, revealing(), [ids[mask == 1]], seed=seed, **settings)
        assert batch[row, mask.argmax() :].tolist() == alone[0].tolist()


def test_compiled_steps_give_what_plain_calls_of_the_model_give(wing, revealing):
    ids = IDS
    for _ in range(4):
        logits = wing.numpy(wing.call(revealing(), ids).logits)
        ids = np.concatenate([ids, logits[:, -1].argmax(axis=1)[:, None]], axis=1)
    assert tokens(wing, revealing(), max_new_tokens=4, eos_token_id=None).tolist() == ids.tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_uncached_equals_cached(wing, revealing, options):
    settings = {"max_new_tokens": NEW, "attention_mask": MASK, "seed": 5, **options}
    assert (
        tokens(wing, revealing(), **settings).tolist()
        == tokens(wing, revealing(), use_cache=False, **settings).tolist()
    )


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_prompt_in_chunks_gives_the_same(wing, revealing, chunk):
    settings = {"max_new_tokens": NEW, "attention_mask": MASK}
    whole = tokens(wing, revealing(), **settings)
    assert tokens(wing, revealing(), prefill_chunk_size=chunk, **settings).tolist() == whole.tolist()


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(wing, revealing):
    first, again, other = (
        tokens(wing, revealing(), do_sample=True, seed=seed, max_new_tokens=NEW).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_folders_generation_config_is_the_default_and_is_written_back(wing, folder, revealing, tmp_path):
    own = Path(shutil.copytree(folder(), tmp_path / "own"))
    members = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 3, "transformers_version": "4.57.6"}
    (own / "generation_config.json").write_text(json.dumps(members))
    model = wing.model("causal_lm").from_pretrained(own)
    assert model.generation_config == GenerationConfig.from_dict(members)
    expected = tokens(wing, revealing(), seed=1, do_sample=True, temperature=1.5, max_new_tokens=3, eos_token_id=None)
    assert tokens(wing, model, seed=1).tolist() == expected.tolist()
    assert tokens(wing, model, generation_config=GenerationConfig(max_new_tokens=2)).shape == (3, IDS.shape[1] + 2)
    model.save_pretrained(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "generation_config.json").read_text()) == members


def test_streamed_equals_whole(wing, revealing):
    whole = tokens(wing, revealing(), do_sample=True, seed=1, max_new_tokens=NEW)
    steps = [step.tokens for step in revealing().stream(IDS, do_sample=True, seed=1, max_new_tokens=NEW)]
    assert np.stack(steps, 1).tolist() == whole[:, IDS.shape[1] :].tolist()


def test_a_row_is_padded_after_its_eos(wing, revealing):
    free = tokens(wing, revealing(), max_new_tokens=NEW, eos_token_id=None)
    eos = int(free[0, IDS.shape[1] + 2])
    stopped = tokens(wing, revealing(), max_new_tokens=NEW, eos_token_id=eos, pad_token_id=7)
    row = stopped[0, IDS.shape[1] :].tolist()
    end = row.index(eos)
    assert end <= 2 and set(row[end + 1 :]) <= {7}


def test_G2_wrong_requests_are_refused_before_anything_is_computed(wing, revealing):
    model = revealing()
    with pytest.raises((InputError, ConfigError), match="n_positions"):
        model.generate(IDS, max_new_tokens=CONFIG.n_positions)
    with pytest.raises(InputError, match="no such token"):
        model.generate(IDS + CONFIG.vocab_size)
    with pytest.raises((InputError, ConfigError), match="top_p"):
        model.generate(IDS, do_sample=True, top_p=1.5)
    with pytest.raises(ConfigError, match="max_new_token"):
        model.generate(IDS, max_new_token=3)
    with pytest.raises(InputError, match="attention_mask"):
        model.generate(IDS, attention_mask=MASK[:, ::-1].copy())
