"""What is Flax's alone in numerics: where jax's own defaults would lose digits without a word."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptj.flax import GPTJForCausalLM
from gptj.flax.layers import ACTIVATIONS, LayerNorm, Linear
from gptj.parity.oracle import activation

IDS = np.random.default_rng(0).integers(0, 214, (2, 5))


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder())


def program(model, dtype: str) -> str:
    params = jax.tree.map(lambda array: array.astype(dtype), model.params)
    return str(jax.make_jaxpr(lambda params: model.module.apply({"params": params}, IDS).logits)(params))


def products(text: str) -> list[str]:
    return re.findall(r"dot_general\[(.*?)\]\s", text, flags=re.DOTALL)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_product_of_a_wide_model_is_asked_for_at_full_precision(model, dtype):
    found = products(program(model, dtype))
    assert len(found) == 3 * 8 + 1
    assert all("HIGHEST" in product for product in found)


def test_scores_of_a_16_bit_model_are_full_float32_and_all_sums_are_float32(model):
    found = products(program(model, "bfloat16"))
    assert sum("HIGHEST" in product for product in found) == 3
    assert all("preferred_element_type=float32" in product for product in found)


def test_a_layer_norm_keeps_its_digits_where_the_mean_is_large():
    x = 1000 + np.random.default_rng(0).standard_normal((1, 3, 64)).astype(np.float32)
    norm = LayerNorm(64, 1e-5)
    got = norm.apply({"params": {"weight": jnp.ones(64), "bias": jnp.zeros(64)}}, x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    # x holds 1000 to 3e-5, and so does its float32 mean; flax's own one-pass variance is wrong by 4e-2 here
    assert np.abs(got - expected).max() <= 1e-4


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "tanh"])
def test_a_16_bit_activation_is_rounded_once(folder, name):
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    exact = activation(name, np.asarray(narrow).astype(np.float64))
    got = ACTIVATIONS[name](narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    # half a unit in the last of 8 places, and what float32 loses where e^x cancels
    assert np.all(np.abs(np.asarray(got).astype(np.float64) - exact) <= 2**-8 * np.abs(exact) * 1.01 + 1e-6)


def test_a_16_bit_linear_is_rounded_once():
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape).astype(jnp.bfloat16) for shape in ((3, 64), (16, 64)))
    bias = generator.standard_normal(16).astype(jnp.bfloat16)
    got = np.asarray(Linear(64, 16).apply({"params": {"weight": weight, "bias": bias}}, x)).astype(np.float64)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)
    assert np.all(np.abs(got - exact) <= 2**-8 * np.abs(exact) * 1.01 + 1e-5)
