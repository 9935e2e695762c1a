"""Prompts that enter a cache of their own, some columns at a time, so that a long one makes nobody else wait.

Short prompts that wait together are read together, padded on the left, as `generate` reads a batch. How much is read
between two steps of the running rows is measured: as much as takes one to two steps, so that a long prompt delays the
next token of the others by two steps' time at most. With less, the weights would be read more often for as many tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.generation import Columns, DecoderFactory, HeldLogits, Step
from gptj.generation.decoder import round_up
from gptj.serving.batch import choose_slots, power_of_two
from gptj.serving.continuation import Continuation, TokenScores

__all__ = ["FEWEST", "MOST", "MOST_PROMPTS", "Pace", "Prefill", "Prompt"]

FEWEST, MOST = 8, 512
"""Columns times rows of one call of the model: while others wait for their next token, and at most."""

MOST_PROMPTS = 4
"""Prompts that are read together."""


class Pace:
    """How many tokens of prompts are read between two steps.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.tokens = 16
        self._step_s: float | None = None
        self._seen: set[Any] = set()

    def note_step(self, shape: Any, seconds: float) -> None:
        """Learn what a step took. A shape's first may have been compiled, and teaches nothing."""
        if self._is_known(shape):
            self._step_s = seconds if self._step_s is None else 0.8 * self._step_s + 0.2 * seconds

    def note_prompt(self, shape: Any, tokens: int, seconds: float) -> None:
        """Learn what it took to read so many tokens while others waited."""
        if not self._is_known(shape) or self._step_s is None:
            return
        if seconds > 1.75 * self._step_s:
            self.tokens = max(min(self.tokens, tokens) // 2, FEWEST)
        elif seconds < 0.8 * self._step_s and tokens >= self.tokens:
            self.tokens = min(2 * self.tokens, MOST)

    def _is_known(self, shape: Any) -> bool:
        known = shape in self._seen
        self._seen.add(shape)
        return known


class Prompt:
    """Token ids that are read once for all their continuations.

    Args:
        first: one of these.
        prefix: columns that are known already, and how many of their tokens are the prompt's own.
    """

    def __init__(self, first: Continuation, prefix: tuple[Columns, int] | None) -> None:
        self.ids, self.adapter = first.prompt, first.adapter
        self.continuations = [first]
        self.prefix = prefix
        self.scores = first.scores if first.scores_prompt else None

    @property
    def unread(self) -> int:
        """How many of its tokens must be read."""
        return len(self.ids) - (0 if self.prefix is None else self.prefix[1])

    def is_same(self, other: Continuation) -> bool:
        """Whether a continuation is one of this prompt, and needs nothing of it that is not computed."""
        alike = other.adapter == self.adapter and np.array_equal(other.prompt, self.ids)
        return alike and self.scores is None and not other.scores_prompt


class Prefill:
    """Prompts that are being read together.

    Args:
        make_decoder: makes an empty decoder for (batch, capacity).
        config: the model's.
        prompts: which, all for the same adapter; one alone where it is scored.
    """

    def __init__(self, make_decoder: DecoderFactory, config: GPTJConfig, prompts: Sequence[Prompt]) -> None:
        self.prompts, self.adapter = list(prompts), prompts[0].adapter
        longest, unread = (max(counts) for counts in zip(*((len(one.ids), one.unread) for one in prompts), strict=True))
        # Padded on the left, so that few numbers of rows are met: XLA compiles for each, oneDNN keeps its products.
        self.columns = min(_rounded(longest), config.n_positions)
        self._decoder = make_decoder(power_of_two(len(prompts), MOST_PROMPTS), choose_slots(config, self.columns))
        self._ids = np.zeros((self._decoder.batch, self.columns), np.int64)
        self._there = np.zeros(self._ids.shape, bool)
        self.scores: list[TokenScores] = []
        self._last: Step | None = None
        begin = max(self.columns - _rounded(unread), 0)
        self._decoder.restart(begin)
        for row, prompt in enumerate(prompts):
            start = self.columns - len(prompt.ids)
            self._ids[row, start:] = prompt.ids
            self._there[row, start:] = True
            if prompt.prefix is not None and begin > start:
                self._decoder.write(row, start, prompt.prefix[0], begin - start)
                for one in prompt.continuations:
                    one.reused = begin - start

    @property
    def rows(self) -> int:
        """How many rows the continuations will take."""
        return sum(len(prompt.continuations) for prompt in self.prompts)

    @property
    def is_done(self) -> bool:
        """Whether all is read."""
        return self._decoder.length == self.columns

    def advance(self, tokens: int) -> tuple[Any, int]:
        """Read some more columns, `tokens` at most in all rows, and return the shape of the call and its tokens."""
        decoder = self._decoder
        width = max(power_of_two(tokens // decoder.batch + 1, MOST) // 2, FEWEST)
        start, left = decoder.length, self.columns - decoder.length
        # A width that is rounded up beyond the cache's end would be cut to what is left there, and compiled for that.
        while width > FEWEST and power_of_two(min(width, left), MOST) > decoder.slots - start:
            width //= 2
        end = min(start + width, self.columns)
        scored = self.prompts[0].scores
        step = decoder.extend(self._ids[:, start:end], self._there[:, start:end], last_only=scored is None)
        if scored is not None:
            self._score(step.logits[0], start, scored)
            step = step.position(end - start - 1)
        self._last = step
        return ("prefill", decoder.batch, round_up(end - start, MOST), decoder.slots), (end - start) * decoder.batch

    def wait(self) -> None:
        """Wait until a device has computed what was asked for last."""
        if self._last is not None and isinstance(self._last.held, HeldLogits):
            self._last.held.on_host()

    def _score(self, logits: NDArray[Any], start: int, top: int) -> None:
        """Score the tokens after columns `start` on, whose logits (n, v) are here."""
        ids = self.prompts[0].ids
        if not self.scores:
            self.scores.append(TokenScores(int(ids[0]), None))
        first = start - (self.columns - len(ids)) + 1
        for place, row in enumerate(logits, first):
            if 1 <= place < len(ids):
                self.scores.append(TokenScores.of(row, int(ids[place]), top))

    def result(self, row: int) -> tuple[Step, Columns]:
        """A prompt's logits (1, v), and the columns of all its tokens."""
        assert self._last is not None and self.is_done
        count = len(self.prompts[row].ids)
        return self._last.select([row]), self._decoder.read(row, self.columns - count, count)


def _rounded(columns: int) -> int:
    """The next multiple of the fewest columns that are read at once."""
    return -(-columns // FEWEST) * FEWEST
