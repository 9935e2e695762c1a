"""The rotary table: sines and cosines built once in float64 and rounded once, the same bits for every backend.

Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34) turns each interleaved pair (x0, x1)
of a query or key at position p by the angle p * base^(-2i / width), i being the pair's number. GPT-J turns the
first `rotary_width` dimensions of each head and leaves the rest.

Each framework's own float32 sine differs in the last bit, and a table kept in 16 bits is off by as much as 0.86
at position 2,047 (bfloat16 holds whole numbers exactly only to 256). So the table is data: NumPy makes it, in
float64, and the wings only look it up. It is never made in, or cast to, 16 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROTARY_BASE", "rotary_rows", "rotary_table", "rotate_pairs"]

ROTARY_BASE = 10_000.0


@functools.lru_cache(maxsize=8)
def rotary_table(n_positions: int, width: int, dtype: str = "float32") -> tuple[NDArray[Any], NDArray[Any]]:
    """The sine and the cosine of every position and pair, each of shape (n_positions, width // 2), read-only.

    Args:
        n_positions: rows; row p is position p.
        width: how many dimensions rotate, even.
        dtype: "float32" or "float64" (for a float64 model); the angles are float64 either way.

    >>> sin, cos = rotary_table(2048, 64)
    >>> float(sin[1, 0]) == float(np.float32(np.sin(1.0))), cos.shape
    (True, (2048, 32))
    """
    tables = rotary_rows(np.arange(n_positions), width, dtype)
    for table in tables:
        table.setflags(write=False)
    return tables


def rotary_rows(positions: NDArray[Any], width: int, dtype: str = "float32") -> tuple[NDArray[Any], NDArray[Any]]:
    """The rows of `rotary_table` at `positions` (...,), each (..., width // 2), without the rest of the table."""
    if dtype not in ("float32", "float64"):
        raise ValueError(f"a rotary table is float32 or float64, not {dtype}")
    frequency = ROTARY_BASE ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angle = np.asarray(positions, np.float64)[..., None] * frequency
    return np.sin(angle).astype(dtype), np.cos(angle).astype(dtype)


def rotate_pairs(x: NDArray[Any], sin: NDArray[Any], cos: NDArray[Any]) -> NDArray[Any]:
    """x (..., d) with each interleaved pair (x0, x1) of its first dimensions (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: whose last axis has the pairs.
        sin, cos: (..., n), broadcast to x's other axes; the dimensions past 2 n stay.
    """
    width = 2 * sin.shape[-1]
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    turned = x.copy()
    turned[..., 0:width:2] = even * cos - odd * sin
    turned[..., 1:width:2] = odd * cos + even * sin
    return turned
