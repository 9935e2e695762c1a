"""Logits that are hard to cut and to draw from: ties, one hot, flat, tails, infinities; and a device to hold them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj.generation import PARTS, HeldLogits, Selected

KINDS = ("normal", "ties", "one hot", "flat", "masked", "tail", "huge", "staircase", "twins", "whiskers")


def make_logits(kind: str, size: int, scale: float, seed: int, dtype: Any) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.standard_normal(size) * scale
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    elif kind == "one hot":
        logits[random.integers(size)] += 1000
    elif kind == "flat":
        logits[:] = scale
    elif kind == "masked":
        logits[random.random(size) < 0.99] = -np.inf
        logits[random.integers(size)] = 0.0
    elif kind == "tail":
        logits = np.where(random.random(size) < 0.02, logits, -690.0 - random.random(size))
    elif kind == "huge":
        logits = logits * 1e30
    elif kind == "staircase":
        logits = -np.arange(size) * np.log(2.0)
    elif kind == "twins":
        logits = np.repeat(logits[: (size + 1) // 2], 2)[:size]
    elif kind == "whiskers":  # different numbers that are the same when the best is subtracted
        logits = random.permutation(size) * 1e-20
        logits[random.integers(size)] = scale
    return logits.astype(dtype)


class OnNumPy(HeldLogits):
    """A device of NumPy's, as unhelpful as one may be: see `best`."""

    def best(self, count: int, named: np.ndarray, temperature: float | None) -> Selected:
        logits, (b, v) = self._array, self._array.shape
        # From the last id to the first, so that among equals the higher id is the one that is kept.
        ids = v - 1 - np.argsort(-logits[:, ::-1], axis=1, kind="stable")[:, :count]
        values = np.take_along_axis(logits, ids, 1)
        rest = None
        if temperature is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                exponents = (logits - values[:, :1]) / logits.dtype.type(temperature)
                weights = np.where(logits > values[:, -1:], 0, np.exp(exponents)).astype(np.float32)
            weights[weights < 2**-126] = 0
            parts = np.pad(weights, ((0, 0), (0, -v % PARTS))).reshape(b, PARTS, -1)
            rest = np.cumsum(parts, axis=2, dtype=np.float32)[:, :, -1]
        return Selected(values, ids, np.isfinite(logits).all(1), np.take_along_axis(logits, named, 1), rest)

    def _fetched(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def _rows(self, rows: np.ndarray) -> Any:
        return self._array[rows]

    def _position(self, n: int) -> Any:
        return self._array[:, n]
