"""The arguments of a model call in Flax, converted to arrays, checked, and made into what the blocks take.

Token ids, positions and masks become arrays, which the host checks where they have values; the attention mask becomes
that of every query over every key; and a cache of keys and values grows into the next one. The flags that say what a
call returns are part of what is compiled. Axes: b batch, t query time, s key time, h head, d head width, m model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from numpy.typing import NDArray

from gptj.calls import inputs
from gptj.calls.outputs import KVCache, object_or_tuple
from gptj.calls.prepared import refusal
from gptj.calls.taps import OVER_KEYS, TapCollector, split_tap
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.flax.weights import Params, check_params
from gptj.generation.decoder import built_alike

UpdateCache = Callable[[Array, Array], tuple[Array, Array]]
"""Takes a layer's new keys and values (b, h, t, d), and returns all that its queries attend over, (b, h, s, d)."""


def host(value: Any) -> NDArray[Any] | None:
    """The value as NumPy for the argument checks.

    While jax traces (jit, grad, vmap), an array has a shape and a dtype but no values: zeros stand in for them, so
    that shapes and dtypes are checked there too. A traced scalar, a cache's length, has nothing to check: None.
    """
    if not isinstance(value, jax.core.Tracer):
        return np.asarray(value)
    return np.broadcast_to(np.zeros((), value.dtype), value.shape) if value.shape else None


def as_ids(value: Any, *, where: str) -> Any:
    """Token ids or positions as an array; anything but whole numbers is left for the checks."""
    if value is None or isinstance(value, jax.Array):
        return value
    return inputs.integers(value, where=where)


def as_array(value: Any, *, where: str) -> Any:
    """Any other argument as an array, or None."""
    if isinstance(value, KVCache):  # which stood second before the order of the seed page's calls was followed
        raise InputError("a cache, not an array", where=where, hint="Pass it by name: past_key_values=...")
    return value if value is None or isinstance(value, jax.Array) else inputs.numbers(value, where=where)


def convert_arguments(
    config: GPTJConfig,
    input_ids: Any = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
) -> dict[str, Any]:
    """The arguments of a call as arrays by name, after the host has looked at their values where they have any.

    Raises:
        InputError: see `gptj.calls.inputs.check_call`.
    """
    past = KVCache.of(past_key_values, config.n_layer)
    arguments = {
        "input_ids": as_ids(input_ids, where="input_ids"),
        "attention_mask": as_array(attention_mask, where="attention_mask"),
        "token_type_ids": as_ids(token_type_ids, where="token_type_ids"),
        "position_ids": as_ids(position_ids, where="position_ids"),
        "head_mask": as_array(head_mask, where="head_mask"),
        "inputs_embeds": as_array(inputs_embeds, where="inputs_embeds"),
    }
    if past is not None and not past.fixed:
        past = dataclasses.replace(past, length=past.capacity)
    inputs.check_call(config, host, **arguments, past=past)
    return arguments | {"past_key_values": past}


