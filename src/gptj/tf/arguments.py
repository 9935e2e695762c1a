"""The arguments of a model call in TensorFlow, converted to tensors, checked, and made into what the blocks take.

Token ids, positions and masks become tensors, which the host checks where they have values. A graph has none when it
is traced: there the checks are claims, which it asserts when it runs. The attention mask becomes that of every query
over every key; and a cache of keys and values grows into the next one. Axes: b batch, t query time, s key time, h
head, d head width, m model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from gptj.calls import inputs
from gptj.calls.outputs import KVCache
from gptj.config import GPTJConfig
from gptj.errors import InputError

UpdateCache = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Takes a layer's new keys and values (b, h, t, d), and returns all that its queries attend over, (b, h, s, d)."""


def host(value: Any) -> NDArray[Any] | None:
    """The value as NumPy for the argument checks, or None while tf.function or Keras traces it."""
    if isinstance(value, keras.KerasTensor) or (tf.is_tensor(value) and tf.is_symbolic_tensor(value)):
        return None
    return np.asarray(value)


def as_ids(value: Any, *, where: str) -> Any:
    """Token ids or positions as an int64 tensor; anything but whole numbers is left for the checks."""
    if value is None or isinstance(value, keras.KerasTensor):
        return value
    if not tf.is_tensor(value):
        value = tf.convert_to_tensor(inputs.integers(value, where=where))
    return tf.cast(value, tf.int64) if value.dtype.is_integer else value


def as_tensor(value: Any, *, where: str) -> Any:
    """`value` as a tensor of its own dtype: lists and arrays are converted, tensors and None stay."""
    if value is None or tf.is_tensor(value) or isinstance(value, keras.KerasTensor):
        return value
    return tf.convert_to_tensor(inputs.numbers(value, where=where))


def check_traced_ids(value: Any, *, where: str) -> None:
    """Refuse ids of which a trace knows already that they are not whole numbers (b, t)."""
    if value is None or host(value) is not None:
        return
    dtype = tf.as_dtype(value.dtype)
    if not dtype.is_integer:
        raise InputError("not whole numbers", where=where, expected="an integer array", found=dtype.name)
    if len(value.shape) != 2:
        raise InputError(
            "of another shape", where=where, expected="(batch, tokens), neither 0", found=tuple(value.shape)
        )


def sizes(x: tf.Tensor) -> list[Any]:
    """The size of each axis: a number where it is known, else a scalar tensor."""
    known = x.shape.as_list()
    return [size if size is not None else tf.shape(x)[axis] for axis, size in enumerate(known)]


def batch_and_length(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """b and t of a call's arguments, None where a trace does not know them."""
    tokens = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]


def causal_mask(attention_mask: tf.Tensor | None, slots: tf.Tensor, length: Any) -> tf.Tensor:
    """The mask of every query over every key, bool (b or 1, 1, t, s): In at or before its own slot, where not padding.

    Args:
        attention_mask: (b, up to s) of 0 and 1; 1 In, 0 Out (padding). None: all In.
        slots: (t,) the slot of each query among the keys.
        length: s.
    """
    causal = tf.range(length) <= tf.expand_dims(slots, 1)  # no index: see `rotate_pairs`
    if attention_mask is None:
        return tf.expand_dims(tf.expand_dims(causal, 0), 0)
    keys = tf.cast(attention_mask, tf.bool)[:, :length]  # a mask may be as long as a fixed cache
    keys = tf.pad(keys, ((0, 0), (0, length - sizes(keys)[1])))
    return causal & tf.expand_dims(tf.expand_dims(keys, 1), 1)


def cache_length(past: KVCache | None) -> Any:
    """The number of the cache's slots that are filled: an int where it is known, else an int32 scalar."""
    if past is None:
        return 0
    if not past.fixed:
        return sizes(past.keys[0])[2]
    length = past.length
    if tf.is_tensor(length) and not tf.is_symbolic_tensor(length):
        return int(length)
    return tf.cast(length, tf.int32) if tf.is_tensor(length) else length


def key_length(past: KVCache | None, past_length: Any, new: Any) -> Any:
    """The number of keys that `new` queries attend over: those so far, or all slots where that is no number yet."""
    if past is not None and past.fixed and not isinstance(past_length, int):
        return sizes(past.keys[0])[-2]
    return past_length + new


