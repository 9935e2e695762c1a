"""What is Flax's alone in generation: few compiled shapes, and a cache that is used up by each step."""

from __future__ import annotations

import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE

from gptj.flax import Decoder, GPTJForCausalLM
from gptj.flax.generate import read_slots, write_slots
from gptj.flax.inference import compiled_block
from gptj.flax.weights import flat
from gptj.generation.decoder import built_alike


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder())


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 214, (2, length))


def test_prompts_of_many_lengths_compile_few_shapes(folder):
    model = GPTJForCausalLM.from_pretrained(folder(), layer_norm_epsilon=1.1e-5)  # a config that no other test compiles
    for length in range(9, 17):
        model.generate(prompt(length), max_new_tokens=4, eos_token_id=None)
    # a prompt of 16 and a step, in a cache of 64; all blocks are one
    first, later = (compiled_block(built_alike(model.config), True, alone, True, False, 1) for alone in (True, False))
    assert (first._cache_size(), later._cache_size()) == (1, 1)


@pytest.mark.parametrize("length", [1, 9, 16, 31])
def test_slots_in_excess_change_nothing(model, oracle, length):
    decoder = Decoder(model, 2, 40)
    ids = prompt(length)
    whole = oracle().forward(ids, attentions=True)
    step = decoder.extend(ids, want=frozenset({"hidden_states", "attentions"}))
    for got, expected in zip(
        (step.logits, *step.hidden_states, *step.attentions),
        (whole.logits, *whole.hidden_states, *whole.attentions),
        strict=True,
    ):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= FLOAT32_ABSOLUTE


def test_a_prompt_that_fills_the_cache_to_its_last_slot_fits(folder, oracle):
    changes = {"n_positions": 72}  # a prompt of 69 would be rounded to 128
    decoder = Decoder(GPTJForCausalLM.from_pretrained(folder(**changes)), 2, 72)
    assert decoder.slots == 72
    decoder.extend(prompt(69))
    decoder.extend(prompt(2))
    last = decoder.step(np.array([5, 6])).logits
    ids = np.concatenate((prompt(69), prompt(2), [[5], [6]]), axis=1)
    assert np.abs(last - oracle(**changes).forward(ids).logits[:, -1]).max() <= FLOAT32_ABSOLUTE


def test_columns_of_many_counts_are_moved_by_few_programs(model):
    first, second = Decoder(model, 1, 60), Decoder(model, 1, 60)
    for decoder in (first, second):
        decoder.restart(60)
    before = read_slots._cache_size(), write_slots._cache_size()
    for count in (1, 5, 20, 40, 60):
        columns = first.read(0, 0, count)
        for some in {1, count // 2 + 1, count}:
            second.write(0, 60 - some, columns, some)
    assert read_slots._cache_size() - before[0] <= 1
    assert write_slots._cache_size() - before[1] <= 1


def test_a_step_writes_the_cache_in_place(model):
    decoder = Decoder(model, 2, 16)
    decoder.prefill(prompt(5))
    keys = decoder.cache.keys
    places = [array.unsafe_buffer_pointer() for array in keys]
    decoder.step(np.array([1, 2]))
    assert all(array.is_deleted() for array in keys)
    assert [array.unsafe_buffer_pointer() for array in decoder.cache.keys] == places


def test_only_the_last_places_logits_leave_the_device(model, monkeypatch):
    shapes = []
    kept = GPTJForCausalLM._held
    monkeypatch.setattr(
        GPTJForCausalLM, "_held", lambda self, logits, columns: shapes.append(logits.shape) or kept(self, logits)
    )
    Decoder(model, 2, 300).prefill(prompt(256))
    assert shapes == [(2, 216)]


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float64"}, {"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}, {"param_dtype": "float16"}],
)
def test_what_is_computed_in_and_what_is_kept(folder, options):
    """The steps compute a block at a time over the parameters as they are, on a CPU in float32 at least."""
    model = GPTJForCausalLM.from_pretrained(folder(), **options)
    computed = np.dtype(np.float64 if options.get("dtype") == "float64" else np.float32)
    whole = GPTJForCausalLM.from_pretrained(folder(), **options | {"dtype": str(computed)})
    params = flat(model.params)
    decoder = Decoder(model, 2, 16)
    steps = [decoder.prefill(prompt(5)), decoder.step(np.array([1, 2]))]
    assert decoder.cache.keys[0].dtype == computed
    ids = np.concatenate([prompt(5), [[1], [2]]], axis=1)
    logits = np.asarray(whole(ids).logits)
    assert steps[0].logits.dtype == logits.dtype
    exact = {"float64": 1e-12, "float32": FLOAT32_ABSOLUTE}[str(computed)]
    for step, expected in zip(steps, (logits[:, 4], logits[:, 5]), strict=True):
        assert np.abs(step.logits - expected).max() <= exact
    assert all(flat(model.params)[name] is array for name, array in params.items())


def test_dropout_is_off_in_generation(folder):
    model = GPTJForCausalLM.from_pretrained(folder(), resid_pdrop=0.9)
    plain = GPTJForCausalLM.from_pretrained(folder())
    one, other = (m.generate(prompt(5), max_new_tokens=6) for m in (model, plain))
    assert np.array_equal(one, other)
