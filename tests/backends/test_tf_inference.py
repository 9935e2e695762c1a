"""What is TensorFlow's alone in a prepared model: compiled calls, float32 on a CPU, and what Keras can do no more."""

from __future__ import annotations

import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE, named_backends

from gptj.errors import InputError

__test__ = "tf" in named_backends()  # where it is not under test, TensorFlow may not be there
if __test__:
    import tensorflow as tf

    from gptj.tf import Decoder, GPTJForCausalLM
    from gptj.tf.generate import CompiledModel

FEW = {"n_layer": 2}
IDS = np.random.default_rng(0).integers(0, 214, (2, 11))
MASK = np.array([[0] * 3 + [1] * 8, [1] * 11])


@pytest.fixture(scope="module")
def prepared(folder):
    return GPTJForCausalLM.from_pretrained(folder(**FEW), inference=True)


def test_a_call_runs_compiled_programs_and_gives_what_the_oracle_gives(prepared, oracle):
    got = prepared(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    expected = oracle(**FEW).forward(IDS, attention_mask=MASK, attentions=True)
    for ours, theirs in zip(
        (got.logits, *got.hidden_states, *got.attentions),
        (expected.logits, *expected.hidden_states, *expected.attentions),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs)[:, ..., 3:, :].max() <= FLOAT32_ABSOLUTE
    assert ("_run", 2, 16, 64) in [key[:4] for key in CompiledModel.of(prepared).functions]


def test_positions_and_labels_are_those_of_the_call(prepared, folder):
    plain = GPTJForCausalLM.from_pretrained(folder(**FEW))
    arguments = {"position_ids": np.arange(7, 18)[None], "labels": IDS}
    got, expected = (model(IDS, **arguments) for model in (prepared, plain))
    assert np.abs(got.logits - expected.logits).max() <= FLOAT32_ABSOLUTE
    assert abs(got.loss - expected.loss) <= FLOAT32_ABSOLUTE


def test_a_calls_cache_goes_on_in_the_next_call(prepared, oracle):
    first = prepared(IDS[:, :6])
    assert first.past_key_values[1][0].shape == (2, 4, 6, 12)
    second = prepared(IDS[:, 6:], past_key_values=first.past_key_values)
    assert np.abs(second.logits - oracle(**FEW).forward(IDS).logits[:, 6:]).max() <= FLOAT32_ABSOLUTE
    assert prepared(IDS, use_cache=False).past_key_values is None


def test_a_call_that_a_graph_traces_stays_in_that_graph(prepared):
    traced = tf.function(lambda ids: prepared(ids, use_cache=False).logits, autograph=False)
    assert np.abs(traced(tf.constant(IDS)) - prepared(IDS).logits).max() <= FLOAT32_ABSOLUTE


def test_preparing_copies_no_float32_parameter_and_changes_no_token(folder):
    model = GPTJForCausalLM.from_pretrained(folder(**FEW))
    before, weights = model.generate(IDS, max_new_tokens=5, eos_token_id=None), [w.value for w in model.weights]
    assert model.prepare_for_inference() is model
    assert all(a.value is b for a, b in zip(model.weights, weights, strict=True))
    assert (model.generate(IDS, max_new_tokens=5, eos_token_id=None).numpy() == before.numpy()).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_parameters_are_computed_in_float32_on_a_cpu(folder, tmp_path, dtype):
    rounded = GPTJForCausalLM.from_pretrained(folder(**FEW), dtype=dtype)
    rounded.save_pretrained(tmp_path / "model")
    wide = GPTJForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    step = Decoder(rounded, 2, 11).prefill(IDS)
    assert np.abs(step.logits - wide(IDS).logits[:, -1]).max() <= FLOAT32_ABSOLUTE
    assert np.abs(rounded.prepare_for_inference()(IDS).logits - wide(IDS).logits).max() <= FLOAT32_ABSOLUTE
    assert {w.dtype for w in rounded.weights} == {dtype}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantization_is_refused_by_name(folder, quantize):
    with pytest.raises(InputError, match=rf"quantize: .* \(expected None, found '{quantize}'\)"):
        GPTJForCausalLM.from_pretrained(folder(**FEW), inference=True, quantize=quantize)


@pytest.mark.parametrize(
    ("act", "arguments"),
    [
        ("fit", (IDS,)),
        ("train_on_batch", (IDS,)),
        ("gradient_checkpointing_enable", ()),
        ("initialise", ()),
        ("load_weights", ("model.weights.h5",)),
        ("prepare_for_inference", ()),
        ("resize_token_embeddings", (300,)),
        ("save", ("model.keras",)),
        ("save_pretrained", ("model",)),
        ("save_weights", ("model.weights.h5",)),
        ("set_input_embeddings", (None,)),
        ("set_weights", ([],)),
    ],
)
def test_what_needs_the_parameters_is_refused_by_name(prepared, act, arguments):
    with pytest.raises(InputError, match=f"{act}: the model is prepared for inference"):
        getattr(prepared, act)(*arguments)


def test_a_prepared_model_is_not_trained(prepared):
    with pytest.raises(InputError, match="training: the model is prepared for inference"):
        prepared(IDS, training=True)
    assert prepared.num_parameters(only_trainable=True) == 0 < prepared.num_parameters()