def batch_and_length(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """b and t of a call's arguments."""
    ids, embeds = arguments["input_ids"], arguments["inputs_embeds"]
    b, t = (embeds if ids is None else ids).shape[:2]
    return int(b), int(t)


def causal_mask(attention_mask: Array | None, slots: Array, length: int) -> Array:
    """The mask of every query over every key, bool (b or 1, 1, t, s): In at or before its own slot, where not padding.

    Args:
        attention_mask: (b, up to s) of 0 and 1; 1 In, 0 Out (padding). None: all In.
        slots: (t,) the slot of each query among the keys.
        length: s.
    """
    causal = jnp.arange(length) <= slots[:, None]
    if attention_mask is None:
        return causal[None, None]
    keys = jnp.pad(attention_mask.astype(bool), ((0, 0), (0, length - attention_mask.shape[1])))
    return causal & keys[:, None, None]


def cache_length(past: KVCache | None) -> Any:
    """The number of the cache's slots that are filled, a scalar."""
    return 0 if past is None else past.length if past.fixed else past.capacity


def key_length(past: KVCache | None, past_length: Any, new: int) -> Any:
    """The number of keys that `new` queries attend over: those so far, or all slots of a fixed cache."""
    return past.capacity if past is not None and past.fixed else past_length + new


class CacheBuilder:
    """The next cache while it is built: each layer's new keys and values, joined to those of the last cache.

    Args:
        past: the cache, or None.
        slots: (t,) where the new tokens go in a fixed cache.
    """

    def __init__(self, past: KVCache | None, slots: Array) -> None:
        self.past, self.slots = past, slots
        self.keys: list[Array] = []
        self.values: list[Array] = []

    def update_of(self, layer: int, use_cache: bool) -> UpdateCache:
        """The function that the layer's attention calls; with `use_cache` the result is part of the next cache."""

        def update_cache(k: Array, v: Array) -> tuple[Array, Array]:
            past = self.past
            if past is not None:
                _require_dtype(past.keys[layer], k)
            if past is not None and past.fixed:
                # Differs: a new array, and all slots of it, since a shape cannot hang on the length; the mask hides
                # those not filled. XLA would move a write that does not fit to where it does: NaN rather than that.
                k = jnp.where(self.slots[-1] < past.capacity, k, jnp.nan)
                k, v = (
                    lax.dynamic_update_slice_in_dim(old, new, self.slots[0], axis=2)
                    for old, new in ((past.keys[layer], k), (past.values[layer], v))
                )
            elif past is not None:
                k, v = jnp.concatenate((past.keys[layer], k), 2), jnp.concatenate((past.values[layer], v), 2)
            if use_cache:
                self.keys.append(k)
                self.values.append(v)
            return k, v

        return update_cache

    def build(self, length: Any) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(tuple(self.keys), tuple(self.values), length, self.past is not None and self.past.fixed)


def _require_dtype(old: Array, new: Array) -> None:
    if old.dtype != new.dtype:  # jax would widen the one or narrow the other
        raise InputError("a cache of another dtype", where="past_key_values", expected=new.dtype, found=old.dtype)


def choose_flags(
    config: GPTJConfig,
    use_cache: bool | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    train: bool,
) -> dict[str, bool]:
    """The flags of a call by name, each the config's where it is None: they are part of what is compiled."""
    flags = inputs.output_flags(config, use_cache, output_attentions, output_hidden_states)
    names = ("use_cache", "output_attentions", "output_hidden_states", "train")
    return dict(zip(names, (*flags, bool(train)), strict=True))


_BUILT_ALONE = ("base", "causal_lm")
"""Heads whose modules read no field of the config but those that they are built by."""


@functools.lru_cache(maxsize=256)
def _alike(module: nn.Module) -> nn.Module:
    """The module of all models that are built alike, so that they share what is compiled."""
    return module.clone(config=built_alike(module.config))


@functools.lru_cache(maxsize=256)
def compile_module(module: nn.Module, **flags: bool) -> Callable[..., Any]:
    """`module` with these flags as a function (variables, arguments, dropout_rng), compiled once for each shape."""

    def run(variables: Params, arguments: Mapping[str, Any], dropout_rng: Array | None) -> Any:
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        return module.apply(variables, **arguments, **flags, rngs=rngs)

    return jax.jit(run)


def compute(
    model: Any,
    arguments: dict[str, Any],
    flags: dict[str, bool],
    *,
    return_dict: bool | None,
    params: Params | None,
    dropout_rng: Any,
) -> Any:
    """The outputs of the model's module for checked arguments, as an object or as its tuple."""
    config, adapter = model.config, model.adapters.get(model.active_adapter)
    rates = (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop, adapter.lora_dropout if adapter else 0)
    if flags["train"] and dropout_rng is None and max(rates) > 0:
        raise InputError("needed for dropout", where="dropout_rng", expected="a jax random key", found="None")
    if params is not None and model.fast_path is None:
        check_params(params, config, model.head)
    if model.placement is not None:
        from gptj.flax.parallel import spread_rows

        arguments = spread_rows(arguments, model.placement)
    past: KVCache | None = arguments.get("past_key_values")
    if past is not None:
        flags = flags | {"use_cache": True}  # a cache that was handed in comes back
    if past is not None and not isinstance(past.length, Array):
        arguments = arguments | {"past_key_values": dataclasses.replace(past, length=np.int32(past.length))}
    if model.fast_path is None:
        run = compile_module(_alike(model.module) if model.head in _BUILT_ALONE else model.module, **flags)
        variables = {"params": model.params if params is None else params, **model.adapter_variables()}
        output = run(variables, arguments, dropout_rng)
    else:
        output = _compute_prepared(model, arguments, params=params, **flags)
    _trim_to_length(output, past, batch_and_length(arguments)[1])
    return object_or_tuple(output, return_dict, default=config.return_dict)


@functools.lru_cache(maxsize=64)
def compile_taps(module: nn.Module, names: frozenset[str]) -> Callable[..., dict[str, Array]]:
    """The taps `names` of `module` as a function (variables, arguments, labels), compiled once for each shape."""

    def run(variables: Params, arguments: Mapping[str, Any], labels: Array | None) -> dict[str, Array]:
        taps = TapCollector(names)

        def collect(module: Any) -> None:
            hidden = getattr(module, "transformer", module)(**arguments, taps=taps).last_hidden_state
            if taps.asks("logits", "loss"):
                logits, loss = module.next_tokens(hidden, labels)
                taps(logits=logits, loss=loss)

        module.apply(variables, method=collect)
        return taps.kept

    return jax.jit(run)


def collect_taps(
    model: Any, collector: TapCollector, arguments: dict[str, Any], labels: Any, params: Params | None
) -> None:
    """Give the collector the taps of the model's module for checked arguments.

    Keys beyond a fixed cache's length are cut off where that is known.
    """
    if params is not None:
        check_params(params, model.config, model.head)
    past: KVCache | None = arguments["past_key_values"]
    known = None if past is None else host(past.length)
    if past is not None and known is not None:
        arguments = arguments | {"past_key_values": dataclasses.replace(past, length=np.int32(known))}
    run = compile_taps(model.module, collector.names)
    variables = {"params": model.params if params is None else params, **model.adapter_variables()}
    collector.kept |= run(variables, arguments, labels)
    if past is not None and past.fixed and known is not None:
        length = int(known) + batch_and_length(arguments)[1]
        for name, value in collector.kept.items():
            if split_tap(name)[1] in OVER_KEYS:
                collector.kept[name] = value[..., :length]


def _compute_prepared(
    model: Any, arguments: dict[str, Any], *, params: Params | None, train: bool, **asked: bool
) -> Any:
    """The output of a model's fast path, which has parameters of its own and does not train."""
    for act, wanted in (("train", train), ("params", params is not None)):
        if wanted:
            raise refusal(act)
    return model.fast_path(arguments, **asked)


def _trim_to_length(output: Any, past: KVCache | None, new: int) -> None:
    """Make the cache's length a plain number again, where it is known, and cut the slots beyond it off the weights."""
    past_length = 0 if past is None else host(past.length)
    if past_length is None:
        return
    length = int(past_length) + new
    if getattr(output, "past_key_values", None) is not None:
        output.past_key_values.length = length
    if output.attentions is not None and past is not None and past.fixed:
        output.attentions = tuple(weights[..., :length] for weights in output.attentions)
