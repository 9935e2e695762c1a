"""What is Flax's alone: parameters as data, their dtypes, and how they are brought, kept, saved and restored."""

from __future__ import annotations

import os
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import serialization
from wings import FLOAT32_ABSOLUTE

from gptj import flax as wing
from gptj.errors import InputError, SchemaError
from gptj.flax import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
from gptj.flax.weights import flat, nested
from gptj.parity.revealing import revealing_config

IDS = np.random.default_rng(0).integers(0, 214, (2, 6))


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder())


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one, other))


@pytest.mark.parametrize("kind", ["empty", "a list", "a number", "one without arrays", "nested once more", "lists"])
def test_parameters_of_a_call_that_are_not_the_models_are_named(model, kind):
    lists = jax.tree.map(lambda array: array, model.params)
    lists["lm_head"]["bias"] = [0.0] * model.config.vocab_size
    given = {
        "empty": {},
        "a list": [],
        "a number": 5,
        "one without arrays": {"a": 1},
        "nested once more": {"params": model.params},
        "lists": lists,
    }[kind]
    calls = [lambda: model(IDS, params=given), lambda: model.generate(IDS, params=given, max_new_tokens=1)]
    for call in calls:
        with pytest.raises((SchemaError, InputError), match=r"^params"):
            call()


def test_transformers_names_are_the_same_classes():
    for name in wing.__all__:
        if name.startswith("GPTJFor") or name == "GPTJModel":
            assert getattr(wing, f"Flax{name}") is getattr(wing, name)


def test_the_modules_own_init_makes_the_same_tree(model):
    made = model.module.init(jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, model.params)


def test_a_frozen_dict_of_parameters_serves(model):
    frozen = flax.core.freeze(model.params)
    assert np.array_equal(model(IDS, params=frozen).logits, model(IDS).logits)


def test_without_init_a_call_needs_parameters(model):
    empty = GPTJForCausalLM(model.config, _do_init=False)
    with pytest.raises(InputError, match=r"params: the model was made without parameters\. Pass params="):
        empty(IDS)
    assert np.array_equal(empty(IDS, params=model.params).logits, model(IDS).logits)


def test_from_pretrained_without_init_returns_model_and_params(folder, model):
    empty, params = GPTJForCausalLM.from_pretrained(folder(), _do_init=False)
    assert same(params, model.params)
    with pytest.raises(InputError, match="without parameters"):
        _ = empty.params


def test_from_pretrained_without_init_returns_the_loading_info_last(folder):
    _, params, info = GPTJForCausalLM.from_pretrained(folder(), _do_init=False, output_loading_info=True)
    assert set(params) == {"transformer", "lm_head"} and info["missing_keys"] == []


def test_wrong_parameters_are_all_named(model):
    params = flat(model.params)
    params["lm_head.scale"] = params.pop("lm_head.bias")
    params["lm_head.weight"] = params["lm_head.weight"].T
    empty = GPTJForCausalLM(model.config, _do_init=False)
    with pytest.raises(
        SchemaError, match=r"1 missing: lm_head\.bias; 1 unexpected: lm_head\.scale; 1 misshapen: lm_he"
    ):
        empty.params = nested(params.items())


def test_the_shape_tree_says_what_the_parameters_are(model):
    shapes = GPTJForCausalLM(model.config, param_dtype="bfloat16", _do_init=False).params_shape_tree
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda a: a.shape, model.params)
    assert {s.dtype.name for s in jax.tree.leaves(shapes)} == {"bfloat16"}


@pytest.mark.parametrize("shape", [(0, 1), (1,), (1, 1, 1), (1.0, 1)])
def test_an_input_shape_that_is_none_is_refused(shape):
    with pytest.raises(InputError, match="input_shape"):
        GPTJModel(revealing_config(), shape)