class CacheBuilder:
    """The next cache while it is built: each layer's new keys and values, joined to those of the last cache.

    Args:
        past: the cache, or None.
    """

    def __init__(self, past: KVCache | None) -> None:
        self.past = past
        self.keys: list[tf.Tensor] = []
        self.values: list[tf.Tensor] = []

    def update_of(self, layer: int, use_cache: bool) -> UpdateCache:
        """The function that the layer's attention calls; with `use_cache` the result is part of the next cache."""

        def update_cache(k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            past = self.past
            if past is None:
                whole = k, v
            elif past.fixed:
                whole = self._write(past.keys[layer], k), self._write(past.values[layer], v)
                k, v = (self._used_slots(x, k) for x in whole)
            else:
                whole = k, v = tf.concat((past.keys[layer], k), 2), tf.concat((past.values[layer], v), 2)
            if use_cache:
                self.keys.append(whole[0])
                self.values.append(whole[1])
            return k, v

        return update_cache

    def _write(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        # Differs: a tensor cannot be written in place, so a fixed cache is a new one after each call; the compiled
        # steps of `generate` keep it in variables, which XLA does update in place.
        assert self.past is not None
        *rows, _, d = sizes(slots)  # (b, h), or (b * h,) in the compiled steps
        new = tf.reshape(new, (*rows, sizes(new)[2], d))
        return keras.ops.slice_update(slots, [*(0 for _ in rows), self.past.length, 0], new)

    def _used_slots(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        # Differs: in a compiled step the length is no number: queries get all slots, and the mask has empty ones Out.
        assert self.past is not None
        return slots[..., : self.past.length + new.shape[2], :] if isinstance(self.past.length, int) else slots

    def build(self, length: Any) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(tuple(self.keys), tuple(self.values), length, self.past is not None and self.past.fixed)


class Claim(NamedTuple):
    """One rule that a sound call keeps, in a graph.

    Attributes:
        rule: it in words.
        highest: the highest value allowed; the lowest is 0.
        values: those found.
        holds: bool in their shape, where each keeps the rule.
    """

    rule: str
    highest: Any
    values: tf.Tensor
    holds: tf.Tensor


def list_claims(
    config: GPTJConfig,
    length: Any,
    *,
    input_ids: tf.Tensor | None = None,
    token_type_ids: tf.Tensor | None = None,
    position_ids: tf.Tensor | None = None,
    attention_mask: tf.Tensor | None = None,
    past: KVCache | None = None,
) -> list[Claim]:
    """The claims about a call's values, `length` tokens a row; none where the host has seen them already."""
    if tf.executing_eagerly():
        return []
    found: list[tuple[str, Any, Any]] = [
        ("input_ids: no such token", config.vocab_size - 1, input_ids),
        ("token_type_ids: no such token", config.vocab_size - 1, token_type_ids),
        ("position_ids: no such position", config.n_positions - 1, position_ids),
    ]
    if attention_mask is not None and attention_mask.dtype != tf.bool:
        found.append(("attention_mask: not a mask", 1, attention_mask))
    past_length = cache_length(past)
    if position_ids is None:
        found.append(("input_ids: longer than the model's positions", config.n_positions, past_length + length))
    if past is not None and past.fixed:
        found.append(("past_key_values: the cache is full", sizes(past.keys[0])[-2], past_length + length))
    given = ((rule, highest, tf.convert_to_tensor(value)) for rule, highest, value in found if value is not None)
    return [
        Claim(rule, highest, values, _is_whole(values) & (values >= 0) & (values <= highest))
        for rule, highest, values in given
    ]


def _is_whole(value: tf.Tensor) -> tf.Tensor:
    """A mask of the numbers that are whole, bool in their shape: a float attention mask may hold others."""
    return value == tf.floor(value) if value.dtype.is_floating else tf.ones_like(value, tf.bool)


def assert_claims(claims: list[Claim]) -> list[Any]:
    """Operations that raise, with the first value that is wrong, where a claim does not hold.

    Differs: a graph has no values when it is traced, so this is no InputError but tf.errors.InvalidArgumentError.
    """
    assertions = []
    for rule, highest, values, holds in claims:
        # gather, since XLA would compile a slice anew for every value of its index
        first = tf.gather(tf.reshape(values, (-1,)), tf.argmax(tf.reshape(~holds, (-1,))))
        data = [f"{rule} (expected 0 to", highest, ", found", first, ")"]
        assertions.append(tf.debugging.Assert(tf.reduce_all(holds), data))
    return assertions


def assert_arguments(config: GPTJConfig, given: Mapping[str, Any]) -> None:
    """Make the graph raise where a call's arguments by name are wrong."""
    names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    assert_claims(list_claims(config, sizes(tokens)[1], **{name: given.get(name) for name in names}))


def fill_with_nan(x: tf.Tensor, claims: list[Claim]) -> tf.Tensor:
    """`x` (b, t, m), but NaN where a claim about its token, or about all, does not hold.

    XLA drops assertions, and would take an id that is too high for the highest that there is.
    """
    for claim in claims:
        # A mask is as long as the keys; where no size is known when it is traced, it may be longer than the tokens.
        of_tokens = len(claim.values.shape) == 2 and claim.values.shape[1] == x.shape[1]
        of_tokens = of_tokens and (x.shape[1] is not None or not claim.rule.startswith("attention_mask"))
        holds = tf.expand_dims(claim.holds, -1) if of_tokens else tf.reduce_all(claim.holds)
        x = tf.where(holds, x, tf.constant(math.nan, x.dtype))
    return x
