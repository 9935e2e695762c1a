"""A step of fine-tuning across devices in Flax: each its rows of the batch and its part of every tensor."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import schema_by_name
from gptj.errors import FormatError, WriteError
from gptj.finetune.settings import Settings
from gptj.flax import finetune
from gptj.flax.heads import GPTJForCausalLM
from gptj.flax.parallel import choose_placement, cut_rows, sharding_of
from gptj.flax.processes import is_of_processes
from gptj.flax.weights import to_numpy
from gptj.sharding import Mesh, Strategy, check_mesh

IN_PARTS = True
"""A checkpoint is of every process' parts, or a whole model that the first writes."""


def open_model(
    directory: str | os.PathLike[str], settings: Settings, *, mesh: Mesh | None, strategy: Strategy
) -> GPTJForCausalLM:
    """This process' part of the model as it is to be trained; see `gptj.flax.finetune.open_model`.

    Raises:
        InputError: the model or a batch cannot be cut so.
    """
    placement = choose_placement(mesh, strategy)
    check_mesh(GPTJConfig.from_file(Path(directory)), strategy, placement.mesh, batch=settings.batch)
    model: GPTJForCausalLM = GPTJForCausalLM.from_pretrained(
        directory, dtype=settings.dtype, param_dtype=settings.kept_dtype, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0, mesh=placement.native, strategy=strategy,
    )  # fmt: skip
    return model


class TrainingStep(finetune.TrainingStep):
    """See `gptj.finetune.loop.TrainingStep`. Every process calls each method, with the same arguments.

    Parameters, gradients and both moments lie as the table says; XLA puts in what crosses between devices.
    """

    def __init__(self, model: GPTJForCausalLM, settings: Settings) -> None:
        super().__init__(model, settings)
        assert model.placement is not None
        self.placement = model.placement
        rows = schema_by_name(model.config)
        self._whole = NamedSharding(self.placement.native, PartitionSpec())
        self._shardings = {name: sharding_of(rows[name], self.placement) for name in self.parameters}
        accumulate, evaluate, update = self._accumulate, self._evaluate, self._update
        shardings, state = self._shardings, self._state_shardings(jax.eval_shape(self.optimizer.init, self.parameters))
        self._accumulate = jax.jit(
            lambda *given: accumulate(*given), donate_argnums=1, out_shardings=(self._whole, shardings)
        )
        self._evaluate = jax.jit(lambda *given: evaluate(*given), out_shardings=self._whole)
        self._update = jax.jit(lambda *given: update(*given), donate_argnums=(0, 1), out_shardings=(shardings, state))
        self._state = jax.jit(self.optimizer.init, out_shardings=state)(self.parameters)

    def _start(self, parameters: dict[str, Array]) -> Any:
        return None  # made once the shardings are known

    def _state_shardings(self, state: Any) -> Any:
        """The shardings of the optimizer's state: a moment's is its parameter's."""

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            name = getattr(path[-1], "key", None)
            return self._shardings.get(name, self._whole) if isinstance(name, str) else self._whole

        return jax.tree_util.tree_map_with_path(of, state)

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        return super().accumulate(cut_rows(ids, self.placement), cut_rows(labels, self.placement), factor=factor)

    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        return super().evaluate(cut_rows(ids, self.placement), cut_rows(labels, self.placement))

    def save(self, folder: Path) -> None:
        """Write parameters and moments with orbax, each process its own parts.

        Raises:
            WriteError: one of them cannot be written.
        """
        import orbax.checkpoint as ocp

        try:
            with _raised_alone(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder.absolute(), self._held())
                checkpointer.wait_until_finished()
        except (OSError, ValueError) as error:  # orbax gives a disk's refusal as the one, tensorstore as the other
            if is_of_processes(error):
                raise
            raise WriteError(f"cannot be written: {error}", file=folder, hint="Is the disk full?") from None

    def load(self, folder: Path, *, updates: int) -> None:
        """Read what `save` wrote, on whatever mesh.

        Raises:
            FormatError: it is damaged, or another model's.
        """
        import orbax.checkpoint as ocp

        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._held())
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                held = checkpointer.restore(folder.absolute(), wanted)
        except (ValueError, KeyError, OSError) as error:
            raise FormatError(f"cannot be read: {error}", file=folder) from None
        adam, *others = self._state
        self.parameters = held["model"]
        self._state = (adam._replace(count=held["count"], mu=held["first"], nu=held["second"]), *others)

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, which are whole, after so many updates."""
        adam, *others = self._state
        found = {
            field: {name: self._cut(moments[f"{moment}.{name}"], name) for name in self.parameters}
            for moment, field in (("first", "mu"), ("second", "nu"))
        }
        count = jax.make_array_from_callback((), self._whole, lambda index: np.asarray(updates, adam.count.dtype))
        self._state = (adam._replace(count=count, **found), *others)

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32, whole; every process calls it."""
        return to_numpy(self.parameters[name])

    def _held(self) -> dict[str, Any]:
        """All that a checkpoint keeps."""
        adam = self._state[0]
        return {"model": self.parameters, "first": adam.mu, "second": adam.nu, "count": adam.count}

    def _cut(self, array: NDArray[Any], name: str) -> Array:
        return jax.make_array_from_callback(array.shape, self._shardings[name], lambda index: array[index])


@contextlib.contextmanager
def _raised_alone() -> Iterator[None]:
    """While this is open, orbax raises what fails, and does not print each of its threads' account of it as well."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
