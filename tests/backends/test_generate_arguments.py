"""Arguments of `generate` besides token ids, in every wing: each against the wing's plain calls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from gptj.errors import ConfigError, InputError
from gptj.generation import GenerationConfig

IDS = np.random.default_rng(5).integers(0, 214, (2, 6))
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
TYPES = IDS[:, ::-1].copy()
NEW = 5


def greedy_by_calls(wing, model, ids, new, *, mask=None, types=None, head_mask=None):
    """The ids continued by calls over whole rows, whose last type is every new token's.

    What is still to come is masked, and no token before it sees it: so each call has the same shape.
    """
    start, mask = ids.shape[1], np.ones_like(ids) if mask is None else mask
    ids, mask = (np.pad(array, ((0, 0), (0, new))) for array in (ids, mask))
    types = None if types is None else np.pad(types, ((0, 0), (0, new)), mode="edge")
    for column in range(start, start + new):
        positions = np.clip(mask.cumsum(1) - 1, 0, None)
        given = {"attention_mask": mask, "position_ids": positions, "token_type_ids": types, "head_mask": head_mask}
        ids[:, column] = wing.numpy(wing.call(model, ids, **given).logits)[:, column - 1].argmax(-1)
        mask[:, column] = 1
    return ids


@pytest.fixture
def model(revealing):
    return revealing(eos_token_id=None)


@pytest.fixture
def heads(model):
    return np.random.default_rng(6).uniform(0, 2, (model.config.n_layer, model.config.n_head)).astype(np.float32)


def embeddings(wing, model, ids):
    """The token embeddings of ids, as the wing's array."""
    table = model.get_input_embeddings()
    return table[np.asarray(ids)] if wing.name == "flax" else wing.call(table, wing.module.from_numpy(np.asarray(ids)))


def test_inputs_is_another_name_of_the_prompt(wing, model):
    expected = wing.numpy(model.generate(IDS, max_new_tokens=NEW))
    assert np.array_equal(wing.numpy(model.generate(inputs=IDS, max_new_tokens=NEW)), expected)
    with pytest.raises(InputError, match="inputs: given twice"):
        model.generate(IDS, inputs=IDS)


def test_without_a_prompt_a_text_begins_with_bos(wing, model):
    made = wing.numpy(model.generate(bos_token_id=7, max_new_tokens=NEW))
    assert np.array_equal(made, wing.numpy(model.generate([[7]], max_new_tokens=NEW)))
    with pytest.raises(InputError, match=r"input_ids: no prompt .*bos_token_id"):
        model.generate(bos_token_id=None)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_types_follow_the_last_one_of_the_prompt(wing, model, use_cache, masked):
    mask = MASK if masked else None
    expected = greedy_by_calls(wing, model, IDS, NEW, mask=mask, types=TYPES)
    made = model.generate(IDS, attention_mask=mask, token_type_ids=TYPES, max_new_tokens=NEW, use_cache=use_cache)
    assert np.array_equal(wing.numpy(made), expected)
    assert not np.array_equal(expected, wing.numpy(model.generate(IDS, attention_mask=mask, max_new_tokens=NEW)))


def test_a_head_mask_holds_in_every_step(wing, model, heads):
    expected = greedy_by_calls(wing, model, IDS, NEW, mask=MASK, head_mask=heads)
    made = model.generate(IDS, attention_mask=MASK, head_mask=heads, max_new_tokens=NEW)
    assert np.array_equal(wing.numpy(made), expected)
    assert not np.array_equal(expected, wing.numpy(model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_embeddings_of_the_ids_give_what_the_ids_give(wing, model, options):
    """With the ids beside them the whole rows, and without them the new tokens alone."""
    embeds = embeddings(wing, model, IDS)
    expected = wing.numpy(model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, **options))
    arguments = {"inputs_embeds": embeds, "attention_mask": MASK, "max_new_tokens": NEW, **options}
    assert np.array_equal(wing.numpy(model.generate(IDS, **arguments)), expected)
    assert np.array_equal(wing.numpy(model.generate(**arguments)), expected[:, IDS.shape[1] :])


def test_processors_do_not_see_the_columns_of_embeddings(wing, model):
    seen = []

    def watch(ids, logits):
        seen.append(ids.copy())
        return logits

    embeds = embeddings(wing, model, IDS)
    options = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "min_length": 8, "max_new_tokens": NEW}
    output = model.generate(
        inputs_embeds=embeds, logits_processor=[watch], return_dict_in_generate=True, output_scores=True, **options
    )
    assert [ids.shape[1] for ids in seen] == list(range(NEW))
    assert output.lengths.tolist() == [NEW, NEW] and len(output.scores) == NEW
    logits = wing.numpy(wing.call(model, inputs_embeds=embeds).logits)[:, -1]
    assert np.array_equal(wing.numpy(output.sequences)[:, 0], logits.argmax(-1))
    assert np.abs(output.scores[0] - logits).max() <= 2e-5  # nothing was penalized, nor an ngram forbidden


