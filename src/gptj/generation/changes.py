"""Changes of a few tokens' logits, which most processors make: they need no whole row, and no copy of one.

What a change does to a token depends on that token's logit alone. So it can be made of the few logits that it names,
wherever the row is, and the row's best tokens are those that were the best before, but for these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Change", "Changed", "decay", "decline", "lift", "repeats", "repetition", "suppression"]

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Change:
    """New logits of a few tokens.

    Attributes:
        tokens: their ids, int64 (n,), rising, none twice.
        make: of their logits (n,) the new ones (n,), each from its own.
    """

    tokens: Ids
    make: Callable[[Floats], Floats]

    def of(self, logits: Floats) -> Floats:
        """A whole row (v,) with the change made."""
        if not len(self.tokens):
            return logits
        result = logits.copy()
        result[self.tokens] = self.make(logits[self.tokens])
        return result


@dataclasses.dataclass(frozen=True)
class Changed:
    """The tokens of a row that several changes change together.

    Attributes:
        tokens: their ids, int64 (n,), rising.
        before, after: their logits, float64 (n,).
    """

    tokens: Ids
    before: Floats
    after: Floats

    @classmethod
    def by(cls, changes: Sequence[Change], tokens: Ids, before: NDArray[Any]) -> Changed:
        """The changes one after another, of `tokens` as `Changed.named` gives them, whose logits are `before`."""
        exact = before.astype(np.float64)
        after = exact.copy()
        for change in changes:
            places = np.searchsorted(tokens, change.tokens)
            after[places] = change.make(after[places])
        return cls(tokens, exact, after)

    @staticmethod
    def named(changes: Sequence[Change]) -> Ids:
        """The tokens that any of the changes names."""
        if len(changes) == 1:
            return changes[0].tokens
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(change.tokens for change in changes)]))

    def holds(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """For each of `ids`, whether it is one of the tokens."""
        if not len(self.tokens):
            return np.zeros(len(ids), bool)
        places = np.minimum(np.searchsorted(self.tokens, ids), len(self.tokens) - 1)
        return np.asarray(self.tokens[places] == ids)


def _as_tokens(tokens: Sequence[int] | Ids) -> Ids:
    return np.unique(np.asarray(tokens, np.int64))


def lift(ids: Ids, biases: Iterable[tuple[tuple[int, ...], float]]) -> Change:
    """Each bias added to its sequence's last token, where the row ends with the tokens before it."""
    biases = tuple(biases)
    tail = ids.tolist()[-max((len(sequence) for sequence, _ in biases), default=1) :]
    sums: dict[int, float] = {}
    for sequence, value in biases:
        before = len(sequence) - 1
        if before == 0 or (before <= len(tail) and tuple(tail[-before:]) == sequence[:-1]):
            sums[sequence[-1]] = sums.get(sequence[-1], 0.0) + value
    tokens = _as_tokens([*sums])
    bias = np.array([sums[token] for token in tokens.tolist()], np.float64)
    return Change(tokens, lambda logits: logits + bias)


def repetition(ids: Ids, factor: float) -> Change:
    """The logit of every token in `ids` divided by `factor` if positive, else multiplied (arXiv:1909.05858)."""
    return Change(_as_tokens(ids), lambda logits: np.where(logits < 0, logits * factor, logits / factor))


def repeats(ids: Ids, size: int, made_from: Ids) -> Change:
    """-inf for every token that would complete an ngram of `made_from`."""
    if len(made_from) < size or len(ids) < size - 1:
        return suppression(())
    windows = np.lib.stride_tricks.sliding_window_view(made_from, size)
    begun = (windows[:, :-1] == ids[len(ids) - size + 1 :]).all(axis=1)
    return suppression(windows[begun, -1])


def suppression(tokens: Sequence[int] | Ids) -> Change:
    """-inf for `tokens`."""
    return Change(_as_tokens(tokens), lambda logits: np.full_like(logits, -np.inf))


def decline(tokens: Sequence[int] | Ids, amount: float) -> Change:
    """`amount` subtracted once for each time that a token is in `tokens`."""
    different, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
    return Change(different, lambda logits: logits - amount * counts)


def decay(eos: Sequence[int], factor: float, beyond: int) -> Change:
    """The eos logits raised by |logit| * (factor ** beyond - 1), `beyond` tokens after the start of the decay."""

    def raise_scores(logits: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            higher = logits + np.abs(logits) * (np.float64(factor) ** beyond - 1)
        return np.where(np.isneginf(logits), -np.inf, np.minimum(higher, _LARGEST))

    return Change(_as_tokens(eos), raise_scores)
