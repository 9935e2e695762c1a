"""A text that goes on turn by turn over one cache: what a model has read once it does not read again.

A turn is an ordinary `stream` over all tokens so far, so its meaning is that of a call without a history, seeds and
penalties included. Only the decoder under it is another: one that outlives the turn, and that takes from a prompt
what its cache does not hold already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_method, check_row
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation.config import GenerationConfig
from gptj.generation.decoder import Decoder, Ids, Mask, Step
from gptj.generation.fields import GenerationFields
from gptj.generation.loop import stream
from gptj.generation.output import TokenStep
from gptj.generation.session import LogitsProcessor
from gptj.generation.stopping import decode_with

__all__ = ["Conversation"]


class Speaker(Protocol):
    """The part of a model that a conversation uses."""

    config: GPTJConfig

    def _decoder(self, batch: int, capacity: int) -> Decoder: ...

    def _merge_config(self, config: Any, overrides: Any) -> GenerationConfig: ...


class Conversation:
    """One row of tokens, and the cache of the model that has read them; `model.conversation()` begins one.

    Args:
        model: of any wing.
        capacity: the most tokens that it may come to; the cache is allocated for so many at once.

    Attributes:
        ids: the tokens so far. It may be set, to forget the oldest for example: of the cache stays what still fits.
    """

    def __init__(self, model: Speaker, capacity: int) -> None:
        self._model = model
        self._decoder = model._decoder(1, capacity)
        self._cached: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.ids: list[int] = []

    @property
    def capacity(self) -> int:
        """The most tokens that it may come to."""
        return self._decoder.capacity

    def stream(
        self,
        token_ids: Sequence[int],
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        tokenizer: Any = None,
        **overrides: Unpack[GenerationFields],
    ) -> Iterator[TokenStep]:
        """The steps that continue all that was said before and then `token_ids`.

        Every step's token joins `ids` as it is made, but for an eos: it ends the answer and not the conversation. Steps
        that are not asked for are not made, so an answer can be cut short.

        Raises:
            InputError: as `model.stream`; a strategy of several rows; no room in the conversation.
        """
        config = self._model._merge_config(generation_config, overrides)
        if config.strategy not in ("greedy", "sample") or config.num_return_sequences > 1:
            raise InputError("has one row", where="conversation", expected="greedy or sample", found=config.strategy)
        check_method(tokenizer, "decode", where="tokenizer")
        ids = [*self.ids, *check_row(token_ids)]
        total = config.total_length(len(ids), self._model.config.n_positions)
        if total > self.capacity:
            raise InputError(
                "full",
                where="conversation",
                expected=f"at most {self.capacity} tokens",
                found=f"{total} with the answer",
            )
        steps = stream(
            lambda batch, capacity: _Turn(self._decoder, self._cached, capacity),
            [ids],
            model_config=self._model.config,
            generation_config=config,
            seed=seed,
            logits_processor=logits_processor,
            decode=decode_with(tokenizer),
        )
        self.ids = ids
        return self._record_tokens(steps, config.eos_token_ids)

    def _record_tokens(self, steps: Iterator[TokenStep], eos: tuple[int, ...]) -> Iterator[TokenStep]:
        for step in steps:
            token = int(step.tokens[0])
            if token not in eos:
                self.ids.append(token)
            yield step


class _Turn(Decoder):
    """The decoder of one turn, over the conversation's own.

    Args:
        kept: the decoder that outlives the turn.
        cached: the tokens in its cache; this turn's are written there.
        capacity: slots of this turn.
    """

    def __init__(self, kept: Decoder, cached: NDArray[np.int64], capacity: int) -> None:
        super().__init__(kept.config, 1, capacity)
        self._kept = kept
        self._cached = cached

    def prefill(
        self, token_ids: Ids, mask: Mask | None = None, *, want: frozenset[str] = frozenset(), chunk: int | None = None
    ) -> Step:
        """As any decoder's, but for what the cache holds already; the prompt's last token is always read."""
        read = min(self._kept.length, token_ids.shape[1] - 1)
        same = token_ids[0, :read] == self._cached[:read]
        known = 0 if want else read if same.all() else int(np.argmin(same))
        self._kept.truncate(known)
        self.length = known
        self.mask[:, :known] = True
        return self._fill(token_ids, mask, want=want, chunk=chunk)

    def _run(
        self, token_ids: Ids, position_ids: Ids, mask: Mask, offset: int, *, last_only: bool, want: frozenset[str]
    ) -> Step:
        self._kept.truncate(offset)
        self._cached[offset : offset + token_ids.shape[1]] = token_ids[0]
        return self._kept.extend(token_ids, want=want, last_only=last_only)

    def _gather(self, rows: NDArray[np.int64]) -> None:
        raise AssertionError("a conversation has one row")
