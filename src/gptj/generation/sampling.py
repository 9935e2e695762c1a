"""Randomness as data, and how a token is drawn with it.

A uniform number belongs to (seed, step, row) and to nothing else: not to a framework, a device, a batch size or
the number of draws before it. It comes from Philox-4x64-10 (Salmon et al. 2011) as NumPy implements it, with the
seed as key and (row, step) in the counter. A token is the inverse of the cumulative distribution at that number,
the tokens in descending probability, the lower id first among equals, all in float64. So equal logits give equal
text in every framework, and nearly equal logits give equal text nearly always.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config.rules import plain
from gptj.errors import InputError, shown

__all__ = [
    "SEEDS",
    "argsort_descending",
    "best",
    "best_counts",
    "draw",
    "draw_without_replacement",
    "log_softmax",
    "seeds_and_rows",
    "softmax",
    "softmax_of",
    "uniforms",
]

SEEDS = 2**64
"""A seed is 0 to SEEDS - 1."""

Floats = NDArray[np.float64]


def uniforms(seed: int, step: int, row: int, count: int = 1) -> Floats:
    """`count` numbers in [0, 1), float64, that belong to this seed, step and row.

    >>> uniforms(0, 0, 0)[0] == uniforms(0, 0, 0, 3)[0] != uniforms(0, 0, 1)[0]
    np.True_
    """
    counter = np.array([0, row, step, 0], np.uint64)  # the lowest word counts the draws
    key = np.array([seed, 0], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key)).random(count)


def seeds_and_rows(
    seed: int | Sequence[int] | None, prompts: int, copies: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The (seed, row) of each of `prompts * copies` rows, as two tuples.

    One seed: the rows count through the whole batch. A seed a prompt: each prompt's copies count from 0, so that
    a prompt gives the same text in every batch. None: one seed from the operating system.

    Raises:
        InputError: not whole numbers of 0 to 2**64 - 1, or not one a prompt.

    >>> seeds_and_rows(5, 2, 2), seeds_and_rows([5, 6], 2, 2)
    (((5, 5, 5, 5), (0, 1, 2, 3)), ((5, 5, 6, 6), (0, 1, 0, 1)))
    """
    seed = secrets.randbits(64) if seed is None else plain(seed)
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str | bytes):
        if len(seed) != prompts:
            raise InputError("not one seed a prompt", where="seed", expected=prompts, found=len(seed))
        return tuple(_seed(s) for s in seed for _ in range(copies)), tuple(range(copies)) * prompts
    return (_seed(seed),) * (prompts * copies), tuple(range(prompts * copies))


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < SEEDS:
        raise InputError("no such seed", where="seed", expected="a whole number, 0 to 2**64 - 1", found=shown(value))
    return int(value)


def argsort_descending(values: NDArray[Any]) -> NDArray[np.intp]:
    """The indices of `values` (1-D) from the largest to the smallest, the lower index first among equals."""
    return np.argsort(-values, kind="stable")


def best(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The indices of the `count` largest of `values` (1-D), largest first, the lower index first among equals.

    >>> import numpy as np
    >>> best(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3)
    array([1, 3, 2])
    """
    if count >= len(values):
        return argsort_descending(values)
    if values.min() == -np.inf:  # a cut left many of them, and NumPy is slow where most are equal
        there = np.flatnonzero(values != -np.inf)
        cut = np.flatnonzero(values == -np.inf)[: max(count - len(there), 0)]
        return np.concatenate([there[best(values[there], count)], cut])
    border = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= border)
    return candidates[argsort_descending(values[candidates])][:count]


def best_counts(size: int) -> tuple[int, ...]:
    """How many of the best to sort, try after try: where a few decide, as nearly always, sorting all is wasted."""
    return (*(count for count in (512, 8192) if count < size), size)


def softmax(logits: NDArray[Any]) -> Floats:
    """The probabilities of the last axis, in float64. An axis of nothing but -inf gives NaN."""
    exponent = np.asarray(logits, np.float64)
    weights = exponential(exponent - exponent.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def softmax_of(logits: NDArray[Any], tokens: NDArray[Any]) -> Floats:
    """`softmax(logits)[tokens]` of one row (v,), to the bit."""
    exponent = np.asarray(logits, np.float64)
    weights = exponential(exponent - exponent.max())
    return np.asarray(weights[tokens] / weights.sum())


def exponential(exponent: Floats) -> Floats:
    """np.exp, which takes five times as long where it meets -inf; after a cut most logits are -inf."""
    return np.exp(exponent, out=np.zeros_like(exponent), where=exponent != -np.inf)


def log_softmax(logits: NDArray[Any]) -> Floats:
    """The log probabilities of the last axis, in float64. -inf stays -inf."""
    exponent = np.asarray(logits, np.float64)
    shifted = exponent - exponent.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def draw(logits: NDArray[Any], uniform: float) -> int:
    """The token at `uniform` (0 to below 1) of the distribution softmax(logits), logits (v,), -inf for never.

    >>> import numpy as np
    >>> logits = np.log([0.25, 0.5, 0.25])  # the order is 1, 0, 2 with borders at 0.5 and 0.75
    >>> [draw(logits, u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99)]
    [1, 1, 0, 0, 2, 2]
    """
    exponent = np.asarray(logits, np.float64)
    weights = exponential(exponent - exponent.max())
    target = uniform * weights.sum()
    for count in best_counts(len(exponent)):
        order = best(exponent, count)
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] > target:
            return int(order[np.searchsorted(cumulative, target, side="right")])
    # The two sums, in different orders, may differ in their last bit: then it is the last token of any weight.
    return int(order[np.searchsorted(cumulative, cumulative[-1], side="left")])


def draw_without_replacement(scores: Floats, count: int, uniform: Floats) -> NDArray[np.intp]:
    """`count` different indices of `scores` (1-D), in the order drawn, each time by softmax of those that are left.

    By the Gumbel-top-k identity (Kool et al. 2019, arXiv:1903.06059): the largest of score + Gumbel noise, where the
    noise comes from `uniform`, one number a score. An index of score -inf comes last.
    """
    there = np.flatnonzero(scores != -np.inf)
    with np.errstate(divide="ignore"):
        noise = -np.log(-np.log(uniform[there]))
    noisy = np.full(len(scores), -np.inf)
    noisy[there] = scores[there] + noise
    return best(noisy, min(count, len(noisy)))
