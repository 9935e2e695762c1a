"""What is TensorFlow's alone in a call: arguments in one list or dict, and errors where a graph has no values yet."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE, named_backends

__test__ = "tf" in named_backends()  # where it is not under test, TensorFlow may not be there
if __test__:
    import keras
    import tensorflow as tf

    from gptj.errors import InputError
    from gptj.parity.revealing import revealing_config
    from gptj.tf import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel

IDS = np.random.default_rng(0).integers(0, 214, (2, 6))
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
TYPES = IDS[:, ::-1].copy()


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder())


@pytest.fixture(scope="module")
def expected(oracle):
    return oracle().forward(IDS, MASK, token_type_ids=TYPES).logits


def forms():
    tensors = [tf.constant(x) for x in (IDS, MASK, TYPES)]
    named = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
    return {
        "names": ((), named),
        "a dict": ((named,), {}),
        "a dict of tensors by name": ((), {"input_ids": {k: tf.constant(v) for k, v in named.items()}}),
        "a dict and names": (({"input_ids": IDS, "attention_mask": MASK},), {"token_type_ids": TYPES}),
        "a list in the call's order": (([IDS, None, MASK, TYPES],), {}),
        "a list in the page's order": ((tensors,), {}),
        "a tuple": ((tuple(tensors),), {}),
        "places": ((IDS, None, MASK, TYPES), {}),
        "lists of numbers": ((IDS.tolist(), None, MASK.tolist(), TYPES.tolist()), {}),
    }


@pytest.mark.parametrize("form", list(forms()) if __test__ else [])
def test_every_form_of_the_arguments_means_the_same(model, expected, form):
    arguments, options = forms()[form]
    assert np.abs(model(*arguments, **options).logits - expected).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({"input_ids": IDS, "atention_mask": MASK},), {}, "atention_mask: no such argument .*attention_mask"),
        (({"input_ids": IDS},), {"input_ids": IDS}, "multiple values"),
        (({"input_ids": IDS, "labels": IDS},), {"labels": IDS}, "labels: given twice"),
        (([IDS] * 14,), {}, "at most 13, found 14"),
        (({"attention_mask": MASK},), {}, "input_ids, inputs_embeds: give exactly one of them .*neither"),
    ],
)
def test_wrong_forms_are_named(model, arguments, options, message):
    with pytest.raises((InputError, TypeError), match=message):
        model(*arguments, **options)


def test_an_unknown_keyword_is_a_type_error(model):
    with pytest.raises(TypeError, match="atention_mask"):
        model(IDS, atention_mask=MASK)


def test_an_empty_model_says_that_it_is(model):
    with pytest.raises(InputError, match="made without parameters"):
        GPTJForCausalLM(model.config, _do_init=False)(IDS)


FAULTS = {
    "an id too high": ({"input_ids": np.array([[1, 216]])}, r"input_ids: no such token .*216"),
    "an id below 0": ({"input_ids": np.array([[-1, 2]])}, r"input_ids: no such token .*-1"),
    "a token type": ({"input_ids": IDS, "token_type_ids": IDS + 200}, r"token_type_ids: no such token"),
    "a position": ({"input_ids": IDS, "position_ids": IDS + 2050}, r"position_ids: no such position"),
    "a mask of 2": ({"input_ids": IDS, "attention_mask": IDS * 0 + 2}, r"attention_mask: not a mask"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_raises_when_it_runs(model, fault):
    arguments, message = FAULTS[fault]

    @tf.function(autograph=False)
    def logits(arguments):
        return model(arguments, use_cache=False).logits

    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        logits({name: tf.constant(value) for name, value in arguments.items()})


@pytest.mark.parametrize("fault", FAULTS)
def test_xla_gives_nan_where_it_cannot_raise(model, fault):
    arguments, _ = FAULTS[fault]

    @tf.function(autograph=False, jit_compile=True)
    def logits(arguments):
        return model(arguments, use_cache=False).logits

    assert np.isnan(logits({name: tf.constant(value) for name, value in arguments.items()})).any()


def test_a_graph_raises_for_a_full_cache(model):
    logits = tf.function(lambda ids, cache: model(ids, cache).logits, autograph=False)
    cache = model.init_cache(2, 8)
    assert np.isfinite(logits(tf.constant(IDS), dataclasses.replace(cache, length=tf.constant(2)))).all()
    with pytest.raises(tf.errors.InvalidArgumentError, match="the cache is full"):
        logits(tf.constant(IDS), dataclasses.replace(cache, length=tf.constant(3)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (((2, 6), "float32"), "input_ids: not whole numbers .*found float32"),
        (((6,), "int64"), r"input_ids: of another shape .*found \(6,\)"),
        (((1, 2057), "int64"), "n_positions = 2056 tokens, found 2057"),
    ],
)
def test_a_trace_refuses_what_it_knows_already(model, spec, message):
    shape, dtype = spec
    traced = tf.function(lambda ids: model(ids).logits, autograph=False)
    with pytest.raises(InputError, match=message):
        traced.get_concrete_function(tf.TensorSpec(shape, dtype))


@pytest.mark.feature("tf.function, XLA (jit_compile)", "causal_lm")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_computes_what_an_eager_call_does(model, expected, jit_compile):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def logits(*arguments):
        return model(list(arguments)).logits

    got = logits(*(tf.constant(x) for x in (IDS, MASK, TYPES)))
    assert np.abs(got - expected).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("class_", [GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification] if __test__ else [])
def test_outputs_and_caches_pass_through_a_graph_whole(class_):
    model = class_(revealing_config(n_layer=2))
    eager = model(IDS, output_hidden_states=True)
    graph = tf.function(lambda ids: model(ids, output_hidden_states=True), autograph=False)(tf.constant(IDS))
    assert type(graph) is type(eager) and graph.keys() == eager.keys()
    assert int(graph.past_key_values.length) == eager.past_key_values.length == 6
    for got, expected in zip(graph.hidden_states, eager.hidden_states, strict=True):
        assert np.abs(got - expected).max() <= FLOAT32_ABSOLUTE


def test_a_graph_takes_prompts_of_any_length(model, oracle):
    logits = tf.function(
        lambda ids: model(ids).logits, input_signature=[tf.TensorSpec((None, None), tf.int64)], autograph=False
    )
    for length in (1, 3, 6):
        got = logits(tf.constant(IDS[:, :length]))
        assert np.abs(got - oracle().forward(IDS[:, :length]).logits).max() <= FLOAT32_ABSOLUTE


def test_a_functional_model_can_be_made_of_it(model, expected):
    ids, mask, types = (keras.Input((None,), dtype="int64") for _ in range(3))
    functional = keras.Model([ids, mask, types], model([ids, mask, types]).logits)
    assert np.abs(functional([IDS, MASK, TYPES]) - expected).max() <= FLOAT32_ABSOLUTE


def test_spans_come_in_a_list_too():
    model = GPTJForQuestionAnswering(revealing_config(n_layer=1))
    listed = model([tf.constant(IDS), tf.constant(MASK)])
    assert np.array_equal(listed.start_logits, model(IDS, attention_mask=MASK).start_logits)
