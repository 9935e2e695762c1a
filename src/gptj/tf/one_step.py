"""One step of Keras' own optimizers from a gradient that is given: what `gptj parity matrix` judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from gptj.tf.heads import GPTJForCausalLM


def take_step(
    model: GPTJForCausalLM,
    slopes: Mapping[str, tf.Tensor],
    kind: str,
    *,
    shares: Sequence[float] = (1.0,),
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> dict[str, tf.Tensor]:
    """Every parameter after steps of the framework's own optimizer, by its name; the model itself may be moved.

    Args:
        model: whose parameters these are.
        slopes: the gradient by every parameter, see `loss_gradients`.
        kind: "sgd" or "adamw" (Loshchilov and Hutter, arXiv:1711.05101), whose moments are zero.
        shares: of the gradient, one for each step that is taken.
        rate: how far to go.
        betas, epsilon, decay: AdamW's, as PyTorch has them; everything decays, vectors too.
    """
    variables = {v.path.split("/", 1)[1].replace("/", "."): v for v in model.trainable_variables}
    optimizer: Any
    if kind == "adamw":
        first, second = betas
        optimizer = keras.optimizers.AdamW(rate, beta_1=first, beta_2=second, epsilon=epsilon, weight_decay=decay)
    else:
        optimizer = keras.optimizers.SGD(rate)
    for number, share in enumerate(shares, 1):
        if kind == "adamw":
            # Differs: Keras adds epsilon to the root before it corrects the bias, PyTorch and optax after.
            optimizer.epsilon = epsilon * (1 - betas[1] ** number) ** 0.5
        optimizer.apply([share * slopes[name] for name in variables], list(variables.values()))
    return {name: tf.convert_to_tensor(variable) for name, variable in variables.items()}
