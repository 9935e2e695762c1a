"""Generation with a cut TensorFlow model, whose cache is cut as it is.

Differs: XLA compiles nothing over DTensors, no slice of which can be written, so a cut model has its own decoder.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.experimental import dtensor

from gptj import generation
from gptj.calls.outputs import KVCache
from gptj.generation import Step
from gptj.generation.decoder import Ids, Mask, round_up_slots
from gptj.sharding import Placement, check_rows
from gptj.tf.arguments import CacheBuilder, causal_mask
from gptj.tf.layers import at_least_float32
from gptj.tf.parallel import run_over_mesh, whole


class MaskedCache(CacheBuilder):
    """The next cache, of which DTensor can write no slice: every slot is chosen, the new one or the old one."""

    def __init__(self, past: KVCache, chosen: tf.Tensor) -> None:
        super().__init__(past)
        self.chosen = chosen

    def _write(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        chosen = tf.cast(self.chosen, slots.dtype)  # (t, s), one column of 1 for each new token
        kept = tf.reshape(1 - tf.reduce_sum(chosen, 0), (1, 1, -1, 1))
        return slots * kept + tf.einsum("ts,bhtd->bhsd", chosen, tf.cast(new, slots.dtype))

    def _used_slots(self, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        return slots


class ParallelDecoder(generation.Decoder):
    """A cut GPTJForCausalLM with a cache that is cut as it is: heads along tp, rows along dp.

    Args:
        model: the model.
        batch: rows.
        capacity: the most tokens a row will have.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__(model.config, batch, capacity)
        placement: Placement = model.placement
        check_rows(batch, placement)
        self.model, self.placement = model, placement
        self.slots = round_up_slots(model.config, capacity)
        shape = (batch, model.config.n_head, self.slots, model.config.head_dim)
        cuts = ["dp", "tp" if placement.strategy == "tp" else dtensor.UNSHARDED, *[dtensor.UNSHARDED] * 2]
        self.layout = dtensor.Layout(cuts, placement.native)
        make = functools.partial(dtensor.call_with_layout, tf.zeros, self.layout, shape, model.compute_dtype)
        self.keys, self.values = (tuple(make() for _ in range(model.config.n_layer)) for _ in range(2))

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        columns, slots = token_ids.shape[1], self.slots
        token_ids, position_ids, mask = self._pad(token_ids, position_ids, mask, offset)
        width = token_ids.shape[1]
        chosen = np.zeros((width, slots), np.float32)
        chosen[np.arange(width), offset + np.arange(width)] = 1
        seen = np.asarray(causal_mask(tf.constant(mask), tf.range(offset, offset + width), slots))
        last = np.zeros((1, width, 1), np.float32)
        last[0, columns - 1] = 1
        asked: dict[str, Any] = {name: name in want for name in ("attentions", "hidden_states")}
        asked["last_only"] = last_only
        key = ("decode", self.batch, width, slots, *asked.items())
        arguments = (token_ids, position_ids, seen, chosen, last)
        run = functools.partial(_decode, self.model, self.layout, **asked)
        self.keys, self.values, logits, hidden, attentions = run_over_mesh(
            self.model, key, run, self.keys, self.values, *arguments, batch=self.batch
        )
        held = self._fetch(logits)
        return Step.of(
            held if last_only else held[:, :columns], hidden, attentions,
            fetch=self._fetch, columns=columns, length=offset + columns,
        )  # fmt: skip

    def _fetch(self, array: Any) -> NDArray[Any]:
        values: NDArray[Any] = whole(array, self.placement).numpy()
        return values

    def _gather(self, rows: NDArray[np.int64]) -> None:
        check_rows(len(rows), self.placement)
        taken = np.zeros((len(rows), self.batch), np.float32)
        taken[np.arange(len(rows)), rows] = 1

        layout = self.layout  # the graph outlives this decoder

        def run(sides: Any, taken: Any) -> Any:
            def take(x: Any) -> Any:
                return dtensor.relayout(tf.einsum("rb,bhsd->rhsd", tf.cast(taken, x.dtype), x), layout)

            return tf.nest.map_structure(take, sides)

        key = ("gather", *taken.shape, self.slots)
        self.keys, self.values = run_over_mesh(self.model, key, run, (self.keys, self.values), taken)

    def _filled(self, length: int) -> KVCache[Any]:
        keys, values = (
            tuple(whole(x, self.placement)[:, :, :length] for x in side) for side in (self.keys, self.values)
        )
        return KVCache(keys, values, length)


def _decode(
    model: Any,
    layout: Any,
    keys: tuple[Any, ...],
    values: tuple[Any, ...],
    token_ids: Any,
    position_ids: Any,
    mask: Any,
    chosen: Any,
    last: Any,
    *,
    attentions: bool,
    hidden_states: bool,
    last_only: bool,
) -> tuple[Any, ...]:
    """The next cache, of the layout, the logits, and where asked the hidden states and attentions."""
    base = model.transformer
    cache = MaskedCache(KVCache(keys, values, 0, fixed=True), chosen)
    rotation = base.rotary(position_ids)
    hidden, weighed = [base.wte(token_ids)], []
    for n, block in enumerate(base.h):
        x, weights = block(
            hidden[-1],
            rotation=rotation,
            attention_mask=mask,
            update_cache=cache.update_of(n, True),
            head_mask=None,
            seeds=None,
        )
        hidden.append(x)
        weighed.append(weights)
    x = hidden[-1] = base.ln_f(hidden[-1])
    if last_only:  # of the column `last`, which DTensor would not gather
        x = tf.reduce_sum(x * tf.cast(last, x.dtype), 1)
    logits = at_least_float32(model.lm_head(x))
    keys, values = (tuple(dtensor.relayout(x, layout) for x in side) for side in (cache.keys, cache.values))
    return keys, values, logits, tuple(hidden) if hidden_states else None, tuple(weighed) if attentions else None
