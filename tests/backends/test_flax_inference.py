"""What is Flax's alone in the fast path: nothing is copied, one block is compiled for all, and few rows go last."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE

from gptj.calls.outputs import KVCache
from gptj.errors import InputError
from gptj.flax import Decoder, GPTJForCausalLM
from gptj.flax.inference import compiled_block, compiled_exit, multiply_narrow
from gptj.flax.weights import flat

IDS = np.random.default_rng(0).integers(0, 214, (3, 9))


@pytest.fixture(scope="module")
def prepared(folder):
    return GPTJForCausalLM.from_pretrained(folder(), inference=True)


def places(params) -> dict[str, int]:
    return {name: array.unsafe_buffer_pointer() for name, array in flat(params).items()}


def test_the_weights_stay_where_they_are(folder):
    model = GPTJForCausalLM.from_pretrained(folder())
    before = places(model.params)
    assert places(model.prepare_for_inference().params) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model_computes_in_float32_on_a_cpu(folder, dtype):
    narrow = GPTJForCausalLM.from_pretrained(folder(), param_dtype=dtype)
    exact = GPTJForCausalLM(narrow.config, _do_init=False)
    exact.params = narrow.to_fp32(narrow.params)
    narrow.prepare_for_inference()
    assert narrow.param_dtype == narrow.dtype == narrow.init_cache(1, 4).keys[0].dtype == np.float32
    assert np.abs(narrow(IDS).logits - exact(IDS).logits).max() <= FLOAT32_ABSOLUTE


def test_a_model_is_cast_once_to_what_it_computes_in(folder):
    model = GPTJForCausalLM.from_pretrained(folder(), dtype="float64", inference=True)
    assert model.dtype == model(IDS).logits.dtype == np.float64


def test_all_blocks_and_many_lengths_are_few_compilations(folder):
    model = GPTJForCausalLM.from_pretrained(folder(), layer_norm_epsilon=1.2e-5, inference=True)
    for length in range(9, 17):
        model.generate(IDS[:1].repeat(2, 1)[:, :length], max_new_tokens=4, eos_token_id=None)
    path = model.fast_path
    first, later = (compiled_block(path.config, True, prompt_only, True, False, 1) for prompt_only in (True, False))
    assert (first._cache_size(), later._cache_size()) == (1, 1)  # a prompt of 16 and a step, in a cache of 64
    assert compiled_exit(path.module)._cache_size() == 2


def test_models_that_are_built_alike_share_what_is_compiled(folder):
    one, other = (
        GPTJForCausalLM.from_pretrained(folder(), layer_norm_epsilon=1.4e-5, eos_token_id=eos) for eos in (5, 6)
    )
    for model in (one, other):
        model.generate(IDS, max_new_tokens=2, eos_token_id=None)
        assert compiled_block(model._path().config, True, False, True, False, 1)._cache_size() == 1
    assert one.config != other.config and one._path().config == other._path().config


def test_a_step_writes_the_cache_in_place(prepared):
    decoder = Decoder(prepared, 3, 16)
    decoder.prefill(IDS)
    keys = decoder.cache.keys
    before = [array.unsafe_buffer_pointer() for array in keys]
    decoder.step(np.array([1, 2, 3]))
    assert all(array.is_deleted() for array in keys)
    assert [array.unsafe_buffer_pointer() for array in decoder.cache.keys] == before


@pytest.mark.parametrize("rows", [1, 3])
def test_the_compiled_step_writes_keys_and_values_once_each_and_copies_none(prepared, rows):
    config = prepared.config
    text = block_program(prepared.fast_path, rows).compile().as_text()
    program = text[text.index("ENTRY") :]
    whole = rf"f32\[({rows},{config.n_head}|{rows * config.n_head}),{SLOTS},{config.head_dim}\]"
    made = re.findall(rf"= {whole}\S* (\w+)\(", program)
    assert sorted(kind for _, kind in made) == ["fusion", "fusion", "parameter", "parameter"]


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_a_few_rows_are_multiplied_weights_first(prepared, rows):
    text = block_program(prepared.fast_path, rows).as_text()
    assert text.count("optimization_barrier") == (6 if rows in (2, 64) else 0)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_few_rows_by_bfloat16_are_sums_of_its_products(rows):
    """As exact as in float32, for numbers of all sizes, with the gradient of it; and the weights are not widened."""
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((rows, 96)).astype(np.float32) * 10.0 ** generator.integers(-6, 6, (rows, 1))
    x, weight = jnp.asarray(x, jnp.float32), jnp.asarray(generator.standard_normal((40, 96)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    assert (np.abs(multiply_narrow(x, weight) - exact) / size).max() <= 1e-6
    gradient = jax.grad(lambda x: multiply_narrow(x, weight).sum())(x)
    assert np.abs(gradient - np.asarray(weight, np.float64).sum(0)).max() <= 1e-5
    text = jax.jit(multiply_narrow).lower(x, weight).as_text()
    assert "tensor<40x96xbf16>" in text and "tensor<40x96xf32>" not in text


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_a_step_of_a_few_rows_widens_no_weight_in_bfloat16(folder, rows):
    path = GPTJForCausalLM.from_pretrained(folder(), param_dtype="bfloat16")._path()
    text = block_program(path, rows).as_text()
    shapes = {"x".join(map(str, array.shape)) for array in flat(path.blocks[0]).values() if array.ndim == 2}
    widened = re.findall(rf"\(tensor<({'|'.join(shapes)})xbf16>\) -> tensor<\1xf32>", text)
    assert len(widened) == (0 if rows <= 64 else 6)


SLOTS = 16


def block_program(path, rows):
    """The block of a decoded token, lowered."""
    config, cache = path.config, path.init_cache(rows, SLOTS)
    layer = KVCache(cache.keys[:1], cache.values[:1], None, True)
    x = np.zeros((rows, 1, config.n_embd), np.float32)
    rotation = (np.zeros((rows, 1, config.rotary_width // 2), np.float32),) * 2
    attention_inputs = np.array([5]), rotation, np.ones((rows, 1, 1, SLOTS), bool)
    return compiled_block(config, True, False, True, False, 1).lower(
        path.blocks[0], {}, layer, x, attention_inputs, None
    )


ACTS = {
    "save_pretrained": lambda model, path: model.save_pretrained(path / "out"),
    "resize_token_embeddings": lambda model, path: model.resize_token_embeddings(99),
    "set_input_embeddings": lambda model, path: model.set_input_embeddings(model.get_input_embeddings()),
    "initialise": lambda model, path: model.initialise(),
    "params": lambda model, path: setattr(model, "params", model.params),
    "params of a call": lambda model, path: model(IDS, params=model.params),
    "train": lambda model, path: model(IDS, train=True),
    "gradient_checkpointing_enable": lambda model, path: model.gradient_checkpointing_enable(),
    "prepare_for_inference": lambda model, path: model.prepare_for_inference(),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_needs_the_parameters_is_refused_by_name(prepared, tmp_path, act):
    with pytest.raises(InputError, match=f"^{act.split(' of ')[0]}: the model is prepared for inference.*Load"):
        ACTS[act](prepared, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_by_the_embeddings_is_that_of_a_plain_model(folder, prepared):
    plain = GPTJForCausalLM.from_pretrained(folder())
    embeds = np.asarray(plain.get_input_embeddings())[IDS]
    got, expected = (
        jax.grad(lambda x, model=model: model(inputs_embeds=x, labels=IDS).loss)(embeds) for model in (prepared, plain)
    )
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantization_that_is_slower_here_is_refused(folder, quantize):
    with pytest.raises(InputError, match=rf"quantize: no such quantization here \(expected None, found '{quantize}'\)"):
        GPTJForCausalLM.from_pretrained(folder(), inference=True, quantize=quantize)


def test_a_prepared_model_without_parameters_is_refused(folder):
    with pytest.raises(InputError, match="_do_init: a prepared model has parameters of its own"):
        GPTJForCausalLM.from_pretrained(folder(), inference=True, _do_init=False)
