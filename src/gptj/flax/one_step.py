"""One step of optax' own optimizers from a gradient that is given: what `gptj parity matrix` judges."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from gptj.errors import BackendError, install_line
from gptj.flax.heads import GPTJForCausalLM
from gptj.flax.weights import flat


def take_step(
    model: GPTJForCausalLM,
    slopes: Mapping[str, Array],
    kind: str,
    *,
    shares: Sequence[float] = (1.0,),
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> dict[str, Array]:
    """Every parameter after steps of the framework's own optimizer, by its name; the model itself may be moved.

    Args:
        model: whose parameters these are.
        slopes: the gradient by every parameter, see `loss_gradients`.
        kind: "sgd" or "adamw" (Loshchilov and Hutter, arXiv:1711.05101), whose moments are zero.
        shares: of the gradient, one for each step that is taken.
        rate: how far to go.
        betas, epsilon, decay: AdamW's, as PyTorch has them; everything decays, vectors too.
    """
    # Differs: optimizers are a library of their own in jax.
    if importlib.util.find_spec("optax") is None:
        raise BackendError("optax is not installed", where="gptj.flax.one_step", hint=install_line("finetune"))
    import optax

    parameters = flat(model.params)
    if kind == "adamw":
        first, second = betas
        optimizer = optax.adamw(rate, b1=first, b2=second, eps=epsilon, weight_decay=decay)
    else:
        optimizer = optax.sgd(rate)
    state, moved = optimizer.init(parameters), dict[str, Any](parameters)
    for share in shares:
        updates, state = optimizer.update({name: share * slope for name, slope in slopes.items()}, state, moved)
        moved = dict[str, Any](optax.apply_updates(moved, updates))
    return moved
