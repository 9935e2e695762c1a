"""Keeping to the tokens that a tokenizer knows: a model often has more rows in its embedding than there are tokens.

GPT-2's vocabulary has 50,257 tokens and GPT-J's embedding 50,400 rows. Those above were never trained on, but a
fine-tuned or random model can choose one, and no text says what it means.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gptj.generation.session import LogitsProcessor

__all__ = ["known_tokens_only"]


def known_tokens_only(size: int, *, but: Iterable[int] = ()) -> LogitsProcessor:
    """A logits processor that makes every id from `size` on impossible: `logits_processor=[known_tokens_only(n)]`.

    Args:
        size: how many tokens the tokenizer has, `len(tokenizer)`.
        but: ids from `size` on that stay possible: those that end a text.

    >>> known_tokens_only(2)(np.zeros((1, 1), int), np.array([[0.5, 1.0, 2.0]])).tolist()
    [[0.5, 1.0, -inf]]
    """
    kept = [token_id for token_id in but if token_id >= size]

    def process(ids: NDArray[np.int64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        masked = logits.copy()
        masked[:, size:] = -np.inf
        masked[:, kept] = logits[:, kept]
        return masked

    return process
