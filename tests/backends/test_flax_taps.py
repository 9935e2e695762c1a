"""Taps of a Flax model's parameters that are given with the call."""

from __future__ import annotations

import jax
import numpy as np
import pytest

IDS = np.random.default_rng(0).integers(0, 214, (2, 7))


@pytest.mark.parametrize("head", ["causal_lm", "base", "sequence_classification"])
def test_parameters_may_be_given_in_place_of_the_models(wing, revealing, head):
    model = revealing(head)
    other = jax.tree.map(lambda array: 2 * array, model.params)
    names = ["embedding", "h.0.fc_in"]
    own, given = model.taps(IDS, names=names), model.taps(IDS, names=names, params=other)
    assert np.array_equal(2 * own["embedding"], given["embedding"])
    bare = wing.model(head)(model.config, _do_init=False)
    assert np.array_equal(bare.taps(IDS, names=names, params=other)["h.0.fc_in"], given["h.0.fc_in"])


def test_a_gradient_passes_through_them(revealing):
    model = revealing()
    slopes = jax.grad(lambda params: model.taps(IDS, labels=IDS, names="loss", params=params)["loss"])(model.params)
    assert max(float(abs(slope).max()) for slope in jax.tree.leaves(slopes)) > 0
