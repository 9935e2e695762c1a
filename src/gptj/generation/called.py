"""A decoder of plain model calls, for prompts that are more than token ids: embeddings, token types, a head mask.

The wings' own decoders run steps that are compiled for token ids. What comes up once in a thousand calls is computed by
the model's public call over a fixed cache: slower by what the compiled step saves, and the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.calls.outputs import KVCache
from gptj.config import GPTJConfig
from gptj.generation.decoder import Decoder, Ids, Mask, Step
from gptj.generation.held import HeldLogits

__all__ = ["CalledDecoder", "CalledModel", "Conditions"]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Inputs of a model besides token ids, in NumPy on the host.

    Attributes:
        inputs_embeds: (b, t, m), in place of the first t columns' token embeddings.
        token_type_ids: int64 (b, t), whose embeddings are added; the last one is every new token's too.
        head_mask: (h,) or (n_layer, h), in every call.
    """

    inputs_embeds: NDArray[Any] | None = None
    token_type_ids: Ids | None = None
    head_mask: NDArray[Any] | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.inputs_embeds, self.token_type_ids, self.head_mask))

    def select(self, rows: NDArray[np.int64]) -> Conditions:
        """The conditions of these rows."""
        embeds, types = self.inputs_embeds, self.token_type_ids
        return Conditions(
            None if embeds is None else embeds[rows], None if types is None else types[rows], self.head_mask
        )


class CalledModel(Protocol):
    """The interface of a wing's model that the decoder needs."""

    config: GPTJConfig

    def init_cache(self, batch_size: int, max_length: int) -> KVCache[Any]:
        """An empty cache of fixed capacity."""

    def _evaluate(self, **arguments: Any) -> Any:
        """The output of the model's call in evaluation, without a gradient."""

    def _embed(self, token_ids: Ids) -> NDArray[Any]:
        """The token embeddings (b, n, m) of ids (b, n), on the host."""

    def _host(self, array: Any) -> NDArray[Any]:
        """The wing's array as NumPy."""

    def _held(self, logits: Any) -> NDArray[Any] | HeldLogits:
        """The wing's logits (b, n, v), as NumPy where they are on the host."""

    def _rows_of(self, array: Any, rows: NDArray[np.int64]) -> Any:
        """The wing's array whose row r is what row `rows[r]` was."""


class CalledDecoder(Decoder):
    """A decoder that calls the model with a cache and with `conditions`.

    Args:
        model: a wing's GPTJForCausalLM.
        batch, capacity: rows, and slots of a row.
        conditions: of those rows.
    """

    def __init__(self, model: CalledModel, batch: int, capacity: int, conditions: Conditions) -> None:
        super().__init__(model.config, batch, capacity)
        self._model = model
        self._conditions = conditions
        self._cache = model.init_cache(batch, capacity)

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        end = offset + token_ids.shape[1]
        self._cache.length = offset
        outputs = self._model._evaluate(
            **self._tokens(token_ids, offset),
            past_key_values=self._cache,
            attention_mask=mask,
            position_ids=position_ids,
            head_mask=self._conditions.head_mask,
            use_cache=True,
            output_attentions="attentions" in want,
            output_hidden_states="hidden_states" in want,
            return_dict=True,
        )
        self._cache = outputs.past_key_values
        held = self._model._held(outputs.logits)
        if last_only:
            held = held.of_position(held.shape[1] - 1) if isinstance(held, HeldLogits) else held[:, -1]
        return Step.of(held, outputs.hidden_states, outputs.attentions, fetch=self._model._host, length=end)

    def _tokens(self, token_ids: Ids, offset: int) -> dict[str, Any]:
        """The call's arguments for these columns: ids, or embeddings where any of them has one of the prompt's."""
        columns = np.arange(offset, offset + token_ids.shape[1])
        embeds, types = self._conditions.inputs_embeds, self._conditions.token_type_ids
        arguments: dict[str, Any] = {"input_ids": token_ids}
        if embeds is not None and offset < embeds.shape[1]:
            given = embeds[:, offset : offset + len(columns)]
            rest = token_ids[:, given.shape[1] :]
            whole = np.concatenate([given, self._model._embed(rest)], axis=1) if rest.size else given
            arguments = {"inputs_embeds": whole}
        if types is not None:
            arguments["token_type_ids"] = types[:, np.minimum(columns, types.shape[1] - 1)]
        return arguments

    def _gather(self, rows: NDArray[np.int64]) -> None:
        keys, values = (
            tuple(self._model._rows_of(x, rows) for x in side) for side in (self._cache.keys, self._cache.values)
        )
        self._cache = KVCache(keys, values, self._cache.length, fixed=True)
        self._conditions = self._conditions.select(rows)

    def _filled(self, length: int) -> KVCache[Any]:
        return KVCache(self._cache.keys, self._cache.values, length, fixed=True).filled()
