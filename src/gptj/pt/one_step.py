"""One step of PyTorch's own optimizers from a gradient that is given: what `gptj parity matrix` judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptj.pt.heads import GPTJForCausalLM


def take_step(
    model: GPTJForCausalLM,
    slopes: Mapping[str, Tensor],
    kind: str,
    *,
    shares: Sequence[float] = (1.0,),
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> dict[str, Tensor]:
    """Every parameter after steps of the framework's own optimizer, by its name; the model itself may be moved.

    Args:
        model: whose parameters these are.
        slopes: the gradient by every parameter, see `loss_gradients`.
        kind: "sgd" or "adamw" (Loshchilov and Hutter, arXiv:1711.05101), whose moments are zero.
        shares: of the gradient, one for each step that is taken.
        rate: how far to go.
        betas, epsilon, decay: AdamW's, as PyTorch has them; everything decays, vectors too.
    """
    parameters = dict(model.named_parameters())
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=betas, eps=epsilon, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(parameters.values(), lr=rate)
    for share in shares:
        for name, parameter in parameters.items():
            parameter.grad = share * slopes[name]
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}
