"""What is Flax's alone: a model under jax's own transformations, and what becomes of the checks there."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from wings import FLOAT32_ABSOLUTE

from gptj.errors import InputError
from gptj.flax import GPTJForCausalLM

IDS = np.random.default_rng(0).integers(0, 214, (3, 7))


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder())


@pytest.fixture(scope="module")
def expected(oracle):
    return oracle().forward(IDS).logits


def near(got, expected) -> bool:
    return bool(np.abs(np.asarray(got) - expected).max() <= FLOAT32_ABSOLUTE)


def test_the_module_is_a_pure_function_of_its_parameters(model, expected):
    run = jax.jit(lambda params, ids: model.module.apply({"params": params}, ids).logits)
    assert near(run(model.params, IDS), expected)


@pytest.mark.feature("jit, grad, vmap", "causal_lm")
def test_a_call_works_inside_jit(model, expected):
    assert near(jax.jit(lambda ids: model(ids).logits)(IDS), expected)


@pytest.mark.feature("jit, grad, vmap", "causal_lm")
def test_a_call_works_inside_vmap(model, expected):
    assert near(jax.vmap(lambda row: model(row[None]).logits[0])(IDS), expected)


def test_vmap_over_parameters_runs_several_models_at_once(model, expected):
    both = jax.tree.map(lambda array: jnp.stack((array, 2 * array)), model.params)
    got = jax.vmap(lambda params: model(IDS, params=params).logits)(both)
    assert near(got[0], expected) and not near(got[1], expected)


def test_an_output_passes_through_jit_as_a_tree(model):
    output = jax.jit(lambda ids: model(ids, use_cache=True))(IDS)
    assert type(output).__name__ == "CausalLMOutputWithPast"
    doubled = jax.tree.map(lambda array: 2 * array, output)
    assert np.array_equal(doubled.logits, 2 * output.logits) and doubled.loss is None


def test_a_fixed_cache_steps_inside_jit(model, expected):
    step = jax.jit(lambda cache, ids: model(ids, past_key_values=cache, use_cache=True))
    cache = model.init_cache(3, 16)
    for column in range(IDS.shape[1]):
        output = step(cache, IDS[:, column : column + 1])
        cache = output.past_key_values
        assert near(output.logits[:, 0], expected[:, column])
    assert int(cache.length) == IDS.shape[1] and cache.fixed


def test_a_fixed_cache_stays_as_it_was_when_a_call_returns_the_next(model):
    cache = model.init_cache(3, 16)
    after = model(IDS, past_key_values=cache, use_cache=True).past_key_values
    assert cache.length == 0 and not np.asarray(cache.keys[0]).any()
    assert after.length == 7 and np.asarray(after.keys[0])[:, :, :7].any()


def test_a_cache_in_the_place_of_a_mask_is_named(model):
    with pytest.raises(InputError, match=r"attention_mask: a cache, not an array.*past_key_values="):
        model(IDS, model.init_cache(3, 16))


def test_a_cache_of_another_dtype_is_refused(model):
    past = model(IDS, use_cache=True).past_key_values
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.ndim(x) else x, past)
    with pytest.raises(InputError, match="past_key_values: a cache of another dtype"):
        model(IDS[:, :1], past_key_values=narrow)


@pytest.mark.parametrize("wrong", [216, -1, 2**31 - 1])
def test_a_token_that_is_not_there_gives_nan_under_jit(model, wrong):
    ids = IDS.copy()
    ids[1, 3] = wrong
    finite = np.isfinite(jax.jit(lambda ids: model(ids).logits)(ids)).all(-1)
    assert not finite[1, 3:].any() and finite[0].all() and finite[2].all()


def test_a_position_that_is_not_there_gives_nan_under_jit(model):
    positions = np.arange(7)[None] + 2050
    logits = jax.jit(lambda p: model(IDS, position_ids=p).logits)(positions)
    assert not np.isfinite(logits[:, -1]).any()


def test_a_full_cache_gives_nan_under_jit(model):
    step = jax.jit(lambda cache, ids: model(ids, past_key_values=cache, use_cache=True))
    output = step(step(model.init_cache(3, 8), IDS).past_key_values, IDS[:, :2])
    assert not np.isfinite(output.logits).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": np.ones((1, 3), np.float32)}, "input_ids: not whole numbers"),
        ({"input_ids": np.ones(3, np.int32)}, "input_ids: of another shape"),
        ({"input_ids": np.ones((1, 2057), np.int32)}, "longer than the model's positions"),
        ({"input_ids": IDS, "attention_mask": np.ones((3, 6), np.int32)}, "attention_mask: of another shape"),
        ({"input_ids": IDS, "position_ids": np.ones((2, 7), np.int32)}, "position_ids: of another shape"),
        ({"input_ids": IDS, "labels": np.ones((3, 6), np.int32)}, "labels: of another shape"),
        ({"inputs_embeds": np.ones((1, 3, 47), np.float32)}, "inputs_embeds: of another shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_and_dtypes_are_checked_even_under_jit(model, arguments, message):
    with pytest.raises(InputError, match=message):
        jax.jit(lambda a: model(**a).logits)(arguments)


def test_dropout_needs_a_key_and_the_same_key_gives_the_same(folder):
    model = GPTJForCausalLM.from_pretrained(folder(), resid_pdrop=0.5)
    with pytest.raises(InputError, match="dropout_rng: needed for dropout"):
        model(IDS, train=True)
    one, same, other = (np.asarray(model(IDS, train=True, dropout_rng=jax.random.key(n)).logits) for n in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.feature("jit, grad, vmap", "causal_lm")
def test_optax_trains_it(model):
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: model(IDS, labels=IDS, params=p, train=True).loss)(params)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, losses = model.params, []
    state = optimiser.init(params)
    for _ in range(8):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1


def test_gradient_checkpointing_recomputes_every_block_in_training_only(folder):
    model = GPTJForCausalLM.from_pretrained(folder())

    def recomputed(train: bool) -> int:
        return str(
            jax.make_jaxpr(lambda ids: model.module.apply({"params": model.params}, ids, train=train))(IDS)
        ).count("remat")

    assert recomputed(train=True) == 0
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing and (recomputed(train=True), recomputed(train=False)) == (3, 0)
    model.gradient_checkpointing_disable()
    assert recomputed(train=True) == 0


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gptj.flax import GPTJForCausalLM
from gptj.config.schema import SPLIT_AXES, schema
from gptj.flax.weights import flat, nested

model = GPTJForCausalLM.from_pretrained(sys.argv[1])
ids = np.random.default_rng(0).integers(0, 214, (8, 5))
alone = np.asarray(model(ids).logits)
assert len(jax.devices()) == 4, jax.devices()
mesh = Mesh(jax.devices(), ("rows",))

def apply(params, ids):
    return model.module.apply({"params": params}, ids).logits

by_rows = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows")))
print("shard_map", np.abs(np.asarray(by_rows(model.params, ids)) - alone).max())

by_pmap = jax.pmap(lambda ids: model(ids).logits)(ids.reshape(4, 2, 5))
print("pmap", np.abs(np.asarray(by_pmap).reshape(alone.shape) - alone).max())

def place(row, array):
    axes = ("rows" if axis in SPLIT_AXES else None for axis in row.axes)
    return jax.device_put(array, NamedSharding(mesh, P(*axes)))

arrays = flat(model.params)
placed = nested((row.name, place(row, arrays[row.name])) for row in schema(model.config))
split = placed["transformer"]["h"]["0"]["attn"]["q_proj"]["weight"]
assert split.addressable_shards[0].data.shape == (12, 48), split.sharding
print("tensor_parallel", np.abs(np.asarray(model(ids, params=placed).logits) - alone).max())
"""


@pytest.fixture(scope="module")
def sharded(folder):
    """What each way to spread the work over four devices differs by from one device."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_ENABLE_X64": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED, str(folder())],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {name: float(value) for name, value in (line.split() for line in run.stdout.splitlines())}


@pytest.mark.feature("pmap and sharding over several devices", "causal_lm")
@pytest.mark.parametrize("way", ["shard_map", "pmap", "tensor_parallel"])
def test_four_devices_give_what_one_gives(sharded, way):
    assert sharded[way] <= FLOAT32_ABSOLUTE
