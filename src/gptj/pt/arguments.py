"""The arguments of a model call in PyTorch, converted to tensors, checked, and made into what the blocks take.

Token ids, positions and masks become tensors on the model's device, which the host checks where they have values; the
attention mask becomes that of every query over every key; and a cache of keys and values grows into the next one.
Axes: b batch, t query time, s key time, h head, d head width, m model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gptj.calls import inputs
from gptj.calls.outputs import KVCache
from gptj.config import GPTJConfig
from gptj.pt.weights import from_numpy, to_numpy

UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's new keys and values (b, h, t, d), and returns all that its queries attend over, (b, h, s, d)."""


def host(value: Any) -> NDArray[Any] | None:
    """The value as NumPy for the argument checks, or None while torch.compile, export or torch.func traces it."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return None
    if not isinstance(value, Tensor):
        return np.asarray(value)
    traced = value.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(value)
    return None if traced else to_numpy(value)


def as_ids(value: Any, *, where: str) -> Tensor | None:
    """Token ids or positions as an int64 tensor; anything but whole numbers is left for the checks."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.array(inputs.integers(value, where=where)))
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.to(torch.int64) if whole else value


def as_tensor(value: Any, *, where: str) -> Any:
    """Any other argument as a tensor of its own dtype, or None."""
    if value is None or isinstance(value, Tensor):
        return value
    return from_numpy(np.array(inputs.numbers(value, where=where)))


def place(value: Any, device: torch.device) -> Any:
    """The tensor on `device`; None stays None.

    Differs: PyTorch's arguments move to the model's device, after the checks, which thus wait for none.
    """
    return None if value is None else value.to(device)


class Call(NamedTuple):
    """The arguments of a model call as tensors, each None where it was not given.

    Attributes:
        input_ids: int64 (b, t).
        past_key_values: the cache.
        attention_mask: (b, cached + t) of 0 and 1.
        token_type_ids: int64 (b, t).
        position_ids: int64 (b, t) or (1, t).
        head_mask: (h,) or (n_layer, h).
        inputs_embeds: (b, t, m).
    """

    input_ids: Tensor | None
    past_key_values: KVCache | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    head_mask: Tensor | None
    inputs_embeds: Tensor | None


def convert_arguments(
    config: GPTJConfig,
    device: torch.device,
    input_ids: Any = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    inputs_embeds: Any = None,
) -> Call:
    """The arguments of a call as tensors on `device`, after the host has checked their values where they have any.

    Raises:
        InputError: see `gptj.calls.inputs.check_call`.
    """
    past = KVCache.of(past_key_values, config.n_layer)
    tensors = {
        "input_ids": as_ids(input_ids, where="input_ids"),
        "token_type_ids": as_ids(token_type_ids, where="token_type_ids"),
        "position_ids": as_ids(position_ids, where="position_ids"),
        "attention_mask": as_tensor(attention_mask, where="attention_mask"),
        "inputs_embeds": as_tensor(inputs_embeds, where="inputs_embeds"),
        "head_mask": as_tensor(head_mask, where="head_mask"),
    }
    inputs.check_call(config, host, **tensors, past=past)
    return Call(past_key_values=past, **{name: place(value, device) for name, value in tensors.items()})


def causal_mask(attention_mask: Tensor | None, slots: Tensor, length: int) -> Tensor:
    """The mask of every query over every key, bool (b or 1, 1, t, s): In at or before its own slot, where not padding.

    Args:
        attention_mask: (b, up to s) of 0 and 1; 1 In, 0 Out (padding). None: all In.
        slots: (t,) the slot of each query among the keys.
        length: s.
    """
    causal = torch.arange(length, device=slots.device) <= slots[:, None]
    if attention_mask is None:
        return causal[None, None]
    keys = F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
    return causal & keys[:, None, None]


def cache_length(past: KVCache | None) -> int:
    """The number of the cache's slots that are filled."""
    return 0 if past is None else past.length


class AttentionMask(NamedTuple):
    """The attention mask that every block takes.

    Attributes:
        values: bool (b or 1, 1, t, s), True In; None where each query attends over all keys.
        is_causal: whether it is the lower triangle alone: each query over its own key and those before it.
        lengths: of b rows with a query each, how many keys each sees, which are the first; None elsewhere.
    """

    values: Tensor | None
    is_causal: bool
    lengths: Sequence[int] | None = None

    @classmethod
    def of(cls, attention_mask: Tensor | None, slots: Tensor, length: int) -> AttentionMask:
        """The mask of the queries in `slots` over `length` keys; the arguments are `causal_mask`'s."""
        if attention_mask is None and len(slots) == 1:
            return cls(None, is_causal=False)
        is_causal = attention_mask is None and len(slots) == length
        return cls(causal_mask(attention_mask, slots, length), is_causal)


