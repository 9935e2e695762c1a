"""Memory for large arrays: page by page, and the same for one after the other.

A page that a process touches for the first time is cleared by the kernel, and on a virtual machine also found by its
host; for each tensor anew, that was a fifth of a conversion's CPU time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PAGE_BYTES", "ReusedBuffer", "begins_a_page", "page_aligned"]

PAGE_BYTES = 4096
"""A page of memory, and at least a block of any disk."""


class ReusedBuffer:
    """Memory for one array at a time; the next takes its place."""

    def __init__(self) -> None:
        self._pages = page_aligned(0)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of this shape, with whatever was there before in it.

        Raises:
            MemoryError, ValueError: as `numpy.empty`.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._pages.size:
            self._pages = page_aligned(0)  # let go first: both at once would be twice the memory
            self._pages = page_aligned(nbytes)
        return self._pages[:nbytes].view(dtype).reshape(shape)


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    """So many bytes that begin at a page."""
    space = np.empty(nbytes + PAGE_BYTES, np.uint8)
    start = -space.ctypes.data % PAGE_BYTES
    return space[start : start + nbytes]


def begins_a_page(view: memoryview) -> bool:
    """Whether the memory begins at a page; its elements lie one after the other."""
    return np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0
