"""NumPy's products on one thread: of small matrices a second one waits, in a loop, longer than the product takes.

Measured of the demo's oracle on two busy cores: 31 ms of processor time a product with two threads, 0.9 ms with one.
NumPy has no call for it, so its OpenBLAS is asked itself, where it is that, as threadpoolctl does.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptj.config import GPTJConfig
from gptj.config.schema import schema

__all__ = ["few_threads"]

SMALL = 2**21
"""Elements of the largest weight of a model whose products one thread computes as fast as several."""

_SPELT = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads")


@contextlib.contextmanager
def few_threads(config: GPTJConfig) -> Iterator[None]:
    """While this is open, NumPy computes on one thread, where the model is small and its library can be told."""
    calls = _calls() if max(math.prod(row.shape) for row in schema(config)) <= SMALL else None
    if calls is None:
        yield
        return
    get, put = calls
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


def _calls() -> tuple[Any, Any] | None:
    """The functions that get and set the number of threads; None where there are none."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split()[-1] for line in lines if "openblas" in line}
        for path in sorted(paths):
            library = ctypes.CDLL(path)
            for name in _SPELT:
                if hasattr(library, name.format("set")):
                    return getattr(library, name.format("get")), getattr(library, name.format("set"))
    except OSError:
        pass
    return None
