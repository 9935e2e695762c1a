"""Transposed copies in blocks, since a plain one walks the whole matrix for every cache line that it fills."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["copy_transposed"]

_BLOCK = 64  # 64 two-byte values are two cache lines on either side


def copy_transposed(out: NDArray[Any], values: NDArray[Any]) -> None:
    """Make `out[j, i] = values[i, j]` for all; the two have one dtype and do not overlap.

    Shapes: values (rows, columns), out (columns, rows); either may be strided.
    """
    assert out.shape == values.shape[::-1] and out.dtype == values.dtype
    # NumPy copies numbers of a foreign dtype (bfloat16) one call each; as plain integers they are a tight loop.
    words = np.dtype(f"u{out.dtype.itemsize}")
    out, values = out.view(words), values.view(words)
    for start in range(0, values.shape[0], _BLOCK):
        out[:, start : start + _BLOCK] = values[start : start + _BLOCK].T
