"""Logits that are hard to cut and to draw from: ties, one hot, flat, far tails, infinities."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("normal", "ties", "one hot", "flat", "masked", "tail", "huge", "staircase", "twins")


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
    return logits.astype(dtype)
