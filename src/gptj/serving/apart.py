"""Rows that are continued together, each filled to a length of its own, where a wing can do that (`Decoder.joins`).

No row needs to know of another: none is moved, padded or masked for another's sake, and its numbers are bit for bit
those that it has alone. So the same seed gives the same text whoever else is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptj.config import GPTJConfig
from gptj.generation import Columns, Decoder, DecoderFactory, Extension, Step
from gptj.serving.batch import choose_slots, power_of_two
from gptj.serving.continuation import Continuation

__all__ = ["RowsApart"]


class RowsApart:
    """Continuations, a row each; what `RunningBatch` is to wings whose rows are all written at one slot.

    The cache has slots for the longest that any text may become, so it is made anew for more rows or a longer text
    alone, and for a shorter one where nobody is there.

    Args:
        make_decoder: makes an empty decoder for (batch, capacity).
        config: the model's.
        most: rows at most.

    Attributes:
        aside: continuations that wait for a row, with their columns.
    """

    def __init__(self, make_decoder: DecoderFactory, config: GPTJConfig, most: int) -> None:
        self._make_decoder, self._config, self._most = make_decoder, config, most
        self.aside: list[tuple[Continuation, Columns]] = []
        self._decoder: Decoder | None = None
        self._rows: list[Continuation | None] = []
        self._is_spoilt = False

    def __len__(self) -> int:
        return len(self.continuations)

    @property
    def continuations(self) -> list[Continuation]:
        """Those that have a row."""
        return [one for one in self._rows if one is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """The size by which a step takes its time: the rows that are computed, by powers of two."""
        return power_of_two(len(self._running), self._most), 0

    def join(self, newcomers: Sequence[tuple[Continuation, Columns]]) -> None:
        """Give each continuation a row, with the keys and values of its tokens."""
        if not newcomers:  # all rows are other adapters'
            return
        there = [*self.continuations, *(one for one, _ in newcomers)]
        slots = max(choose_slots(self._config, one.longest) for one in there)
        decoder, rows = self._decoder, len(there)
        outgrown = decoder is None or rows > decoder.batch or slots > decoder.capacity
        wide = decoder is not None and not len(self) and slots < decoder.capacity  # memory that a long text has left
        if decoder is None or outgrown or wide or self._is_spoilt:
            decoder = self._rebuild(power_of_two(rows, self._most), slots)
        for one, columns in newcomers:
            self._seat(decoder, one, columns)

    def leave(self, continuation: Continuation) -> None:
        """Free its row, and have the cache made anew where it failed: what is no number is one behind a mask, too."""
        self._rows[self._rows.index(continuation)] = None
        self._is_spoilt |= continuation.failed

    def clear(self) -> list[Continuation]:
        """Free all rows and the cache, and return the continuations that had them, and those aside."""
        were = [*self.continuations, *(one for one, _ in self.aside)]
        self._rows, self._decoder, self.aside = [], None, []
        return were

    def take_ready(self, free: int) -> list[tuple[Continuation, Columns]]:
        """Those aside that are to join, `free` at most."""
        ready, self.aside = self.aside[:free], self.aside[free:]
        return ready

    def extensions(self) -> list[Extension]:
        """One more token of each, for the model to read together."""
        assert self._decoder is not None
        rows = self._running
        tokens = np.array([[0 if one is None else one.last_token] for one in rows], np.int64)
        # A row that is nobody's is written at its first slot, which whoever takes it writes.
        slots = np.array([0 if one is None else one.cached for one in rows], np.int64)
        return [Extension(self._decoder, tokens, slots=slots)]

    def share(self, steps: Sequence[Step | Exception]) -> list[tuple[Continuation, Step | Exception]]:
        """Each continuation with its own of the logits (b, v) after the extension, or the error of all."""
        [step] = steps
        if isinstance(step, Exception):
            return [(one, step) for one in self.clear()]
        return [(one, step.select([row])) for row, one in enumerate(self._rows) if one is not None]

    @property
    def _running(self) -> list[Continuation | None]:
        """The rows up to the last that is somebody's."""
        last = max((row for row, one in enumerate(self._rows) if one is not None), default=-1)
        return self._rows[: last + 1]

    def _rebuild(self, batch: int, slots: int) -> Decoder:
        """Another cache, of this size, with those that have a row."""
        old, kept = self._decoder, []
        for row, one in enumerate(self._rows):
            if one is not None:
                assert old is not None
                kept.append((one, old.read(row, 0, one.cached)))
        self._decoder = old = None  # given back before the next one is made
        decoder = self._decoder = self._make_decoder(batch, slots)
        self._is_spoilt = False
        decoder.restart(decoder.capacity)
        self._rows = [None] * batch
        for one, columns in kept:
            self._seat(decoder, one, columns)
        return decoder

    def _seat(self, decoder: Decoder, one: Continuation, columns: Columns) -> None:
        """Give it the first free row."""
        row = self._rows.index(None)
        self._rows[row] = one
        decoder.write(row, 0, columns)
