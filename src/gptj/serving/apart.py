"""Rows that are continued together, each in a cache of its own.

Where a wing computes the calls of several decoders in one pass (`Decoder.joins`), no row needs to know of another: none
waits for room, is moved or masked for another's sake, and its numbers are bit for bit those that it has alone. So the
same seed gives the same text whoever else is there.
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
    """Continuations, a decoder each; what `RunningBatch` is to wings that compute one cache at a time.

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
        self._rows: list[tuple[Continuation, Decoder]] = []
        self._spare: list[Decoder] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def continuations(self) -> list[Continuation]:
        """Those that have a row."""
        return [one for one, _ in self._rows]

    @property
    def shape(self) -> tuple[int, int]:
        """What tells how long a step takes: the rows, by powers of two."""
        return power_of_two(len(self), self._most), 0

    def join(self, newcomers: Sequence[tuple[Continuation, Columns]]) -> None:
        """Give each continuation a row, with the keys and values of its tokens."""
        for one, columns in newcomers:
            decoder = self._take_decoder(choose_slots(self._config, one.longest))
            decoder.restart(columns.count)
            decoder.write(0, 0, columns)
            self._rows.append((one, decoder))

    def leave(self, continuation: Continuation) -> None:
        """Free its row."""
        row = self.continuations.index(continuation)
        self._spare.append(self._rows.pop(row)[1])

    def clear(self) -> list[Continuation]:
        """Free all rows and caches, and return the continuations that had them, and those aside."""
        were = [*self.continuations, *(one for one, _ in self.aside)]
        self._rows, self._spare, self.aside = [], [], []
        return were

    def take_ready(self, free: int) -> list[tuple[Continuation, Columns]]:
        """Those aside that are to join, `free` at most."""
        ready, self.aside = self.aside[:free], self.aside[free:]
        return ready

    def extensions(self) -> list[Extension]:
        """One more token of each, for the model to read."""
        return [Extension(decoder, np.array([[one.last_token]])) for one, decoder in self._rows]

    def share(self, steps: Sequence[Step | Exception]) -> list[tuple[Continuation, Step | Exception]]:
        """Each continuation with its own logits (1, v) after the extension, or its own error."""
        return [*zip(self.continuations, steps, strict=True)]

    def _take_decoder(self, slots: int) -> Decoder:
        """A decoder that nobody has: memory that is new must be cleared. As many are kept as there may be rows."""
        for place, decoder in enumerate(self._spare):
            if decoder.capacity == slots:
                return self._spare.pop(place)
        if self._spare and len(self) + len(self._spare) >= self._most:
            del self._spare[0]
        return self._make_decoder(1, slots)
