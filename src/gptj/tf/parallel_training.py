"""A step of fine-tuning across processes in TensorFlow: each its rows of the batch and a copy of every tensor.

Differs: no model trains in parts here, so gradients are summed, and a checkpoint is a whole model's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.experimental import dtensor

from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.finetune.data import own_rows
from gptj.finetune.settings import Settings
from gptj.sharding import Mesh, Strategy, check_mesh, choose_mesh
from gptj.tf import finetune
from gptj.tf.heads import GPTJForCausalLM
from gptj.tf.processes import count_devices, sum_over_processes

IN_PARTS = False
"""A checkpoint is of every process' parts, or a whole model that the first writes."""


def open_model(
    directory: str | os.PathLike[str], settings: Settings, *, mesh: Mesh | None, strategy: Strategy
) -> GPTJForCausalLM:
    """This process' copy of the model as it is to be trained; see `gptj.tf.finetune.open_model`.

    Raises:
        InputError: the strategy would cut it, a batch cannot be cut so, or a process has several devices.
    """
    processes = dtensor.num_clients()
    mesh = choose_mesh(mesh, strategy, count_devices(), processes=processes)
    check_mesh(GPTJConfig.from_file(Path(directory)), strategy, mesh, batch=settings.batch)
    if mesh.dp != processes:
        raise InputError(
            "a process trains one copy, on one device",
            where="mesh",
            expected=f"dp={processes}, one a process",
            found=f"dp={mesh.dp}",
            hint="Start a process a device, each of which sees that one; or fit in the scope of a MirroredStrategy",
        )
    return finetune.open_model(directory, settings)


class TrainingStep(finetune.TrainingStep):
    """See `gptj.finetune.loop.TrainingStep`. Every process calls each method, with the same arguments."""

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        own_ids, own_labels, share = own_rows(ids, labels, dtensor.client_id(), dtensor.num_clients())
        return _sum(super().accumulate(own_ids, own_labels, factor=factor * share) * share)

    def gradient_norm(self) -> float:
        """The norm of the whole gradient, which every process holds from here on."""
        assert self._gradients is not None
        self._gradients = sum_over_processes(self._gradients)
        return super().gradient_norm()

    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        own_ids, own_labels, share = own_rows(ids, labels, dtensor.client_id(), dtensor.num_clients())
        return _sum(super().evaluate(own_ids, own_labels) * share)


def _sum(part: float) -> float:
    """The sum over the processes, to the last bit the same in each."""
    (total,) = sum_over_processes([tf.constant(part, tf.float64)])
    return float(total)