def test_wrong_conditions_are_named(wing, model):
    embeds = np.zeros((2, 6, model.config.n_embd), np.float32)
    wrong = {
        "inputs_embeds: of another shape": {"inputs_embeds": embeds[:, :, 1:]},
        r"inputs_embeds: of another shape .*\(2, 6, ": {"input_ids": IDS, "inputs_embeds": embeds[:, 1:]},
        "token_type_ids: of another shape": {"input_ids": IDS, "token_type_ids": IDS[:, 1:]},
        r"token_type_ids\[0\]\[0\]: no such token": {"input_ids": IDS, "token_type_ids": IDS + 999},
        "head_mask: of another shape": {"input_ids": IDS, "head_mask": np.ones(99)},
        "assistant_model: reads token ids alone": {"inputs_embeds": embeds, "assistant_model": model},
    }
    for message, arguments in wrong.items():
        with pytest.raises(InputError, match=message):
            model.generate(max_new_tokens=2, **arguments)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1, "top_k": 0}], ids=str)
def test_only_allowed_tokens_follow(wing, model, options):
    heard = []

    def allowed(prompt, ids):
        heard.append((prompt, ids.tolist()))
        return [10 * (prompt + 1) + len(ids), 30]

    made = wing.numpy(
        model.generate(IDS, attention_mask=MASK, prefix_allowed_tokens_fn=allowed, max_new_tokens=3, **options)
    )
    for prompt in (0, 1):
        for column in (6, 7, 8):
            assert made[prompt, column] in (10 * (prompt + 1) + column, 30)
    assert heard[0] == (0, IDS[0].tolist())


@pytest.mark.parametrize("answer", [[], [99999], [-1], ["a"], None, [0.5]])
def test_an_answer_that_is_no_tokens_is_refused(wing, model, answer):
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn: allowed something else than tokens"):
        model.generate(IDS, prefix_allowed_tokens_fn=lambda prompt, ids: answer, max_new_tokens=2)


def test_the_output_is_a_mapping_with_the_cache(wing, model):
    output = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, return_dict_in_generate=True)
    assert isinstance(output, Mapping) and "sequences" in output and output["sequences"] is output.sequences
    assert {**output}.keys() == set(output.keys()) == set(dict(output.items()))
    assert output.get("scores") is None and output.get("scores", 3) == 3 and output[0] is output.sequences
    past, rows = output.past_key_values, wing.numpy(output.sequences)
    assert int(past.length) == rows.shape[1] - 1
    mask = np.concatenate([MASK, np.ones((2, NEW), int)], axis=1)
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    last = wing.call(
        model, rows[:, -1:], past_key_values=past, attention_mask=mask, position_ids=positions[:, -1:], use_cache=True
    )
    whole = wing.call(model, rows, attention_mask=mask, position_ids=positions)
    assert np.abs(wing.numpy(last.logits)[:, -1] - wing.numpy(whole.logits)[:, -1]).max() <= 2e-5


