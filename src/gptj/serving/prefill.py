"""Prompts that enter a cache of their own, some columns at a time, so that a long one makes nobody else wait.

Short prompts that wait together are read together, padded on the left, as `generate` reads a batch; where a wing joins
calls, each in a cache of its own, from its first slot on and cut at multiples of `PIECE`, which changes no number. A
piece of a prompt rides in the step of the running rows: where a wing can join the two, the weights are read once for
both. How large a piece is, is measured: as much as delays the others' next token by less than two steps' time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.generation import Columns, Decoder, DecoderFactory, Extension, HeldLogits, Step
from gptj.generation.decoder import PIECE
from gptj.serving.batch import choose_slots, power_of_two
from gptj.serving.continuation import Continuation, TokenScores

__all__ = ["FEWEST", "MOST", "MOST_PROMPTS", "Pace", "Prefill", "Prompt", "Spare"]

FEWEST, MOST = 8, 512
"""Columns times rows of one call of the model: while others wait for their next token, and at most."""

MOST_PROMPTS = 4
"""Prompts that are read together."""

_MOST_DELAY = 1.6
"""Steps' time by which a piece may delay the others' next token: less than two, since some take longer than told."""

_ENOUGH, _MEMORY, _PATIENCE = 3, 5, 256
"""Measurements by which a size is known, those that are kept, and pieces after which one that was too slow is tried."""


class Pace:
    """How many tokens of prompts are read beside a step, learned from what it took.

    The most is sought by doubling. A size is known when it was met a few times, and is tried when the two before it say
    that it will not delay the others' next token for too long.

    Args:
        fewest: to be read at once.
        clock: seconds.
    """

    def __init__(self, fewest: int = FEWEST, clock: Callable[[], float] = time.perf_counter) -> None:
        self._fewest, self.clock = fewest, clock
        self._step_s: dict[Any, float] = {}
        self._delays_s: dict[int, deque[float]] = {}
        self._now: Any = None
        self._since_probe = 0
        self._seen: set[Any] = set()

    @property
    def tokens(self) -> int:
        """How many to read until the next step: a power of two."""
        most, tokens = _MOST_DELAY * self._step_s.get(self._now, 0.0), self._fewest
        while tokens < MOST:
            delay = self._delay_s(tokens)
            if delay is None or self._expected_s(2 * tokens) > most:
                break
            tokens *= 2
        return tokens

    def note_step(self, shape: Any, seconds: float) -> None:
        """Learn what a step took. A shape's first may have been compiled, and teaches nothing."""
        if self._is_known(shape):
            before = self._step_s.get(shape, seconds)
            self._step_s[shape] = 0.8 * before + 0.2 * seconds
        self._now = shape

    def note_prompt(self, shape: Any, tokens: int, seconds: float) -> None:
        """Learn by how much it delayed the others to read so many tokens."""
        size = power_of_two(tokens, MOST)
        if not self._is_known(shape) or size < self._fewest:
            return
        self._delays_s.setdefault(size, deque(maxlen=_MEMORY)).append(seconds)
        self._since_probe += 1
        if self._since_probe >= _PATIENCE:  # what was slow for another reason is tried again
            self._since_probe = 0
            slower = self._delays_s.get(2 * size)
            if slower:
                slower.popleft()

    def step_s(self, shape: Any) -> float | None:
        """The seconds of a step of this shape, where it is known."""
        return self._step_s.get(shape)

    def _delay_s(self, tokens: int) -> float | None:
        delays = self._delays_s.get(tokens, ())
        return statistics.median(delays) if len(delays) >= _ENOUGH else None

    def _expected_s(self, tokens: int) -> float:
        """The delay by so many tokens, as known, or on the line through the two sizes before."""
        known, half, quarter = (self._delay_s(tokens >> n) for n in range(3))
        if known is not None:
            return known
        assert half is not None
        if quarter is None:
            return 1.5 * half  # between reading the weights alone and computing alone
        return min(2 * half, half + 2 * max(half - quarter, 0.0))

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