class JoinedCalls(NamedTuple):
    """The masks of several calls whose tokens are one stream (1, n, m); attention alone parts them.

    n is 1, or rounded up to a multiple of 8, as prompts' columns are, so that few numbers of rows are multiplied.

    Attributes:
        masks: of each call.
        shapes: (b, t) of each.
    """

    masks: Sequence[AttentionMask]
    shapes: Sequence[tuple[int, int]]

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """The calls' own (b, t, ...) as one stream (1, n, ...)."""
        rows = [part.flatten(0, 1) for part in parts]
        count = sum(map(len, rows))
        return torch.cat([*rows, rows[0].new_zeros(-count % 8 if count > 1 else 0, *rows[0].shape[1:])])[None]

    def part(self, stream: Tensor) -> list[Tensor]:
        """The calls' own (b, t, ...) of a stream (1, n, ...)."""
        parts = zip(stream[0].split(self._sizes(stream.shape[1])), self.shapes, strict=False)
        return [part.unflatten(0, shape) for part, shape in parts]

    def part_heads(self, x: Tensor) -> list[Tensor]:
        """The calls' own (b, h, t, d) of queries, keys or values (1, h, n, d)."""
        parts = zip(x.split(self._sizes(x.shape[2]), dim=2), self.shapes, strict=False)
        return [part if b == 1 else part[0].unflatten(1, (b, t)).transpose(0, 1) for part, (b, t) in parts]

    def _sizes(self, count: int) -> list[int]:
        """How many of the stream's tokens are each call's, and last, how many are nobody's."""
        sizes = [b * t for b, t in self.shapes]
        return [*sizes, count - sum(sizes)]

    def update_all(self, updates: Sequence[UpdateCache]) -> Callable[[Tensor, Tensor], Any]:
        """The calls' functions that take new keys and values, as one: it returns a tuple of keys and one of values."""

        def update_caches(k: Tensor, v: Tensor) -> Any:
            parts = zip(updates, self.part_heads(k), self.part_heads(v), strict=True)
            return zip(*(update(*its) for update, *its in parts), strict=True)

        return update_caches


class RowsCache(NamedTuple):
    """A fixed cache whose rows are filled to lengths of their own; each is given one token.

    Attributes:
        keys, values: n_layer of (b, h, capacity, d).
        slots: int64 (b,), where each row's token goes.
        seen: how many slots its query is given, of which its mask tells those that are the row's.
        lengths: how many slots are each row's, where a row must be computed alone to have the same bits among others.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    slots: Tensor
    seen: int
    lengths: Sequence[int] | None

    @classmethod
    def of(cls, cache: KVCache, slots: NDArray[np.int64]) -> RowsCache:
        """Those of a decoder's cache, with as many slots seen as let PyTorch's kernel sum each row in one order.

        It sums by vectors of 16, so what lies behind a row's last must fill one. In float32 its sums also follow how
        its thread's memory is aligned, and each thread's begins behind `seen` + 2 + d numbers of the one before, for
        512 slots and fewer.
        """
        keys, longest = cache.keys[0], int(slots.max()) + 1
        width, capacity = keys.shape[3], keys.shape[2]
        lengths = None
        if keys.dtype.itemsize == 2:
            seen = min(-(-longest // 64) * 64, capacity)
        else:
            seen = -(-(longest + 16) // 64) * 64 - (2 + width) % 16
            if seen > min(512, capacity):
                seen, lengths = longest, (slots + 1).tolist()
        return cls(cache.keys, cache.values, torch.from_numpy(slots), seen, lengths)

    @property
    def mask(self) -> AttentionMask:
        """The mask of each row's query over the slots that are seen."""
        values = torch.arange(self.seen) <= self.slots[:, None]
        return AttentionMask(values[:, None, None], is_causal=False, lengths=self.lengths)

    def update_of(self, layer: int) -> UpdateCache:
        """The function that the layer's attention calls, with (b, h, 1, d); it returns what is seen, (b, h, s, d)."""

        def update_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.arange(len(k), device=k.device)
            held = self.keys[layer].narrow(0, 0, len(k)), self.values[layer].narrow(0, 0, len(k))
            for slots, new in zip(held, (k, v), strict=True):
                slots[rows, :, self.slots] = new[:, :, 0]
            return held[0].narrow(2, 0, self.seen), held[1].narrow(2, 0, self.seen)

        return update_cache


class CacheBuilder:
    """The next cache while it is built: each layer's new keys and values, joined to those of the last cache.

    Args:
        past: the cache, or None. A fixed one is written in place, from its length on.
    """

    def __init__(self, past: KVCache | None) -> None:
        self.past = past
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update_of(self, layer: int, use_cache: bool = False) -> UpdateCache:
        """The function that the layer's attention calls; with `use_cache` the result is part of the next cache."""

        def update_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            past = self.past
            if past is None:
                whole = k, v
            elif past.fixed:
                whole, start, count = (past.keys[layer], past.values[layer]), past.length, k.shape[2]
                for slots, new in zip(whole, (k, v), strict=True):
                    slots.narrow(2, start, count).copy_(new)
                k, v = (x.narrow(2, 0, start + count) for x in whole)
            else:
                whole = k, v = torch.cat((past.keys[layer], k), dim=2), torch.cat((past.values[layer], v), dim=2)
            if use_cache:
                self.keys.append(whole[0])
                self.values.append(whole[1])
            return k, v

        return update_cache

    def build(self, length: int) -> KVCache:
        """The cache after this call, `length` tokens long."""
        return KVCache(tuple(self.keys), tuple(self.values), length, self.past is not None and self.past.fixed)
