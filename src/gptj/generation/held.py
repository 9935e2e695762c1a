"""Logits that stay on the device that computed them, which hands out the best of each row.

A row of GPT-J's logits is 200 kB, and its best 512 are 4 kB. So where the logits are not in the host's memory, the
device selects candidates, and the host chooses among them as it does among its own (see `candidates`). Where the
candidates do not prove the token, the row's logits are fetched, and the token is the same.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gptj.generation.candidates import FEW, Candidates, weight_below
from gptj.generation.changes import Changed

__all__ = ["PARTS", "HeldLogits", "HeldRow", "Selected"]

PARTS = 256
"""Sums of a row's rest, which the host adds in float64: of GPT-J's vocabulary, 197 numbers each."""

DEVICE_ERROR = 1e-4
"""Of a part's sum in float32. Three roundings of an exponent, 2**-24 of at most 104 each, are 2e-5, 197 numbers added
one after another 1.2e-5; the rest is for an exp of some units in the last place."""

SMALLEST = 2.0**-126
"""The smallest normal number of float32; a device may take what is below it for 0."""


@dataclasses.dataclass(frozen=True)
class Selected:
    """The best of rows of logits, in NumPy on the host.

    Attributes:
        values: (b, n), the largest first, in the logits' dtype.
        ids: their token ids, whole numbers (b, n); which of several that equal the last one is left open.
        finite: bool (b,), whether all of a row's logits are.
        named: (b, m), the logits of the tokens that were asked for.
        rest: where a temperature was given, float (b, `PARTS`): sums of exp((logit - largest) / temperature) over parts
            of what is no larger than the last of `values`.
    """

    values: NDArray[Any]
    ids: NDArray[Any]
    finite: NDArray[np.bool_]
    named: NDArray[Any]
    rest: NDArray[Any] | None = None


class HeldLogits(abc.ABC):
    """The logits of a step as the wing's array.

    Args:
        array: float32 or float64, (b, v) of one position, or (b, n, v).
        columns: how many of n positions count; the others stand for slots in excess. None: all.
    """

    def __init__(self, array: Any, columns: int | None = None) -> None:
        self._array = array
        self._columns = range(columns or array.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(b, v) or (b, n, v)."""
        shape = tuple(self._array.shape)
        return shape if len(shape) == 2 else (shape[0], len(self._columns), shape[2])

    def on_host(self) -> NDArray[Any]:
        """All of them, in NumPy."""
        logits = self._fetched(self._array)
        return logits if logits.ndim == 2 else logits[:, self._columns.start : self._columns.stop]

    def rows_on_host(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Those of some rows, (n, v), in NumPy."""
        return self._fetched(self._array if len(rows) == self.shape[0] else self._rows(rows))

    def of_rows(self, rows: NDArray[np.int64]) -> Self:
        """The logits whose row r is what row `rows[r]` was."""
        return self._of(self._rows(rows), self._columns)

    def of_position(self, n: int) -> Self:
        """Those of position n alone, (b, v)."""
        return type(self)(self._position(self._columns[n]))

    def of_last(self, count: int) -> Self:
        """Those of the last `count` positions; of one position alone, these."""
        return self._of(self._array, self._columns[-count:])

    def _of(self, array: Any, columns: range) -> Self:
        made = type(self)(array)
        made._columns = columns
        return made

    # ---- what a wing provides

    @abc.abstractmethod
    def best(self, count: int, named: NDArray[np.int64], temperature: float | None) -> Selected:
        """The `count` best of each row of (b, v), and the logits of `named` (b, m)."""

    @abc.abstractmethod
    def _fetched(self, array: Any) -> NDArray[Any]:
        """The wing's array as NumPy."""

    @abc.abstractmethod
    def _rows(self, rows: NDArray[np.int64]) -> Any:
        """These rows of the array."""

    @abc.abstractmethod
    def _position(self, n: int) -> Any:
        """The array (b, v) of position n of (b, n, v)."""


class HeldRow:
    """One row of what a device selected, a `RowLogits`.

    Args:
        selected: of all rows.
        row: which.
        vocab_size: v.
        changed: what the logits of `selected.named` were changed to.
    """

    def __init__(self, selected: Selected, row: int, vocab_size: int, changed: Changed | None = None) -> None:
        self._values = selected.values[row].astype(np.float64)
        self._ids = selected.ids[row].astype(np.intp)
        self._rest = None if selected.rest is None else selected.rest[row]
        self._vocab_size = vocab_size
        self._changed = changed

    def best(self) -> int | None:
        """The best token, or None where it was not selected, or may share its logit with others."""
        return self.candidates(FEW).best()

    def candidates(self, count: int) -> Candidates:
        """Those that were selected, without the last and its equals: of these, others may have been left out."""
        bound = -np.inf if len(self._ids) == self._vocab_size else float(self._values[-1])
        above = self._values > bound
        found = Candidates(self._ids[above], self._values[above], bound)
        return found if self._changed is None else found.changed(self._changed)

    def rest(self, found: Candidates, best: float, temperature: float) -> tuple[float, float]:
        """As `RowLogits.rest`, of the device's sums."""
        if found.bound == -np.inf:
            return 0.0, 0.0
        assert self._rest is not None
        changed, largest = self._changed, float(self._values[0])
        weight = float(self._rest.sum(dtype=np.float64))
        error = weight * DEVICE_ERROR + self._vocab_size * SMALLEST
        if changed is None:
            return weight, error
        weight = max(weight - weight_below(changed.before, found.bound, largest, temperature), 0.0)
        with np.errstate(over="ignore"):
            scale = float(np.exp((largest - best) / temperature))
        if not np.isfinite(scale):  # what was the best is so much worse now that nothing is known of the rest
            return 0.0, np.inf
        return weight * scale + weight_below(changed.after, found.bound, best, temperature), error * scale

    def whole(self) -> None:
        """Nothing: they are on the device."""
