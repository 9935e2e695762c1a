"""The rows that are continued together, which join and leave between two steps.

A decoder writes the same slot in every row. So a row that joins is put into the cache such that its last token stands
in the slot before the next one, as left padding would put it, and what lies before its first token is masked. When
the slots are used up, or most of them belong to nobody any more, the rows are put together anew at the beginning of
another cache. Sizes are few, since XLA compiles for each: powers of two, and what is asked for at most. A row that has
outgrown the compiled ones is put aside with its columns, so that the others need not wait for a compiler; so is a text
whose prompt was read before there was a row for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gptj.config import GPTJConfig
from gptj.generation import Columns, Decoder, DecoderFactory, Extension, Step
from gptj.serving.continuation import Continuation

__all__ = ["Rows", "RunningBatch", "choose_slots", "power_of_two", "slots_of"]

_ROOM = 64
"""Slots that a new cache has at least for what comes: so many steps until the next."""

_PATIENCE = 16
"""Steps for which half of the rows must stand idle before the batch is made smaller."""


def choose_slots(config: GPTJConfig, tokens: int) -> int:
    """The slots of a cache for so many tokens: few sizes, since XLA compiles for each."""
    return power_of_two(max(tokens, 256), config.n_positions)


def slots_of(config: GPTJConfig, prompt: int) -> int:
    """The slots of the caches that a prompt of so many tokens will be in: while it is read, and when it joins."""
    return choose_slots(config, prompt + _ROOM)


def power_of_two(count: int, most: int) -> int:
    """The least power of two that is `count` or more, `most` at most."""
    return min(1 << max(count - 1, 0).bit_length(), most)


class Rows:
    """Continuations, a row of a cache each.

    Args:
        make_decoder: makes an empty decoder for (batch, capacity).
        config: the model's.
        most: rows at most.

    Attributes:
        aside: continuations that wait for a row, or for a larger cache, with their columns.
    """

    def __init__(self, make_decoder: DecoderFactory, config: GPTJConfig, most: int) -> None:
        self._make_decoder, self._config, self.most = make_decoder, config, most
        self.aside: list[tuple[Continuation, Columns]] = []
        self._decoder: Decoder | None = None
        self._rows: list[Continuation | None] = []
        self._is_spoilt = False

    def __len__(self) -> int:
        return len(self.continuations)

    @property
    def continuations(self) -> list[Continuation]:
        """Those that have a row."""
        return [one for _, one in self._seated()]

    def leave(self, continuation: Continuation) -> None:
        """Free its row, and have the cache made anew where it failed: what is no number is one behind a mask, too."""
        row = self._rows.index(continuation)
        self._rows[row] = None
        assert self._decoder is not None
        self._decoder.clear(row)
        self._is_spoilt |= continuation.failed

    def clear(self) -> list[Continuation]:
        """Free all rows and the cache, and return the continuations that had them, and those aside."""
        were = [*self.continuations, *(one for one, _ in self.aside)]
        self._rows, self._decoder, self.aside = [], None, []
        return were

    def share(self, step: Step) -> list[tuple[Continuation, Step]]:
        """Each continuation with its own of the logits (b, v) after the extension."""
        whole = len(self._rows) == 1
        return [(one, step if whole else step.select([row])) for row, one in self._seated()]

    def _seated(self) -> list[tuple[int, Continuation]]:
        """The rows that are somebody's, with whose they are."""
        return [(row, one) for row, one in enumerate(self._rows) if one is not None]


