"""The two steps under generation, prefill and one token, over a preallocated cache; the loop is `gptj.generation`'s.

Both are one function that XLA compiles, once for each shape: a prompt's length is rounded up to a power of two and
so is the cache's capacity, so that few shapes are met. What pads them is masked, and overwritten when its slot is
taken; no result changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from gptj import generation
from gptj.generation import Step
from gptj.outputs import KVCache
from gptj.tf.model import at_least_float32
from gptj.tf.weights import to_numpy

FEWEST_COLUMNS = 8
"""The shortest compiled prompt, unless it is one token."""

FEWEST_SLOTS = 64
"""The smallest compiled cache."""


class Decoder(generation.Decoder):
    """A GPTJForCausalLM with a cache of its own, fed by the loop of `gptj.generation`.

    Args:
        model: the model.
        batch: rows.
        capacity: the most tokens a row will have.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        super().__init__(model.config, batch, capacity)
        self.model = model
        self.compiled = CompiledModel.of(model)
        slots = min(power_of_two(capacity, FEWEST_SLOTS), model.config.n_positions)
        # Differs: the cache is variables of rank 3. XLA updates those in place; a fourth axis makes it copy the whole
        # cache at every step (measured: 184 ms a step, against 52).
        shape = (batch * model.config.n_head, slots, model.config.head_dim)
        self.keys, self.values = (
            tuple(tf.Variable(tf.zeros(shape, model.compute_dtype)) for _ in range(model.config.n_layer))
            for _ in range(2)
        )

    def _run(
        self,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        offset: int,
        *,
        last_only: bool,
        want: frozenset[str],
    ) -> Step:
        columns, slots = token_ids.shape[1], self.keys[0].shape[1]
        width = 1 if columns == 1 else min(power_of_two(columns, FEWEST_COLUMNS), slots - offset)
        padding = ((0, 0), (0, width - columns))
        run = self.compiled.function(
            (self.batch, slots, width), last_only=last_only, weigh="attentions" in want, trace="hidden_states" in want
        )
        logits, hidden_states, attentions = run(
            self.keys,
            self.values,
            tf.constant(np.pad(token_ids, padding)),
            tf.constant(np.pad(position_ids, padding)),
            tf.constant(np.pad(mask, ((0, 0), (0, slots - mask.shape[1])))),
            tf.constant(offset),
            tf.constant(columns - 1),
        )
        return Step(
            logits=to_numpy(logits) if last_only else to_numpy(logits)[:, :columns],
            hidden_states=None if hidden_states is None else tuple(to_numpy(x)[:, :columns] for x in hidden_states),
            attentions=None
            if attentions is None
            else tuple(to_numpy(x)[:, :, :columns, : offset + columns] for x in attentions),
        )

    def _gather(self, rows: NDArray[np.int64]) -> None:
        h = self.config.n_head
        every_head = (rows[:, None] * h + np.arange(h)).reshape(-1)
        self.keys, self.values = (
            tuple(tf.Variable(tf.gather(variable, every_head)) for variable in side)
            for side in (self.keys, self.values)
        )


def power_of_two(number: int, fewest: int) -> int:
    """The smallest power of two that is at least `number` and `fewest`.

    >>> power_of_two(5, 1), power_of_two(8, 1), power_of_two(3, 64)
    (8, 8, 64)
    """
    return 1 << (max(number, fewest) - 1).bit_length()


class CompiledModel:
    """A model's next logits over a cache in variables, compiled by XLA once for each shape.

    Attributes:
        weights: the variables that were compiled in; a model that has got others is compiled anew.
        functions: what is compiled, by shape and by what it returns.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = list(model.weights)
        self.functions: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, model: Any) -> CompiledModel:
        """The model's own, kept with it from one decoder to the next."""
        kept: CompiledModel | None = getattr(model, "_compiled", None)
        weights = model.weights
        same = kept is not None and len(kept.weights) == len(weights)
        if kept is None or not same or any(a is not b for a, b in zip(kept.weights, weights, strict=True)):
            kept = model._compiled = cls(model)
        return kept

    def function(self, shape: tuple[int, ...], **options: Any) -> Any:
        """The compiled function for these sizes; `_run` says what it takes and gives.

        One for each, since TensorFlow warns of a function that meets many shapes.
        """
        key = (*shape, *options.items())
        if key not in self.functions:
            self.functions[key] = tf.function(
                lambda *arguments: self._run(*arguments, **options), jit_compile=True, autograph=False
            )
        return self.functions[key]

    def _run(
        self,
        keys: tuple[tf.Variable, ...],
        values: tuple[tf.Variable, ...],
        token_ids: tf.Tensor,
        position_ids: tf.Tensor,
        mask: tf.Tensor,
        offset: tf.Tensor,
        last: tf.Tensor,
        *,
        last_only: bool,
        weigh: bool,
        trace: bool,
    ) -> tuple[Any, ...]:
        outputs = self.model.transformer.call(
            token_ids,
            KVCache(keys, values, offset, fixed=True),
            mask,
            position_ids=position_ids,
            use_cache=True,
            output_attentions=weigh,
            output_hidden_states=trace,
            return_dict=True,
        )
        cache = outputs.past_key_values
        for variable, value in zip((*keys, *values), (*cache.keys, *cache.values), strict=True):
            variable.assign(value)
        x = outputs.last_hidden_state
        logits = at_least_float32(self.model.lm_head(tf.gather(x, last, axis=1) if last_only else x))
        return logits, outputs.hidden_states, outputs.attentions


class GenerationMixin(generation.Generates):
    """`generate` and `stream` for a TensorFlow model."""

    def _decoder(self, batch: int, capacity: int) -> Decoder:
        return Decoder(self, batch, capacity)

    def _host(self, array: Any) -> NDArray[Any]:
        return to_numpy(array)

    def _native(self, array: NDArray[Any]) -> tf.Tensor:
        return tf.constant(array)
