"""A decoder of a few lines with real history: its logits depend on every token before, and on the positions.

It keeps its tokens and positions in a cache as a wing keeps keys and values, so a loop that truncates, selects or
masks wrongly gets other logits. `WIDTH` numbers a token stand for its hidden state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj.config import GPTJConfig
from gptj.generation import Columns, Decoder, Step

WIDTH = 6


def toy_config(vocab_size: int = 23, n_positions: int = 64) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=vocab_size, n_positions=n_positions, n_embd=4, n_layer=1, n_head=1, rotary_dim=4, eos_token_id=None
    )


class ToyDecoder(Decoder):
    """Query i's state is a decaying sum over the tokens that it sees; its logits are a fixed map of that state."""

    def __init__(
        self,
        config: GPTJConfig,
        batch: int,
        capacity: int,
        *,
        seed: int = 0,
        dtype: Any = np.float32,
        sharp: float = 0.5,
    ) -> None:
        super().__init__(config, batch, capacity)
        random = np.random.default_rng(seed)
        self.embedding = random.normal(size=(config.vocab_size, WIDTH))
        self.head = random.normal(size=(WIDTH, config.vocab_size)) * sharp
        self.tokens = np.full((batch, capacity), -1)
        self.positions = np.full((batch, capacity), -1)
        self.dtype = dtype
        self.calls: list[tuple[int, int]] = []

    def _run(self, token_ids: Any, position_ids: Any, mask: Any, offset: int, *, last_only: bool, want: Any) -> Step:
        batch, count = token_ids.shape
        self.calls.append((batch, count))
        self.tokens[:, offset : offset + count] = token_ids
        self.positions[:, offset : offset + count] = position_ids
        states = np.zeros((batch, count, WIDTH))
        for row in range(batch):
            for query in range(count):
                seen = np.flatnonzero(mask[row, : offset + query + 1])
                states[row, query] = self._state(row, position_ids[row, query], seen)
        # Row by row, so that the bits do not depend on the batch.
        logits = np.array([[state @ self.head for state in row] for row in states]).astype(self.dtype)
        attentions = np.broadcast_to(mask[:, None, None, : offset + count], (batch, 1, count, offset + count))
        return Step(
            logits[:, -1] if last_only else logits,
            (states * 0, states.astype(self.dtype)) if "hidden_states" in want else None,
            (attentions.astype(self.dtype),) if "attentions" in want else None,
        )

    def _state(self, row: int, position: int, seen: Any) -> Any:
        distance = position - self.positions[row, seen]
        weights = 0.8**distance * np.cos(1.0 + self.positions[row, seen])
        state = np.zeros(WIDTH)
        for weight, token in zip(weights, self.tokens[row, seen], strict=True):  # one order of summing
            state += weight * self.embedding[token]
        return state

    def _run_together(self, runs: Any) -> list[Step]:
        return [
            run.decoder._run(*run.arguments, last_only=run.last_only, want=frozenset())
            if run.slots is None
            else run.decoder._run_rows(run.token_ids, run.slots)
            for run in runs
        ]

    def _run_rows(self, token_ids: Any, slots: Any) -> Step:
        """One token of each row, in its own slot."""
        self.calls.append(token_ids.shape)
        logits = []
        for row, (token, slot) in enumerate(zip(token_ids[:, 0], slots, strict=True)):
            self.tokens[row, slot], self.positions[row, slot] = token, slot
            logits.append(self._state(row, slot, np.arange(slot + 1)) @ self.head)
        return Step(np.array(logits).astype(self.dtype))

    def _gather(self, rows: Any) -> None:
        self.tokens = self.tokens[rows]
        self.positions = self.positions[rows]

    def _read(self, row: int, start: int, count: int) -> Columns:
        part = slice(start, start + count)
        keys, values = (kept[row, part][None, :, None].copy() for kept in (self.tokens, self.positions))
        return Columns((keys,), (values,), 0, count)

    def _write(self, row: int, start: int, columns: Columns) -> None:
        place = slice(start, start + columns.count)
        self.tokens[row] = self.positions[row] = -1
        self.tokens[row, place] = columns.keys[0][0, columns.first :, 0][: columns.count]
        self.positions[row, place] = columns.values[0][0, columns.first :, 0][: columns.count]

    def _forget(self, length: int) -> None:
        self.tokens[:, length:] = -1
