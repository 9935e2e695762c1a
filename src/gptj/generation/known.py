"""Keeping to the tokens that a tokenizer knows: a model often has more rows in its embedding than there are tokens.

GPT-2's vocabulary has 50,257 tokens and GPT-J's embedding 50,400 rows. Those above were never trained on, but a
fine-tuned or random model can choose one, and no text says what it means.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gptj.generation.changes import suppression
from gptj.generation.processors import FewTokens

__all__ = ["KnownTokens", "known_tokens_only"]


class KnownTokens:
    """The processor that `known_tokens_only` returns, which `generate` applies as a change of few tokens.

    Args:
        size, but: as of `known_tokens_only`.
    """

    def __init__(self, size: int, but: Iterable[int]) -> None:
        self._size = size
        self._kept = [token_id for token_id in but if token_id >= size]

    def __call__(self, ids: NDArray[np.int64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """The logits (rows, v), -inf for ids that are not known."""
        masked = logits.copy()
        masked[:, self._size :] = -np.inf
        masked[:, self._kept] = logits[:, self._kept]
        return masked

    def processor(self, vocab_size: int) -> FewTokens:
        """The same for a row of `vocab_size` logits."""
        change = suppression(np.setdiff1d(np.arange(min(self._size, vocab_size), vocab_size), self._kept))
        return FewTokens(lambda row: change)


def known_tokens_only(size: int, *, but: Iterable[int] = ()) -> KnownTokens:
    """A logits processor that makes every id from `size` on impossible: `logits_processor=[known_tokens_only(n)]`.

    Args:
        size: how many tokens the tokenizer has, `len(tokenizer)`.
        but: ids from `size` on that stay possible: those that end a text.

    >>> known_tokens_only(2)(np.zeros((1, 1), int), np.array([[0.5, 1.0, 2.0]])).tolist()
    [[0.5, 1.0, -inf]]
    """
    return KnownTokens(size, but)
