"""A step of fine-tuning in PyTorch: loss and gradient under autocast, torch.optim.AdamW."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj.finetune.settings import BETA_1, BETA_2, EPSILON, Settings
from gptj.pt.heads import GPTJForCausalLM
from gptj.pt.weights import from_numpy, to_numpy


def open_model(directory: str | os.PathLike[str], settings: Settings) -> GPTJForCausalLM:
    """The model in a folder as it is to be trained: without dropout, its parameters in float32 where they are."""
    model: GPTJForCausalLM = GPTJForCausalLM.from_pretrained(
        directory, param_dtype=settings.kept_dtype, mmap=False, attn_implementation="sdpa", embd_pdrop=0.0,
        attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return model


def trained_parameters(model: GPTJForCausalLM) -> dict[str, Tensor]:
    """The parameters that are trained, by their names in files: the adapter's at work, or all."""
    if (name := model.active_adapter) is not None:
        found: dict[str, Any] = {}
        for row in model._adapters.by_name[name].rows:
            added: Any = model._beside(row.module)._modules[name]
            found |= {row.a.name: added.a, row.b.name: added.b}
        return found
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class TrainingStep:
    """See `gptj.finetune.loop.TrainingStep`.

    torch.optim.AdamW has the meaning said there, in two groups: of matrices, which decay, and of vectors. Mixed
    precision is torch.autocast, over float32 parameters; beside an adapter the model's own dtype is that of computing.
    """

    def __init__(self, model: GPTJForCausalLM, settings: Settings) -> None:
        self.model = model
        self.dtype = getattr(torch, settings.dtype)
        self.mixed = settings.dtype != settings.kept_dtype
        self.parameters = trained_parameters(model)
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(BETA_1, BETA_2),
                                           eps=EPSILON)  # fmt: skip

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        self.model.train()
        loss = self._loss(ids, labels)
        (loss * factor).backward()
        return float(loss.item())

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""
        return float(torch.nn.utils.get_total_norm(self._gradients()).item())

    def update(self, rate: float, *, factor: float) -> None:
        """One update of AdamW by `factor` times the gradient, which is then none again."""
        if factor != 1:
            torch._foreach_mul_(self._gradients(), factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Let the gradient be none again, without an update."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        self.model.eval()
        return float(self._loss(ids, labels).item())

    def trained_model(self) -> GPTJForCausalLM:
        """The model, with its parameters as they are trained by now."""
        return self.model

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32."""
        return to_numpy(self.parameters[name])

    def moments(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """AdamW's moments: "first.NAME" and "second.NAME" for each trained parameter."""
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            for moment, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
                value = state.get(key)
                yield f"{moment}.{name}", np.zeros(parameter.shape, np.float32) if value is None else to_numpy(value)

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, after so many updates."""
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates)),
                "exp_avg": from_numpy(moments[f"first.{name}"]).to(parameter.device),
                "exp_avg_sq": from_numpy(moments[f"second.{name}"]).to(parameter.device),
            }

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _loss(self, ids: NDArray[Any], labels: NDArray[Any]) -> Tensor:
        device = self.model.device
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.mixed):
            given = {"input_ids": from_numpy(ids).long(), "labels": from_numpy(labels).long()}
            return self.model(**given, use_cache=False).loss
