"""Gradients are the oracle's: along random directions the loss changes as they say. Recomputation changes nothing."""

import numpy as np
import pytest
from mutants import revealing_batch

from gptj.parity.oracle import Oracle, causal_lm_loss
from gptj.parity.revealing import revealing_config, revealing_weights

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
IDS, MASK = BATCH.input_ids[:4], BATCH.attention_mask[:4]
LABELS = np.where(MASK == 1, IDS, -100)
CALL = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}

STEP = 1e-4
SLOPE_RELATIVE = 1e-7
"""Of |gradient| |direction|. The five-point difference errs by step**4 / 30 of the fifth derivative, some 1e-12 where
the direction is as long as the tensor, and by 1e-15 / step = 1e-11 of rounding in a loss of about 6."""


def slope_of(name, direction):
    """How fast the oracle's loss changes as the tensor moves in `direction`: a five-point difference."""

    def loss_at(distance):
        weights = {key: value.astype("float64") for key, value in revealing_weights(CONFIG).items()}
        weights[name] = weights[name] + distance * direction
        return causal_lm_loss(Oracle(CONFIG, weights).forward(IDS, MASK).logits, LABELS)

    near, far = (loss_at(h) - loss_at(-h) for h in (STEP, 2 * STEP))
    return (8 * near - far) / (12 * STEP)


def test_the_gradient_of_every_parameter_is_the_oracles_slope(wing, folder):
    model = wing.model("causal_lm").from_pretrained(folder(), param_dtype="float64")
    _, gradients = wing.gradients(model, **CALL)
    assert gradients.keys() == revealing_weights(CONFIG).keys()
    rng = np.random.default_rng(0)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        direction *= np.linalg.norm(revealing_weights(CONFIG)[name]) / np.linalg.norm(direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert scale > 0, name
        assert abs((gradient * direction).sum() - slope_of(name, direction)) <= SLOPE_RELATIVE * scale, name


def test_recomputing_blocks_gives_the_same_loss_and_gradients(wing, folder):
    model = wing.model("causal_lm").from_pretrained(folder(), param_dtype="float64")
    loss, gradients = wing.gradients(model, **CALL)
    model.gradient_checkpointing_enable()
    again, recomputed = wing.gradients(model, **CALL)
    model.gradient_checkpointing_disable()
    assert abs(loss - again) <= 1e-14 * loss
    for name, gradient in gradients.items():
        assert np.abs(gradient - recomputed[name]).max() <= 1e-13 * np.abs(gradient).max(), name


@pytest.mark.parametrize("field", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
@pytest.mark.feature("dropout of embeddings, weights and residuals", "causal_lm")
def test_each_dropout_acts_in_training_and_only_there(wing, folder, revealing, field):
    model = wing.model("causal_lm").from_pretrained(folder(), **{field: 0.5})
    still = wing.numpy(wing.call(model, IDS).logits)
    assert (still == wing.numpy(wing.call(revealing(), IDS).logits)).all()
    loss, _ = wing.gradients(model, **CALL)
    calm, _ = wing.gradients(revealing(), **CALL)
    assert abs(loss - calm) > 1e-5
