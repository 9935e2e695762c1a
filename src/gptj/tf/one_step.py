"""One step of Keras' own optimizers from a gradient that is given: what `gptj parity matrix` judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from gptj.tf.heads import GPTJForCausalLM


def take_step(
    model: GPTJForCausalLM,
    slopes: Mapping[str, tf.Tensor],
    kind: str,
    *,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> dict[str, tf.Tensor]:
    """Every parameter after one step of the framework's own optimizer, by its name; the model itself may be moved.

    Args:
        model: whose parameters these are.
        slopes: the gradient by every parameter, see `loss_gradients`.
        kind: "sgd" or "adamw" (Loshchilov and Hutter, arXiv:1711.05101), whose moments are zero.
        rate: how far to go.
        betas, epsilon, decay: AdamW's, as PyTorch has them; everything decays, vectors too.
    """
    variables = {v.path.split("/", 1)[1].replace("/", "."): v for v in model.trainable_variables}
    optimizer: Any
    if kind == "adamw":
        first, second = betas
        # Differs: Keras adds epsilon to the root before it corrects the bias, PyTorch and optax after.
        of_root = epsilon * (1 - second) ** 0.5
        optimizer = keras.optimizers.AdamW(rate, beta_1=first, beta_2=second, epsilon=of_root, weight_decay=decay)
    else:
        optimizer = keras.optimizers.SGD(rate)
    optimizer.apply([slopes[name] for name in variables], list(variables.values()))
    return {name: tf.convert_to_tensor(variable) for name, variable in variables.items()}
