"""Rows that are continued together, each filled to a length of its own, where a wing can do that (`Decoder.joins`).

No row needs to know of another: none is moved, padded or masked for another's sake, and its numbers are bit for bit
those that it has alone. So the same seed gives the same text whoever else is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptj.generation import Columns, Decoder, Extension
from gptj.serving.batch import Rows, choose_slots, power_of_two
from gptj.serving.continuation import Continuation

__all__ = ["RowsApart"]


class RowsApart(Rows):
    """Rows that begin at the cache's first slot; what `RunningBatch` is to wings whose rows all end at one.

    The cache has slots for the longest that any text may become, so it is made anew for more rows or a longer text
    alone, and for a shorter one where nobody is there.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """The size by which a step takes its time: the rows that are computed, by powers of two."""
        return power_of_two(len(self._running), self.most), 0

    def join(self, newcomers: Sequence[tuple[Continuation, Columns]]) -> None:
        """Give each continuation a row, with the keys and values of its tokens."""
        if not newcomers:  # all rows are other adapters'
            return
        there = [*self.continuations, *(one for one, _ in newcomers)]
        slots = max(choose_slots(self._config, one.longest) for one in there)
        decoder = self._decoder
        if decoder is None or self._is_spoilt or not self._fits(decoder, len(there), slots):
            decoder = self._rebuild(power_of_two(len(there), self.most), slots)
        for one, columns in newcomers:
            self._seat(decoder, one, columns)

    def take_ready(self, free: int) -> list[tuple[Continuation, Columns]]:
        """Those aside that are to join, `free` at most."""
        ready, self.aside = self.aside[:free], self.aside[free:]
        return ready

    def extension(self) -> Extension:
        """One more token of each, for the model to read."""
        assert self._decoder is not None
        rows = self._running
        tokens = np.array([[0 if one is None else one.last_token] for one in rows], np.int64)
        # A row that is nobody's is written at its first slot, which whoever takes it writes.
        slots = np.array([0 if one is None else one.cached for one in rows], np.int64)
        return Extension(self._decoder, tokens, slots=slots)

    @property
    def _running(self) -> list[Continuation | None]:
        """The rows up to the last that is somebody's."""
        last = max((row for row, _ in self._seated()), default=-1)
        return self._rows[: last + 1]

    def _fits(self, decoder: Decoder, rows: int, slots: int) -> bool:
        """Whether a cache has room for so many rows and slots, and not too many slots where nobody is there."""
        return rows <= decoder.batch and (slots <= decoder.capacity if len(self) else slots == decoder.capacity)

    def _rebuild(self, batch: int, slots: int) -> Decoder:
        """Another cache, of this size, with those that have a row."""
        old, kept = self._decoder, []
        for row, one in self._seated():
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
