"""LoRA adapters in Flax: what a layer adds, and the hooks of `gptj.pretrained.adapted`.

An adapter's matrices are a collection of variables of their own beside "params", in the same places: a module that is
given none computes the base alone. Its scale and dropout are another, so that an optimizer sees the matrices only.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax
from numpy.typing import NDArray

from gptj.adapters import AdapterConfig, AdapterRow
from gptj.errors import InputError, SchemaError
from gptj.pretrained.adapted import HeldAdapters

MATRICES, FACTS = "adapter", "adapter_facts"
"""The two collections: "lora_A" and "lora_B" of a layer, and its "scale" and where there is one "dropout"."""


class LowRank:
    """scale B A of the adapter at work, beside the weight of a module that has variables.

    Where devices share the sum over the weight's columns, they share that over A's: the result is in as many parts.

    Args:
        linear: the module, bound to its variables.
    """

    # Differs: no module, since the layer's own collections hold the matrices.
    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    def __call__(self, x: Array, y: Array, train: bool = False) -> Array:
        """`y`, the product of `x` (..., in), with what the adapter adds in its own precision.

        It is (..., out), or (parts, ..., out).
        """
        linear = self.linear
        if not linear.has_variable(MATRICES, "lora_A"):
            return y
        a, b = linear.get_variable(MATRICES, "lora_A"), linear.get_variable(MATRICES, "lora_B")
        x = x.astype(a.dtype)
        if train and linear.has_variable(FACTS, "dropout"):
            rate = linear.get_variable(FACTS, "dropout")
            kept = jax.random.bernoulli(linear.make_rng("dropout"), 1 - rate, x.shape)
            x = jnp.where(kept, x / (1 - rate), 0)
        scale = jnp.asarray(linear.get_variable(FACTS, "scale"), a.dtype)
        return (y + scale * _product(_narrow(x, a, linear.parts), b)).astype(y.dtype)


def _narrow(x: Array, a: Array, parts: int) -> Array:
    """A `x`, or (parts, ..., r) of it, each part where its columns of A are."""
    if parts == 1:
        return _product(x, a)
    cut = (x.reshape(*x.shape[:-1], parts, -1), a.reshape(len(a), parts, -1))
    contracted = ((x.ndim,), (2,)), ((x.ndim - 1,), (1,))
    return lax.dot_general(*cut, contracted, precision=lax.Precision.HIGHEST)


def _product(x: Array, weight: Array) -> Array:
    contracted = ((x.ndim - 1,), (1,)), ((), ())
    return lax.dot_general(x, weight, contracted, precision=lax.Precision.HIGHEST)


class AdapterMixin:
    """The hooks of `gptj.pretrained.adapted.Adapted`: an adapter's matrices are nested dicts of their own."""

    _held_adapters: HeldAdapters | None
    _adapted_strategies = frozenset({"tp", "dp"})

    @property
    def adapter_params(self) -> Mapping[str, Any]:
        """The matrices of the adapter at work: nested dicts, `["h"]["0"]["attn"]["q_proj"]["lora_A"]`.

        Differs: parameters are data in Flax, and what is trained is held apart from what is not: `params` stays the
        base, and this is the tree for optax. See `with_adapter_params`.

        Raises:
            InputError: no adapter is at work; on assignment, the tree is not this adapter's.
        """
        found: Mapping[str, Any] = self._adapters.arrays[self._working()][MATRICES]
        return found

    @adapter_params.setter
    def adapter_params(self, tree: Mapping[str, Any]) -> None:
        name = self._working()
        check_tree(tree, self.adapter_params)
        self._adapters.arrays[name] = {**self._adapters.arrays[name], MATRICES: tree}
        self._activate_adapter(name)

    def with_adapter_params(self, tree: Mapping[str, Any]) -> Self:
        """The same model over the same parameters, with these matrices in the place of those of the adapter at work.

        A pure function of `tree`: `jax.grad(lambda tree: model.with_adapter_params(tree)(ids, labels=ids).loss)`.

        Raises:
            InputError: no adapter is at work, or the model is prepared for inference.
            SchemaError: the tree is not this adapter's.
        """
        own: Any = self
        own._refuse_prepared("with_adapter_params")
        name, held = self._working(), self._adapters
        check_tree(tree, self.adapter_params)
        model: Any = copy.copy(self)
        arrays = {**held.arrays, name: {**held.arrays[name], MATRICES: tree}}
        model._held_adapters = dataclasses.replace(held, arrays=arrays)
        found: Self = model
        return found

    def adapter_variables(self) -> dict[str, Any]:
        """The collections to hand to `module.apply` beside "params"; none where no adapter is at work."""
        held = self._adapters
        if held.active is None:
            return {}
        bare = self.head == "base"  # type: ignore[attr-defined]
        trees = held.arrays[held.active]
        return {name: trees[name] if bare else {"transformer": trees[name]} for name in (MATRICES, FACTS)}

    # Differs: GPTJModel inside a head is made anew whenever it is asked for.
    @property
    def _adapters(self) -> HeldAdapters:
        assert self._held_adapters is not None  # made with the model
        return self._held_adapters

    def _hold_adapter(
        self, name: str, config: AdapterConfig, arrays: list[tuple[AdapterRow, NDArray[Any], NDArray[Any]]]
    ) -> None:
        from gptj.flax.parallel import cut_tensor

        placement = self.placement  # type: ignore[attr-defined]
        matrices, facts = {}, {}
        for row, a, b in arrays:
            path = tuple(row.module.split("."))
            for leaf, spec, array in (("lora_A", row.a, a), ("lora_B", row.b, b)):
                whole = placement is None
                matrices[*path, leaf] = jax.device_put(array) if whole else cut_tensor(array, spec, placement)
            facts[*path, "scale"] = np.asarray(row.scale, a.dtype)
            if config.lora_dropout:
                facts[*path, "dropout"] = np.asarray(config.lora_dropout, np.float32)
        trees = {MATRICES: matrices, FACTS: facts}
        held = {kind: traverse_util.unflatten_dict(flat) for kind, flat in trees.items()}
        self._adapters.arrays[name] = held

    def _read_adapter(self, name: str, row: AdapterRow) -> tuple[NDArray[Any], NDArray[Any]]:
        place = self._adapters.arrays[name][MATRICES]
        for part in row.module.split("."):
            place = place[part]
        return np.asarray(place["lora_A"]), np.asarray(place["lora_B"])

    def _activate_adapter(self, name: str | None) -> None:
        model: Any = self
        if model.fast_path is not None:
            model.fast_path = model.fast_path.adapted(self.adapter_variables())

    def _drop_adapter(self, name: str) -> None:
        self._adapters.arrays.pop(name, None)

    # Differs: what is trained is what an optimizer is given.
    def _let_adapter_train(self, name: str, trains: bool) -> None:
        return None

    def _freeze_base(self) -> None:
        return None

    def _let_base_train(self, before: Any) -> None:
        return None

    def _working(self) -> str:
        """The name of the adapter at work.

        Raises:
            InputError: there is none.
        """
        active = self._adapters.active
        if active is None:
            raise InputError("no adapter is at work", where="adapter_params", hint="See add_adapter and set_adapter")
        return active


def check_tree(tree: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Refuse nested dicts that have other places or shapes than those of an adapter.

    Raises:
        SchemaError: naming the first that differ.
    """
    found, expected = (
        {".".join(path): tuple(np.shape(leaf)) for path, leaf in traverse_util.flatten_dict(dict(one)).items()}
        for one in (tree, like)
    )
    odd: Iterable[str] = (name for name in {**expected, **found} if found.get(name) != expected.get(name))
    if (name := next(iter(odd), None)) is not None:
        raise SchemaError(
            "not this adapter's", where=f"adapter_params: {name}", expected=expected.get(name), found=found.get(name)
        )