@pytest.mark.parametrize("options", [{"use_cache": False}, {"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_where_there_is_no_cache_of_the_rows_the_output_has_none(model, options):
    output = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, **options)
    assert output.past_key_values is None and "past_key_values" not in output


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_transition_scores_are_those_of_the_chosen_tokens(wing, model, options, normalize):
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": NEW}
    output = model.generate(IDS, **asked, **options)
    scores = wing.numpy(
        model.compute_transition_scores(
            output.sequences, output.scores, output.beam_indices, normalize_logits=normalize
        )
    )
    rows = wing.numpy(output.sequences)
    logits = wing.numpy(wing.call(model, rows).logits).astype(np.float64)[:, 5:-1]
    if normalize or options:
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logits, rows[:, 6:, None], -1)[..., 0]
    assert scores.shape == (len(rows), NEW) and np.abs(scores - expected).max() <= 1e-4
    if options:
        assert np.abs(scores.sum(1) / NEW - output.sequences_scores).max() <= 1e-4


def test_text_and_mappings_in_place_of_ids_are_named_with_the_call_that_works(model):
    for given in ("hi", ["hi", "there"], [["hi"]]):
        with pytest.raises(InputError, match=r"input_ids: text, not token ids .*generate\(\*\*tokenizer\(text\)\)"):
            model.generate(given)
    with pytest.raises(InputError, match=r"a mapping, not token ids .*attention_mask.*generate\(\*\*tokenizer"):
        model.generate({"input_ids": IDS, "attention_mask": MASK})


def test_a_config_that_is_given_leaves_what_it_does_not_name_to_the_models(wing, folder):
    model = wing.model("causal_lm").from_pretrained(folder(eos_token_id=None))
    first = int(wing.numpy(model.generate(IDS[:1], max_new_tokens=1))[0, -1])
    model.generation_config = GenerationConfig(eos_token_id=first, pad_token_id=3, repetition_penalty=1.5)
    plain = wing.numpy(model.generate(IDS[:1], repetition_penalty=1.0))
    assert plain.shape[1] == 7 and plain[0, -1] == first
    given = GenerationConfig(max_new_tokens=5, repetition_penalty=1.0)
    assert np.array_equal(wing.numpy(model.generate(IDS[:1], generation_config=given)), plain)
    off = GenerationConfig(max_new_tokens=5, repetition_penalty=1.0, eos_token_id=None)
    assert wing.numpy(model.generate(IDS[:1], off)).shape[1] == 11


def test_a_key_of_jax_is_a_seed_there_and_refused_elsewhere(wing, model):
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW}
    if wing.name != "flax":
        with pytest.raises(InputError, match=r"prng_key: a key of jax\.random.*seed="):
            model.generate(IDS, prng_key=np.zeros(2, np.uint32), **options)
        return
    import jax

    rows = [
        wing.numpy(model.generate(IDS, prng_key=key, **options))
        for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    ]
    assert np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[0], wing.numpy(model.generate(IDS, seed=0, **options)))
    with pytest.raises(InputError, match="prng_key: given beside seed"):
        model.generate(IDS, prng_key=jax.random.key(0), seed=1, **options)


def test_flax_generates_with_parameters_of_the_call(wing, model, folder):
    if wing.name != "flax":
        with pytest.raises(InputError, match="params: parameters are the model's own here"):
            model.generate(IDS, params={})
        return
    bare, params = wing.model("causal_lm").from_pretrained(folder(eos_token_id=None), _do_init=False)
    expected = wing.numpy(model.generate(IDS, max_new_tokens=NEW))
    assert np.array_equal(wing.numpy(bare.generate(IDS, params=params, max_new_tokens=NEW)), expected)
    with pytest.raises(InputError, match="made without parameters"):
        bare.generate(IDS, max_new_tokens=NEW)


@pytest.mark.parametrize("given", ["traced", "constant"])
def test_inside_a_compiled_function_generate_says_where_it_belongs(wing, model, given):
    def run(ids):
        return model.generate(ids if given == "traced" else IDS, max_new_tokens=2)

    if wing.name == "pt":
        import torch

        def within(ids):
            return run(ids) + 1

        call, expected = (lambda: torch.export.export(Wrapped(within), (torch.from_numpy(IDS),))), Exception

        class Wrapped(torch.nn.Module):
            def __init__(self, function):
                super().__init__()
                self.function = function

            def forward(self, ids):
                return self.function(ids)
    elif wing.name == "tf":
        import tensorflow as tf

        call, expected = (lambda: tf.function(run)(tf.constant(IDS))), InputError
    else:
        import jax

        call, expected = (lambda: jax.jit(run)(IDS)), InputError
    with pytest.raises(expected, match=r"(?s)loop on the host.*Call it outside"):
        call()


def test_an_unknown_argument_is_still_refused(model):
    with pytest.raises(ConfigError, match="max_new_token"):
        model.generate(IDS, max_new_token=3)
