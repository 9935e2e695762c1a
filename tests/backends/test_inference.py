"""A model prepared for inference: what it computes, and what it refuses from then on."""

import copy
import pickle

import numpy as np
import pytest
from mutants import revealing_batch
from wings import close

from gptj.errors import InputError
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
MASKED = {"attention_mask": BATCH.attention_mask, "position_ids": BATCH.position_ids}
FACTORS = np.linspace(0, 1, CONFIG.n_layer * CONFIG.n_head, dtype=np.float32).reshape(CONFIG.n_layer, CONFIG.n_head)


@pytest.fixture(scope="module")
def prepared(wing, folder):
    """The revealing model in float32, prepared."""
    return wing.model("causal_lm").from_pretrained(folder(), inference=True)


@pytest.mark.feature("prepared for inference", "causal_lm")
@pytest.mark.parametrize("options", [{}, MASKED, {"head_mask": FACTORS}], ids=["plain", "masked", "head_mask"])
def test_a_prepared_model_computes_the_oracles_logits(wing, prepared, oracle, options):
    expected = oracle().forward(BATCH.input_ids, **options).logits
    assert close(wing.numpy(wing.call(prepared, BATCH.input_ids, **options).logits), expected, "float32")


def test_a_prepared_model_still_shows_what_is_inside(wing, prepared, oracle):
    asked = {"output_hidden_states": True, "output_attentions": True, **MASKED}
    got = wing.call(prepared, BATCH.input_ids, labels=BATCH.input_ids, **asked)
    expected = oracle().forward(BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids, attentions=True)
    for ours, theirs in ((got.hidden_states, expected.hidden_states), (got.attentions, expected.attentions)):
        assert all(close(wing.numpy(a), b, "float32") for a, b in zip(ours, theirs, strict=True))
    assert got.loss is not None


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_a_prepared_model_goes_on_from_a_cache(wing, prepared, oracle, fixed):
    ids, past, got = BATCH.input_ids[:, :9], None, []
    if fixed:
        past = prepared.init_cache(len(ids), 12)
    for piece in (slice(0, 5), slice(5, 6), slice(6, 9)):
        out = wing.call(prepared, ids[:, piece], past_key_values=past, use_cache=True)
        past = out.past_key_values
        got.append(wing.numpy(out.logits))
    assert close(np.concatenate(got, axis=1), oracle().forward(ids).logits, "float32")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}], ids=str)
def test_a_prepared_model_writes_the_same_tokens(wing, prepared, revealing, options):
    mask = np.ones((3, 9), np.int64)
    mask[1, :4] = 0
    ids = BATCH.input_ids[:3, :9]
    got, expected = (
        wing.numpy(model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)).tolist()
        for model in (prepared, revealing())
    )
    assert got == expected


def test_a_quantization_that_nobody_has_is_named(wing, folder):
    with pytest.raises(InputError, match=r"quantize: no such quantization here \(expected None.*, found 'int3'\)"):
        wing.model("causal_lm").from_pretrained(folder(), inference=True, quantize="int3")


def test_a_quantization_without_inference_is_refused(wing, folder):
    with pytest.raises(InputError, match=r"given without inference.*Add inference=True"):
        wing.model("causal_lm").from_pretrained(folder(), quantize="int8")


@pytest.mark.parametrize("head", ["base", "sequence_classification", "question_answering"])
def test_a_class_without_a_fast_path_says_so(wing, folder, head):
    with pytest.raises(InputError, match=r"expected GPTJForCausalLM, found GPTJ(Model|For)"):
        wing.model(head).from_pretrained(folder(head), inference=True)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_prepared_model_is_never_copied(prepared, make):
    with pytest.raises(InputError, match=r"a copy: the model is prepared for inference"):
        make(prepared)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_a_copy_of_a_plain_model_computes_the_same(wing, revealing, make):
    model, ids = revealing(), BATCH.input_ids[:2]
    expected = wing.numpy(wing.call(model, ids).logits)
    assert np.array_equal(wing.numpy(wing.call(make(model), ids).logits), expected)