class RunningBatch(Rows):
    """Rows that are all written at one slot.

    Args:
        make_decoder: makes an empty decoder for (batch, capacity).
        config: the model's.
        most: rows at most.
        limit: gives the slots of the largest cache that may be made now; None for any.

    Attributes:
        aside: continuations that wait for a larger cache or for a row, with their columns.
    """

    def __init__(
        self,
        make_decoder: DecoderFactory,
        config: GPTJConfig,
        most: int,
        limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__(make_decoder, config, most)
        self._limit, self._idle_steps = limit, 0

    def join(self, newcomers: list[tuple[Continuation, Columns]]) -> None:
        """Give each continuation a row, with the keys and values of its tokens."""
        decoder = self._decoder
        longest = max((columns.count for _, columns in newcomers), default=0)
        no_room = not len(self) or len(self) + len(newcomers) > len(self._rows)
        if decoder is None or self._is_spoilt or no_room or decoder.length < longest:
            self._rebuild(newcomers)
        else:
            self._seat(newcomers)

    def take_ready(self, free: int) -> list[tuple[Continuation, Columns]]:
        """Those aside that a cache may be made for now, `free` at most, which are to join."""
        limit = self._limit()
        ready: list[tuple[Continuation, Columns]] = []
        left: list[tuple[Continuation, Columns]] = []
        for pair in self.aside:
            fits = limit is None or slots_of(self._config, pair[1].count) <= limit
            (ready if fits and len(ready) < free else left).append(pair)
        self.aside = left
        return ready

    @property
    def shape(self) -> tuple[int, int]:
        """The size by which a step takes its time: the rows and slots of the cache."""
        assert self._decoder is not None
        return self._decoder.batch, self._decoder.slots

    def extension(self) -> Extension | None:
        """One more token of each, for the model to read; None where all rows were put aside."""
        decoder = self._tidy()
        if decoder is None:
            return None
        tokens = np.array([0 if one is None else one.last_token for one in self._rows], np.int64)
        there = np.array([[one is not None] for one in self._rows])
        return Extension(decoder, tokens[:, None], there)

    # ---- the cache

    def _tidy(self) -> Decoder | None:
        """The decoder with room for a step, rebuilt where there is none, or where much of it is waste.

        None where all rows were put aside.
        """
        decoder, active = self._decoder, self.continuations
        assert decoder is not None
        longest = max(one.cached for one in active)
        idle = 2 * len(active) <= len(self._rows)
        self._idle_steps = self._idle_steps + 1 if idle else 0
        wasted = decoder.length - longest > max(_ROOM, longest) // 2
        if decoder.length == decoder.capacity or wasted or self._is_spoilt or self._idle_steps > _PATIENCE:
            return self._rebuild([])
        return decoder

    def _rebuild(self, newcomers: list[tuple[Continuation, Columns]]) -> Decoder | None:
        """The rows put together anew with the newcomers, in the same cache where it is of the size and unspoilt.

        None where all of them are put aside.
        """
        newcomers = self._put_outgrown_aside(newcomers)
        counts = [*(one.cached for one in self.continuations), *(columns.count for _, columns in newcomers)]
        if not counts:
            self._rows, self._decoder = [], None
            return None
        self._idle_steps = 0
        decoder, longest = self._decoder, max(counts)
        batch, slots = self._size(len(counts), longest)
        if decoder is not None and not self._is_spoilt and (decoder.batch, decoder.capacity) == (batch, slots):
            decoder.move(longest)
            self._seat(newcomers)
            return decoder
        kept = [*((one, self._read(row, one)) for row, one in self._seated()), *newcomers]
        self._decoder = decoder = None  # given back before the next one is made
        decoder = self._decoder = self._make_decoder(batch, slots)
        self._is_spoilt = False
        decoder.restart(longest)
        for row, (_, columns) in enumerate(kept):
            decoder.write(row, longest - columns.count, columns)
        self._rows = [*(one for one, _ in kept), *[None] * (batch - len(kept))]
        return decoder

    def _put_outgrown_aside(self, newcomers: list[tuple[Continuation, Columns]]) -> list[tuple[Continuation, Columns]]:
        """Put those aside that no cache may be made for now, and return the other newcomers."""
        limit = self._limit()
        if limit is None:
            return newcomers
        outgrown = [(one, self._read(row, one)) for row, one in self._seated() if one.cached >= limit]
        for one, _ in outgrown:  # first, so that who counts from another thread counts none twice
            self.leave(one)
        self.aside += [*outgrown, *(pair for pair in newcomers if pair[1].count >= limit)]
        return [pair for pair in newcomers if pair[1].count < limit]

    def _size(self, rows: int, longest: int) -> tuple[int, int]:
        """The rows and slots of a cache for so many rows, the longest of so many tokens."""
        slots, limit = choose_slots(self._config, longest + _ROOM), self._limit()
        return power_of_two(rows, self.most), slots if limit is None else min(slots, limit)

    def _read(self, row: int, one: Continuation) -> Columns:
        assert self._decoder is not None
        return self._decoder.read(row, self._decoder.length - one.cached, one.cached)

    def _seat(self, newcomers: list[tuple[Continuation, Columns]]) -> None:
        """Give each the next free row."""
        decoder = self._decoder
        assert decoder is not None
        free = [row for row, one in enumerate(self._rows) if one is None]
        for row, (one, columns) in zip(free, newcomers, strict=False):
            self._rows[row] = one
            decoder.write(row, decoder.length - columns.count, columns)