def test_arguments_of_the_constructor_may_be_given_by_place(model):
    made = GPTJModel(revealing_config(), (1, 1), 3, jnp.bfloat16, False)
    assert (made.dtype, made.param_dtype) == (jnp.bfloat16, jnp.float32)
    with pytest.raises(InputError, match="made without parameters"):
        made.params  # noqa: B018
    made = GPTJModel(revealing_config(), (1, 1), 3, jnp.bfloat16)
    assert same(made.params, GPTJModel(revealing_config(), seed=3).params)
    assert made(IDS).last_hidden_state.dtype == jnp.bfloat16


def test_arguments_of_a_call_may_be_given_by_place(model):
    mask = np.ones_like(IDS)
    positions = np.arange(IDS.shape[1])[None] + 3
    cache = model.init_cache(IDS.shape[0], 20)
    placed = model(IDS, mask, positions, model.params, cache, None, False, True, True, False)
    named = model(
        IDS,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert np.array_equal(placed[0], named.logits) and len(placed) == len(named)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_cache_that_is_handed_in_comes_back(model, fixed):
    cache = model.init_cache(IDS.shape[0], 20) if fixed else model(IDS[:, :2], use_cache=True).past_key_values
    seen = 0 if fixed else 2
    out = model(IDS[:, 2:4], past_key_values=cache, use_cache=False)
    assert out.past_key_values.length == seen + 2


def test_the_base_model_has_the_same_arrays(model):
    base = model.base_model
    assert base.get_input_embeddings() is model.get_input_embeddings()
    assert base.base_model is base
    assert np.array_equal(base(IDS).last_hidden_state, model(IDS, output_hidden_states=True).hidden_states[-1])


def test_an_embedding_is_an_array(model, folder):
    other = GPTJForCausalLM.from_pretrained(folder(tie_word_embeddings=True), tie_word_embeddings=True)
    other.set_input_embeddings(2 * other.get_input_embeddings())
    assert np.array_equal(other.get_input_embeddings(), 2 * model.get_input_embeddings())
    assert other.get_output_embeddings() is other.get_input_embeddings()
    assert model.get_output_embeddings() is model.params["lm_head"]["weight"]
    with pytest.raises(InputError, match="embeddings: of another shape"):
        other.set_input_embeddings(np.ones((3, 48), np.float32))


def test_casts_give_new_parameters_and_leave_the_old(model):
    for name, dtype in (("to_bf16", jnp.bfloat16), ("to_fp16", jnp.float16), ("to_fp32", jnp.float32)):
        assert {a.dtype for a in jax.tree.leaves(getattr(model, name)(model.params))} == {jnp.dtype(dtype)}
    assert model.dtype == jnp.float32


def test_a_mask_says_which_parameters_are_cast(model):
    mask = nested((name, not name.split(".")[-2].startswith("ln")) for name in flat(model.params))
    kinds = {name: array.dtype for name, array in flat(model.to_bf16(model.params, mask)).items()}
    assert kinds["transformer.ln_f.weight"] == jnp.float32 and kinds["lm_head.weight"] == jnp.bfloat16


def test_parameters_decide_what_is_computed_in(model):
    narrow = model.to_bf16(model.params)
    hidden = model(IDS, params=narrow, output_hidden_states=True).hidden_states[1]
    assert hidden.dtype == jnp.bfloat16


def test_a_computation_dtype_decides_for_all_parameters(folder, model):
    wide = GPTJForCausalLM.from_pretrained(folder(), param_dtype="bfloat16", dtype="float32")
    assert (wide.param_dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    assert wide.init_cache(1, 4).keys[0].dtype == jnp.float32
    rounded = model.to_fp32(model.to_bf16(model.params))
    assert np.abs(wide(IDS).logits - model(IDS, params=rounded).logits).max() <= FLOAT32_ABSOLUTE


def test_saving_other_parameters_than_the_models_own(model, tmp_path):
    doubled = jax.tree.map(lambda array: 2 * array, model.params)
    model.save_pretrained(tmp_path / "doubled", doubled)
    assert same(GPTJForCausalLM.from_pretrained(tmp_path / "doubled").params, doubled)


def test_saving_foreign_parameters_is_refused_and_leaves_nothing(model, tmp_path):
    with pytest.raises(SchemaError, match="params: they do not fit the model"):
        model.save_pretrained(tmp_path / "wrong", model.params["transformer"])
    assert not (tmp_path / "wrong").exists()


@pytest.mark.feature("params through orbax and flax.serialization", "causal_lm")
def test_parameters_pass_through_flax_serialization(model):
    data = serialization.to_bytes(model.params)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, model.params), data)
    assert same(restored, model.params)


