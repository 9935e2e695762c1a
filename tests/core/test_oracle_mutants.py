"""No classic mistake hides on the revealing checkpoint, and the catcher that says so can itself be seen to fail."""

from __future__ import annotations

import numpy as np
import pytest
from mutants import MUTANTS, VISIBLE, Mutant, logits_of, revealing_batch

from gptj.config.schema import schema
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_tensor, revealing_weights

PINNED = [0xBCA23CA3, 0x3AB433DB, 0x3D025021]
"""The bits of the first three values of wte.weight under seed 0."""

FLOAT32_ROUNDING = 5e-6
"""What float32 alone may move the revealing logits by; measured 1.7e-6."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mistake_moves_logits_far_beyond_the_float32_tolerance(mutant):
    assert mutant.difference() > VISIBLE


def test_no_mistake_moves_nothing():
    assert Mutant("none", Oracle).difference() == 0


def test_a_mistake_too_small_to_matter_is_not_called_visible():
    """The other side of the catcher: it measures, and does not merely say yes."""

    def nudge(config, weights):
        name = "transformer.h.0.ln_1.weight"
        return Oracle(config, weights | {name: weights[name] * (1 + 1e-6)})

    assert 0 < Mutant("nudged", nudge).difference() < VISIBLE


def test_on_weights_as_a_constructor_makes_them_many_mistakes_would_hide():
    """Why the revealing fill exists: the same catcher, blind."""
    config = revealing_config()
    random = np.random.default_rng(0)
    plain = {
        row.name: np.ones(row.shape)
        if row.kind == "scale"
        else np.zeros(row.shape)
        if row.kind in ("bias", "offset")
        else random.normal(0, 0.02, row.shape)
        for row in schema(config)
    }
    batch = revealing_batch(config)
    right = logits_of(Oracle(config, plain), batch)
    hidden = [
        mutant.name
        for mutant in MUTANTS
        if mutant.n_layer == 3 and np.abs(logits_of(mutant.plant(config, plain), batch) - right).max() < VISIBLE
    ]
    assert {".fc_out.bias dropped", "fc_out bias from one shard of two", "exact GELU"} <= set(hidden)
    assert {"ln_1 scale as the mean of two shards", "rotary table bfloat16"} <= set(hidden)


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


class TestRevealingFill:
    def test_float32_rounding_is_far_below_the_tolerance(self):
        config = revealing_config()
        weights, batch = revealing_weights(config), revealing_batch(config)
        single, double = (logits_of(Oracle(config, weights, dtype=dtype), batch) for dtype in ("float32", "float64"))
        assert np.abs(single - double).max() < FLOAT32_ROUNDING

    def test_all_axes_differ_in_size(self):
        c = revealing_config()
        sizes = [
            *(c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head, c.head_dim, c.rotary_width, c.inner_width),
            *(4 * c.n_embd, c.num_labels),
        ]
        assert len(set(sizes)) == len(sizes)

    def test_a_tensor_follows_from_its_name_and_the_seed_alone(self):
        rows = schema(revealing_config())
        alone = revealing_tensor(rows[5], 3)
        assert np.array_equal(alone, {row.name: revealing_fill(3)(row) for row in reversed(rows)}[rows[5].name])
        assert not np.array_equal(alone, revealing_tensor(rows[5], 4))

    def test_the_same_bits_everywhere(self):
        """Pinned: reports and recorded figures name the fill by its seed alone."""
        row = schema(revealing_config())[0]
        assert (row.name, revealing_tensor(row).view(np.uint32)[0, :3].tolist()) == ("transformer.wte.weight", PINNED)

    def test_kernels_keep_the_size_of_what_goes_through_them(self):
        for row in schema(revealing_config(n_embd=192, n_inner=600)):
            values = revealing_tensor(row).astype(float)
            if row.kind == "kernel" and "out" not in row.name:
                assert values.var() * row.shape[1] == pytest.approx(1, rel=0.05), row.name
            assert np.abs(values).max() > 0 and np.unique(values).size > values.size / 2, row.name

    def test_a_model_without_a_head_is_the_same_model(self):
        config = revealing_config()
        base, whole = revealing_weights(config, head="base"), revealing_weights(config)
        assert all(np.array_equal(value, whole["transformer." + name]) for name, value in base.items())
