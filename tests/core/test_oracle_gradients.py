"""The oracle's backward pass is the slope of its loss: along random directions, for every parameter and activation."""

from __future__ import annotations

import numpy as np
import pytest
from mutants import revealing_batch

from gptj.config import ACTIVATIONS
from gptj.parity.oracle import Oracle, causal_lm_loss
from gptj.parity.oracle_gradients import loss_gradients
from gptj.parity.revealing import revealing_config, revealing_weights

STEP = 1e-4
SLOPE_RELATIVE = 1e-7
"""Of |gradient| |direction|; the five-point difference errs by 1e-12 of the fifth derivative and 1e-11 of rounding."""


def call(config):
    batch = revealing_batch(config)
    ids, mask, positions = (values[:4] for values in (batch.input_ids, batch.attention_mask, batch.position_ids))
    return (ids, mask, positions), np.where(mask == 1, ids, -100)


def check(config, names=None):
    weights = {name: values.astype("float64") for name, values in revealing_weights(config).items()}
    given, labels = call(config)
    loss, gradients = loss_gradients(Oracle(config, weights), *given, labels=labels)
    assert loss == causal_lm_loss(Oracle(config, weights).forward(*given).logits, labels)
    assert gradients.keys() == weights.keys()
    random = np.random.Generator(np.random.Philox(0))
    for name in names or gradients:
        direction = random.normal(size=gradients[name].shape)
        direction *= np.linalg.norm(weights[name]) / np.linalg.norm(direction)

        def loss_at(distance, name=name, direction=direction):
            moved = weights | {name: weights[name] + distance * direction}
            return causal_lm_loss(Oracle(config, moved).forward(*given).logits, labels)

        near, far = (loss_at(h) - loss_at(-h) for h in (STEP, 2 * STEP))
        slope = (8 * near - far) / (12 * STEP)
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
        assert scale > 0, name
        assert abs((gradients[name] * direction).sum() - slope) <= SLOPE_RELATIVE * scale, name


def test_every_parameters_gradient_is_the_losss_slope():
    check(revealing_config(n_layer=2))


def test_a_tied_heads_gradients_are_summed():
    check(revealing_config(n_layer=1, tie_word_embeddings=True), ["transformer.wte.weight", "lm_head.bias"])


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])
def test_every_activations_slope_is_right(name):
    check(revealing_config(n_layer=1, activation_function=name), ["transformer.h.0.mlp.fc_in.bias"])


def test_a_gradient_that_is_off_would_be_noticed(monkeypatch):
    monkeypatch.setattr("gptj.parity.oracle_gradients._Backward._turn_back", lambda self, x: x)
    with pytest.raises(AssertionError, match=r"[qk]_proj"):
        check(revealing_config(n_layer=1))
