"""A cache changes nothing: what a call with one computes is what the whole sequence computes at once."""

import numpy as np
import pytest
from mutants import revealing_batch
from wings import close

from gptj.errors import InputError
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
IDS = revealing_batch(CONFIG).input_ids[:3, :12]
MASK = np.ones_like(IDS)
MASK[1, :4] = 0
MASK[2, 5:7] = 0

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
# Token by token past all that MASK hides, and the rest at once: a piece of another length is another program in jax.
CUTS = pytest.mark.parametrize("cuts", [(4, 5), (1,), (11,), tuple(range(1, 9))], ids=str)
KINDS = pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])


def in_pieces(wing, model, cuts, *, fixed):
    """Logits and all hidden states of IDS, given to the model piece by piece."""
    past = model.init_cache(len(IDS), IDS.shape[1] + 3) if fixed else None
    logits, hidden = [], []
    for start, end in zip((0, *cuts), (*cuts, IDS.shape[1]), strict=True):
        out = wing.call(
            model,
            IDS[:, start:end],
            past_key_values=past,
            attention_mask=MASK[:, :end],
            use_cache=True,
            output_hidden_states=True,
        )
        past = out.past_key_values
        logits.append(wing.numpy(out.logits))
        hidden.append([wing.numpy(h) for h in out.hidden_states])
    return np.concatenate(logits, 1), [np.concatenate(h, 1) for h in zip(*hidden, strict=True)], past


@DTYPES
@CUTS
@KINDS
@pytest.mark.feature("growing and fixed caches, masked history", "causal_lm")
def test_cached_equals_uncached_on_all_channels(wing, revealing, oracle, dtype, cuts, fixed):
    logits, hidden, past = in_pieces(wing, revealing(dtype=dtype), cuts, fixed=fixed)
    expected = oracle().forward(IDS, MASK)
    assert close(logits, expected.logits, dtype)
    assert all(close(h, e, dtype) for h, e in zip(hidden, expected.hidden_states, strict=True))
    assert int(past.length) == IDS.shape[1]


@KINDS
def test_a_cache_holds_a_pair_a_layer_as_long_as_its_tokens(wing, revealing, fixed):
    _, _, past = in_pieces(wing, revealing(), (4,), fixed=fixed)
    assert len(past) == CONFIG.n_layer
    for key, value in past:
        assert tuple(key.shape) == tuple(value.shape) == (3, CONFIG.n_head, 12, CONFIG.head_dim)


def test_two_continuations_of_one_past_do_not_disturb_each_other(wing, revealing, oracle):
    model = revealing(dtype="float64")
    past = wing.call(model, IDS[:, :6], use_cache=True).past_key_values
    left = wing.call(model, IDS[:, 6:9], past_key_values=past, use_cache=True)
    wing.call(model, IDS[:, 9:12], past_key_values=past, use_cache=True)
    got = wing.numpy(wing.call(model, IDS[:, 9:12], past_key_values=left.past_key_values).logits)
    assert close(got, oracle().forward(IDS).logits[:, 9:], "float64")


def test_a_tuple_of_pairs_serves_as_a_past(wing, revealing, oracle):
    model = revealing(dtype="float64")
    past = wing.call(model, IDS[:, :6], use_cache=True).past_key_values
    pairs = tuple((key, value) for key, value in past)
    got = wing.numpy(wing.call(model, IDS[:, 6:], past_key_values=pairs).logits)
    assert close(got, oracle().forward(IDS).logits[:, 6:], "float64")


def test_use_cache_false_returns_none(wing, revealing):
    assert wing.call(revealing(), IDS, use_cache=False).past_key_values is None
    assert wing.call(revealing(), IDS).past_key_values is not None


def test_an_empty_cache_is_of_zeros_in_the_models_type(wing, revealing):
    model = revealing()
    cache = model.init_cache(3, 8)
    sides = [np.asarray(x) for side in (cache.keys, cache.values) for x in side]
    shape = 3, CONFIG.n_head, 8, CONFIG.head_dim
    assert len(sides) == 2 * CONFIG.n_layer and cache.length == 0
    assert all(x.shape == shape and x.dtype == np.float32 and not x.any() for x in sides)


def test_a_full_cache_is_an_error_that_says_so(wing, revealing):
    model = revealing()
    past = model.init_cache(3, 8)
    past = wing.call(model, IDS[:, :6], past_key_values=past, use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"cache is full.*6 of 8 slots"):
        wing.call(model, IDS[:, 6:9], past_key_values=past)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0), (1, CONFIG.n_positions + 1)])
def test_a_cache_of_no_use_is_refused(wing, revealing, sizes):
    with pytest.raises(InputError, match=r"batch_size|max_length"):
        revealing().init_cache(*sizes)


def test_a_cache_of_another_batch_is_refused(wing, revealing):
    past = wing.call(revealing(), IDS, use_cache=True).past_key_values
    with pytest.raises(InputError, match="another batch"):
        wing.call(revealing(), IDS[:1], past_key_values=past)


def test_what_is_no_cache_is_refused(wing, revealing):
    with pytest.raises(InputError, match="past_key_values: not a cache"):
        wing.call(revealing(), IDS, past_key_values="cache")


@KINDS
def test_a_mask_may_be_as_long_as_a_fixed_cache(wing, revealing, oracle, fixed):
    """transformers' Flax hands one mask of the whole length to every call."""
    model, length = revealing(), IDS.shape[1] + 3
    mask = np.concatenate([MASK, np.ones((len(IDS), 3), MASK.dtype)], axis=1)
    past = model.init_cache(len(IDS), length) if fixed else None
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 12)):
        given = mask if fixed else mask[:, :end]
        out = wing.call(model, IDS[:, start:end], past_key_values=past, attention_mask=given, use_cache=True)
        past = out.past_key_values
        logits.append(wing.numpy(out.logits))
    assert close(np.concatenate(logits, 1), oracle().forward(IDS, MASK).logits, "float32")
