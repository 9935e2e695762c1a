"""A step of fine-tuning in Flax: loss and gradient of float32 parameters, optax's AdamW."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from gptj.errors import BackendError, install_line
from gptj.finetune.settings import BETA_1, BETA_2, EPSILON, Settings
from gptj.flax.adapters import MATRICES
from gptj.flax.heads import GPTJForCausalLM
from gptj.flax.weights import flat, from_numpy, nested, to_numpy


def open_model(directory: str | os.PathLike[str], settings: Settings) -> GPTJForCausalLM:
    """The model in a folder as it is to be trained: without dropout, its parameters in float32 where they are."""
    # Differs: what is computed in is settled when a Flax model is made.
    model: GPTJForCausalLM = GPTJForCausalLM.from_pretrained(
        directory, dtype=settings.dtype, param_dtype=settings.kept_dtype, mmap=False, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    return model


def trained_parameters(model: GPTJForCausalLM) -> dict[str, Array]:
    """The parameters that are trained, by their names in files: the adapter's at work, or all."""
    if model.active_adapter is not None:
        return {f"{name}.weight": array for name, array in flat(model.adapter_params).items()}
    return flat(model.params)


class TrainingStep:
    """See `gptj.finetune.loop.TrainingStep`.

    optax.scale_by_adam and optax.add_decayed_weights, masked, have the meaning said there; both corrections of a bias
    are rounded to float32. Mixed precision is the model's own `dtype`, over parameters that are float32, or beside an
    adapter of that dtype.
    """

    def __init__(self, model: GPTJForCausalLM, settings: Settings) -> None:
        if importlib.util.find_spec("optax") is None:
            raise BackendError("optax is not installed", where="gptj.flax.finetune", hint=install_line("finetune"))
        self.model = model
        self.parameters = trained_parameters(model)
        self.optimizer, self._update = compile_update(settings.weight_decay)
        # Differs: state and gradients are values, which each compiled function takes and gives.
        self._state = self._start(self.parameters)
        self._gradients: dict[str, Array] | None = None
        self._accumulate, self._evaluate = compile_losses(model.module)
        self._fixed: dict[str, Any] | None = None
        if model.active_adapter is not None:
            self._fixed = {"params": model.params, **model.adapter_variables()}

    def _start(self, parameters: dict[str, Array]) -> Any:
        """The optimizer's state before the first update."""
        return self.optimizer.init(parameters)

    def accumulate(self, ids: NDArray[Any], labels: NDArray[Any], *, factor: float) -> float:
        """Add `factor` times the gradient of a batch's mean loss to the gradient; returns that mean loss."""
        before, self._gradients = self._gradients, None
        loss, self._gradients = self._accumulate(self.parameters, before, self._fixed, ids, labels, np.float32(factor))
        return float(loss)

    def gradient_norm(self) -> float:
        """The norm of the whole gradient."""
        return float(norm_of(self._gradients))

    def update(self, rate: float, *, factor: float) -> None:
        """One update of AdamW by `factor` times the gradient, which is then none again."""
        gradients, self._gradients = self._gradients, None
        self.parameters, self._state = self._update(
            self.parameters, self._state, gradients, np.float32(rate), np.float32(factor)
        )

    def discard(self) -> None:
        """Let the gradient be none again, without an update."""
        self._gradients = None

    def evaluate(self, ids: NDArray[Any], labels: NDArray[Any]) -> float:
        """The mean loss of a batch."""
        return float(self._evaluate(self.parameters, self._fixed, ids, labels))

    def trained_model(self) -> GPTJForCausalLM:
        """The model, with its parameters as they are trained by now; the next update takes them away again."""
        if self._fixed is None:
            self.model.params = nested(self.parameters.items())
        else:
            self.model.adapter_params = adapter_tree(self.parameters)
        return self.model

    def read(self, name: str) -> NDArray[Any]:
        """A trained parameter by its name, in float32."""
        return to_numpy(self.parameters[name])

    def moments(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """AdamW's moments: "first.NAME" and "second.NAME" for each trained parameter."""
        adam = self._state[0]
        for name in self.parameters:
            yield f"first.{name}", to_numpy(adam.mu[name])
            yield f"second.{name}", to_numpy(adam.nu[name])

    def restore(self, moments: Mapping[str, NDArray[Any]], *, updates: int) -> None:
        """Go on from these moments, after so many updates."""
        adam, *others = self._state
        found = {
            field: {name: from_numpy(moments[f"{moment}.{name}"]) for name in self.parameters}
            for moment, field in (("first", "mu"), ("second", "nu"))
        }
        self._state = (adam._replace(count=jnp.asarray(updates, adam.count.dtype), **found), *others)


def adapter_tree(parameters: Mapping[str, Array]) -> dict[str, Any]:
    """An adapter's matrices as a model holds them."""
    return nested((name.removesuffix(".weight"), array) for name, array in parameters.items())


@functools.lru_cache(maxsize=8)
def compile_losses(module: Any) -> tuple[Any, Any]:
    """A module's loss with its gradient added to another, and its loss alone, compiled once for each shape.

    Both take the parameters that are trained, and beside an adapter's the variables that are not.
    """

    def mean_loss(
        parameters: dict[str, Array], fixed: dict[str, Any] | None, ids: Array, labels: Array, train: bool
    ) -> Array:
        if fixed is None:
            variables = {"params": nested(parameters.items())}
        else:
            variables = {**fixed, MATRICES: {"transformer": adapter_tree(parameters)}}
        return module.apply(variables, ids, labels=labels, train=train).loss

    def accumulate(
        parameters: dict[str, Array],
        before: dict[str, Array] | None,
        fixed: dict[str, Any] | None,
        ids: Array,
        labels: Array,
        factor: Array,
    ) -> tuple[Array, dict[str, Array]]:
        def scaled(parameters: dict[str, Array]) -> tuple[Array, Array]:
            loss = mean_loss(parameters, fixed, ids, labels, True)
            return loss * factor, loss

        (_, loss), gradients = jax.value_and_grad(scaled, has_aux=True)(parameters)
        return loss, gradients if before is None else jax.tree.map(jnp.add, before, gradients)

    return jax.jit(accumulate, donate_argnums=1), jax.jit(functools.partial(mean_loss, train=False))


@functools.lru_cache(maxsize=8)
def compile_update(weight_decay: float) -> tuple[Any, Any]:
    """The optimizer without its rate, and an update by it, which takes the place of parameters and state."""
    import optax

    optimizer = optax.chain(
        optax.scale_by_adam(BETA_1, BETA_2, EPSILON),
        optax.add_decayed_weights(weight_decay, lambda parameters: {k: v.ndim > 1 for k, v in parameters.items()}),
    )

    def update(
        parameters: dict[str, Array], state: Any, gradients: dict[str, Array], rate: Array, factor: Array
    ) -> tuple[dict[str, Array], Any]:
        gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
        updates, state = optimizer.update(gradients, state, parameters)
        return {name: value - rate * updates[name] for name, value in parameters.items()}, state

    return optimizer, jax.jit(update, donate_argnums=(0, 1))


@jax.jit
def norm_of(gradients: dict[str, Array]) -> Array:
    """The norm of all of them together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