class Spare:
    """The cache that a prompt was read in, kept for the next of its size: memory that is new must be cleared.

    One is kept at most, of `MOST` slots in all rows at most.
    """

    def __init__(self) -> None:
        self._adapter: str | None = None
        self._decoder: Decoder | None = None

    def keep(self, adapter: str | None, decoder: Decoder) -> None:
        """Keep a decoder that nobody needs any more, and whose cache holds numbers alone."""
        if decoder.batch * decoder.slots <= MOST:
            self._adapter, self._decoder = adapter, decoder

    def before(self, adapter: str | None, make_decoder: DecoderFactory) -> DecoderFactory:
        """A factory that gives the kept decoder where it is of the size, else makes one."""

        def make(batch: int, capacity: int) -> Decoder:
            kept, self._decoder = self._decoder, None
            if kept is not None and (self._adapter, kept.batch, kept.capacity) == (adapter, batch, capacity):
                return kept
            del kept  # given back before the next one is made
            return make_decoder(batch, capacity)

        return make


class Prefill:
    """Prompts that are being read together.

    Args:
        make_decoder: makes an empty decoder for (batch, capacity).
        config: the model's.
        prompts: which, all for the same adapter; one alone where it is scored.

    Attributes:
        decoder: what reads them.
        fewest: columns that are read at once, but for the last.
    """

    def __init__(self, make_decoder: DecoderFactory, config: GPTJConfig, prompts: Sequence[Prompt]) -> None:
        self.prompts, self.adapter = list(prompts), prompts[0].adapter
        longest, unread = (max(counts) for counts in zip(*((len(one.ids), one.unread) for one in prompts), strict=True))
        # Padded on the left, so that few numbers of rows are met: XLA compiles for each. Who joins calls pads them.
        self.decoder = make_decoder(power_of_two(len(prompts), MOST_PROMPTS), choose_slots(config, _rounded(longest)))
        joins = self.decoder.joins
        self.columns = longest if joins else min(_rounded(longest), config.n_positions)
        self.fewest = PIECE if joins else FEWEST
        self._ids = np.zeros((self.decoder.batch, self.columns), np.int64)
        self._there = np.zeros(self._ids.shape, bool)
        self.scores: list[TokenScores] = []
        self._last: Step | None = None
        begin = (longest - unread) // PIECE * PIECE if joins else max(self.columns - _rounded(unread), 0)
        self.decoder.restart(begin)
        for row, prompt in enumerate(prompts):
            start = self.columns - len(prompt.ids)
            self._ids[row, start:] = prompt.ids
            self._there[row, start:] = True
            if prompt.prefix is not None and begin > start:
                self.decoder.write(row, start, prompt.prefix[0], begin - start)
                for one in prompt.continuations:
                    one.reused = begin - start

    @property
    def rows(self) -> int:
        """How many rows the continuations will take."""
        return sum(len(prompt.continuations) for prompt in self.prompts)

    @property
    def is_done(self) -> bool:
        """Whether all is read."""
        return self.decoder.length == self.columns

    def extension(self, tokens: int) -> Extension:
        """Some more columns for the model to read, `tokens` at most in all rows."""
        decoder = self.decoder
        width = max(power_of_two(tokens // decoder.batch + 1, MOST) // 2, self.fewest)
        start, left = decoder.length, self.columns - decoder.length
        # A width that is rounded up beyond the cache's end would be cut to what is left there, and compiled for that.
        while width > self.fewest and power_of_two(min(width, left), MOST) > decoder.slots - start:
            width //= 2
        end = min(start + width, self.columns)
        scored = self.prompts[0].scores is not None
        return Extension(decoder, self._ids[:, start:end], self._there[:, start:end], last_only=not scored)

    def take(self, step: Step) -> None:
        """Take the step of the columns that were read."""
        scored, queries = self.prompts[0].scores, step.held.shape[-2]
        if scored is not None:
            self._score(step.logits[0], self.decoder.length - queries, scored)
            step = step.position(queries - 1)
        self._last = step

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
        return self._last.select([row]), self.decoder.read(row, self.columns - count, count)


def _rounded(columns: int) -> int:
    """The next multiple of the fewest columns that are read at once."""
    return -(-columns // FEWEST) * FEWEST
