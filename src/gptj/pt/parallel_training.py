"""A step of fine-tuning across processes in PyTorch: each its rows of the batch and its part of every tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.tensor import DTensor

from gptj.config import GPTJConfig
from gptj.config.schema import schema_by_name
from gptj.errors import WriteError
from gptj.finetune.data import own_rows
from gptj.finetune.settings import Settings
from gptj.pt import finetune
from gptj.pt.heads import GPTJForCausalLM
from gptj.pt.parallel import (
    choose_placement,
    cut_again,
    device_of,
    gradient_norm,
    learn_all,
    load_training,
    local_gradients,
    named_parts,
    training_state,
    whole,
)
from gptj.pt.weights import from_numpy, to_numpy
from gptj.sharding import Mesh, Strategy, check_mesh

IN_PARTS = True
"""A checkpoint is of every process' parts, or a whole model that the first writes."""


def open_model(
    directory: str | os.PathLike[str], settings: Settings, *, mesh: Mesh | None, strategy: Strategy
) -> GPTJForCausalLM:
    """This process' part of the model as it is to be trained; see `gptj.pt.finetune.open_model`.

    Raises:
        InputError: the model or a batch cannot be cut so.
    """
    placement = choose_placement(mesh, strategy)
    check_mesh(GPTJConfig.from_file(Path(directory)), strategy, placement.mesh, batch=settings.batch)
    model: GPTJForCausalLM = GPTJForCausalLM.from_pretrained(
        directory, param_dtype=settings.kept_dtype, attn_implementation="sdpa", embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0, mesh=placement.native, strategy=strategy,
    )  # fmt: skip
    learn_all(model, placement)
    return model


class TrainingStep(finetune.TrainingStep):
    """See `gptj.finetune.loop.TrainingStep`. Every process calls each method, with the same arguments."""

    def __init__(self, model: GPTJForCausalLM, settings: Settings) -> None:
        super().__init__(model, settings)
        assert model.placement is not None
        self.placement = model.placement

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        self.model.train()
        loss, share = self._loss_of_own(ids, labels)
        (loss * (factor * share * self.placement.mesh.dp)).backward()  # of which the mean along dp is taken
        return self._sum(loss * share)

    @torch.no_grad()
    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        self.model.eval()
        loss, share = self._loss_of_own(ids, labels)
        return self._sum(loss * share)

    def _loss_of_own(self, ids: NDArray[Any], labels: NDArray[Any]) -> tuple[Tensor, float]:
        """The mean loss of this process' rows, and their share of the tokens that are learnt."""
        own_ids, own_labels, share = own_rows(ids, labels, self.placement.coordinates["dp"], self.placement.mesh.dp)
        with warnings.catch_warnings():  # the logits are a view, and nothing is done to them in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            return self._loss(own_ids, own_labels), share

    def _sum(self, part: Tensor) -> float:
        """The sum along dp, to the last bit the same in every process."""
        total = part.detach().double().to(device_of(self.placement)) / self.placement.mesh.tp
        dist.all_reduce(total)
        return float(total.item())

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""
        return float(gradient_norm(self.model).item())

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32, whole; every process calls it."""
        cut_again(self.model)
        spec = schema_by_name(self.model.config, self.model.head)[name]
        return to_numpy(whole(self.parameters[name], spec, self.placement))

    def save(self, folder: Path) -> None:
        """Write parameters and moments with torch.distributed.checkpoint, each process its own parts.

        Raises:
            WriteError: one of them cannot be written.
        """
        try:
            checkpoint.save(training_state(self.model, self.optimizer, {"step": 0}), checkpoint_id=folder)
        except checkpoint.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise WriteError(f"cannot be written: {cause}", file=folder) from None

    def load(self, folder: Path, *, updates: int) -> None:
        """Read what `save` wrote, on whatever mesh; how many updates were made is in it."""
        load_training(folder, self.model, self.optimizer)

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, which are whole, after so many updates."""
        for spec, parameter in named_parts(self.model):
            state = {"step": torch.tensor(float(updates))}
            for moment, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
                part = moments[f"{moment}.{spec.name}"][self.placement.slices(spec)]
                kept = torch.empty_like(parameter)
                (kept.to_local() if isinstance(kept, DTensor) else kept).copy_(from_numpy(np.ascontiguousarray(part)))
                state[key] = kept
            self.optimizer.state[parameter] = state

    def _gradients(self) -> list[Tensor]:
        return local_gradients(self.model)
