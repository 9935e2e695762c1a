"""Facts about a tensor's values, gathered block by block while it is written: extremes, NaN, infinities, rounding.

The extremes come from the bits. A float's sign and magnitude, read as one integer, order the positive numbers
upwards and the negative ones downwards, with infinity and then NaN at the end of each. So the largest signed and
the largest unsigned integer of a block say its maximum, its minimum, and whether everything is finite: two integer
reductions, 0.05 s/GB for bfloat16, where `numpy.isfinite` alone takes 2.2 s/GB (ml_dtypes has no loops of its own
for it). Only a block that is not finite is looked at number by number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config.dtypes import numpy_dtype

__all__ = ["CastRecord", "CastTally", "ValueRecord", "ValueTally"]

_NEAR_BYTES = 2**18  # what stays in a core's own cache between two reductions
_CAST_ELEMENTS = 2**15
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}


@dataclasses.dataclass(frozen=True)
class ValueRecord:
    """The extremes of a tensor's values, and the number of those that are not finite.

    Attributes:
        minimum, maximum: of the finite values; None where there are none.
        nan, inf: how many elements are NaN, and how many are infinite.
    """

    minimum: float | None
    maximum: float | None
    nan: int
    inf: int

    @property
    def is_all_zero(self) -> bool:
        """Whether every element is zero."""
        return self.minimum == self.maximum == 0 and self.nan + self.inf == 0


@dataclasses.dataclass(frozen=True)
class CastRecord:
    """The losses of a narrowing cast.

    Attributes:
        source_dtype: what was cast.
        overflowed: how many finite values became infinite.
        underflowed: how many values other than zero became zero.
        largest_relative_rounding: max |stored - source| / |source|, overflow and underflow apart.
    """

    source_dtype: str
    overflowed: int
    underflowed: int
    largest_relative_rounding: float


class ValueTally:
    """Gathers a `ValueRecord` over the blocks of a tensor of one dtype (one of `WEIGHT_DTYPES`)."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._unsigned = np.dtype(f"u{dtype.itemsize}")
        self._signed = np.dtype(f"i{dtype.itemsize}")
        self._infinity = _INFINITY[dtype.name]
        self._sign = 1 << (8 * dtype.itemsize - 1)
        self._minimum: float | None = None
        self._maximum: float | None = None
        self.nan = 0
        self.inf = 0

    def add(self, block: NDArray[Any]) -> int:
        """Count a C-contiguous block; returns how many of its elements are not finite."""
        bits = block.reshape(-1).view(self._unsigned)
        step = _NEAR_BYTES // self._unsigned.itemsize
        return sum(self._add_near(bits[at : at + step]) for at in range(0, bits.size, step))

    def record(self) -> ValueRecord:
        """The record of the values so far."""
        return ValueRecord(self._minimum, self._maximum, self.nan, self.inf)

    def _add_near(self, bits: NDArray[Any]) -> int:
        highest, most = int(bits.view(self._signed).max()), int(bits.max())
        if highest < self._infinity and most < self._sign + self._infinity:
            self._widen(bits, highest, most)
            return 0
        magnitude = bits & (self._sign - 1)
        nan, inf = int((magnitude > self._infinity).sum()), int((magnitude == self._infinity).sum())
        self.nan += nan
        self.inf += inf
        finite = bits[magnitude < self._infinity]
        if finite.size:
            self._widen(finite, int(finite.view(self._signed).max()), int(finite.max()))
        return nan + inf

    def _widen(self, bits: NDArray[Any], highest: int, most: int) -> None:
        """Take in finite numbers, given the largest of them as signed and as unsigned integers."""
        some_negative, all_negative = most >= self._sign, highest < 0
        smallest = most if some_negative else int(bits.min())
        largest = int(bits.min()) if all_negative else highest
        low, high = self._value(smallest), self._value(largest)
        self._minimum = low if self._minimum is None else min(low, self._minimum)
        self._maximum = high if self._maximum is None else max(high, self._maximum)

    def _value(self, bits: int) -> float:
        return float(np.array(bits, self._unsigned).view(self._dtype)) + 0.0  # which makes -0.0 a plain zero


class CastTally:
    """Gathers a `CastRecord` over the blocks of a tensor that is cast from `source` to a narrower dtype."""

    def __init__(self, source: np.dtype[Any]) -> None:
        self._source = source
        self.overflowed = 0
        self._underflowed = 0
        self._rounding = 0.0

    def add(self, values: NDArray[Any], stored: NDArray[Any]) -> int:
        """Compare a block with what became of it; returns how many values overflowed."""
        before = self.overflowed
        values, stored = values.reshape(-1), stored.reshape(-1)
        for at in range(0, values.size, _CAST_ELEMENTS):
            self._add_near(values[at : at + _CAST_ELEMENTS], stored[at : at + _CAST_ELEMENTS])
        return self.overflowed - before

    def record(self) -> CastRecord:
        """The record of the values so far."""
        return CastRecord(self._source.name, self.overflowed, self._underflowed, self._rounding)

    def _add_near(self, values: NDArray[Any], stored: NDArray[Any]) -> None:
        wide = np.dtype(np.float64) if self._source.itemsize == 8 else np.dtype(np.float32)
        with np.errstate(all="ignore"):  # a signalling NaN is noticed even by a cast
            before: NDArray[Any] = values.astype(wide, copy=False)
            after: NDArray[Any] = stored.astype(wide)
            relative = np.abs((after - before) / before)  # 1 where it became zero, inf where infinite, NaN at 0 and NaN
        worst = float(np.fmax.reduce(relative, initial=0))
        if worst >= 1:
            self.overflowed += int((np.isinf(after) & np.isfinite(before)).sum())
            self._underflowed += int(((after == 0) & (before != 0)).sum())
            kept = np.isfinite(after) & (after != 0)
            worst = float(np.fmax.reduce(relative[kept], initial=0))
        self._rounding = max(self._rounding, worst)


def is_narrowing(source: str, target: str) -> bool:
    """Whether a cast may round: fewer bytes, or float16 and bfloat16 to each other.

    >>> is_narrowing("float32", "bfloat16"), is_narrowing("float16", "bfloat16"), is_narrowing("float16", "float32")
    (True, True, False)
    """
    return source != target and numpy_dtype(target).itemsize <= numpy_dtype(source).itemsize