@pytest.mark.feature("params through orbax and flax.serialization", "causal_lm")
def test_parameters_pass_through_orbax(model, tmp_path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", model.params)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax", model.params_shape_tree)
    other = GPTJForCausalLM(model.config, _do_init=False)
    other.params = restored
    assert np.array_equal(other(IDS).logits, model(IDS).logits)


# ---- float64, which jax has switched off unless it is told


@pytest.fixture
def without_float64():
    with jax.enable_x64(False):
        yield


MESSAGE = r"jax has float64 switched off .*found float64.*JAX_ENABLE_X64=1"


def test_float64_where_it_is_off_is_refused_and_never_float32(without_float64, folder):
    with pytest.raises(InputError, match=f"^dtype: {MESSAGE}"):
        GPTJForCausalLM(revealing_config(), dtype="float64")
    for where in ("constructor", "from_pretrained"):
        with pytest.raises(InputError, match=f"^param_dtype: {MESSAGE}"):
            if where == "constructor":
                GPTJForCausalLM(revealing_config(), param_dtype="float64")
            else:
                GPTJForCausalLM.from_pretrained(folder(), param_dtype="float64")


def test_numpys_float64_where_it_is_off_is_refused(without_float64, model):
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), model.params)
    with pytest.raises(InputError, match=f"^params: {MESSAGE}"):
        model(IDS, params=wide)
    with pytest.raises(InputError, match=rf"^params: lm_head\.bias: {MESSAGE}"):
        GPTJForCausalLM(model.config, _do_init=False).params = wide
    with pytest.raises(InputError, match=MESSAGE):
        wing.from_numpy(np.ones(3))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int32"])
def test_ids_of_any_width_serve_where_float64_is_off(without_float64, model, dtype):
    assert np.array_equal(model(IDS.astype(dtype)).logits, model(IDS).logits)
    assert model.generate(IDS.astype(dtype), max_new_tokens=2).dtype == jnp.int32


def test_an_id_that_int32_would_wrap_is_refused_where_float64_is_off(without_float64, model):
    with pytest.raises(InputError, match=r"input_ids\[0\]\[0\]: no such token .*found 4294967297"):
        model(np.array([[2**32 + 1]]))


# ---- memory

PEAK = """
import re, sys
import numpy as np

def peak_kib():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

import jax
from gptj.flax import GPTJForCausalLM
jax.device_put(np.ones(3)).block_until_ready()
before = peak_kib()
model = GPTJForCausalLM.from_pretrained(sys.argv[1])
weights = sum(array.nbytes for array in jax.tree.leaves(model.params))
print((peak_kib() - before) * 1024 / weights)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """42 million parameters, 168 MB, the largest tensor 2.5 % of them: as in GPT-J-6B, where wte is 3.4 %."""
    config = revealing_config(vocab_size=2048, n_positions=64, n_embd=512, n_layer=13, n_head=8, n_inner=2048)
    path = tmp_path_factory.mktemp("large") / "model"
    GPTJForCausalLM(config).save_pretrained(path)
    return path


def test_loading_takes_at_most_a_tenth_more_memory_than_the_weights(large_folder):
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    run = [sys.executable, "-c", PEAK, str(large_folder)]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert float(found.stdout) <= 1.1


def test_all_heads_load_without_init(folder):
    for made, head in (
        (GPTJModel, "base"),
        (GPTJForSequenceClassification, "sequence_classification"),
        (GPTJForQuestionAnswering, "question_answering"),
    ):
        empty, params = made.from_pretrained(folder(head), _do_init=False)
        assert empty(IDS, params=params) is not None
