"""Common beginnings of prompts, which are computed once.

A system prompt, a few examples, a conversation so far: many prompts begin as another did. A key and a value depend on
the tokens before them alone, so those of the common tokens are copied in place of being computed. The prompts used
longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from gptj.generation import Columns

__all__ = ["LEAST", "PrefixStore"]

Ids = NDArray[np.int64]

LEAST = 16
"""Tokens in common from which on a copy is worth its place."""


class PrefixStore:
    """Keys and values of prompts that were read.

    Args:
        most_tokens: columns held of all prompts together; 0 keeps none. A column takes n_layer * n_embd * 2 numbers.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens = 0
        self._kept: OrderedDict[tuple[str | None, bytes], tuple[Ids, Columns]] = OrderedDict()

    def find(self, ids: Ids, adapter: str | None = None) -> tuple[Columns, int] | None:
        """The columns of the kept prompt that has most of its beginning in common with `ids`, and how many.

        The last of `ids` is never among them: its logits must be computed.
        """
        found, longest = None, LEAST - 1
        ids = ids[:-1]
        if len(ids) < LEAST:
            return None
        better = ids[:LEAST].tobytes()  # a prompt that has more in common begins so: bytes are compared fast
        for key, (kept, _) in self._kept.items():
            if key[0] == adapter and key[1].startswith(better):
                found, longest = key, _in_common(kept, ids)
                if longest == len(ids):
                    break
                better = ids[: longest + 1].tobytes()
        if found is None:
            return None
        self._kept.move_to_end(found)
        return self._kept[found][1], longest

    def keep(self, ids: Ids, columns: Columns, adapter: str | None = None) -> None:
        """Keep a prompt's columns, in place of those that are its beginning."""
        if len(ids) < LEAST or columns.held > self.most_tokens:
            return
        for key, (kept, _) in list(self._kept.items()):
            if key[0] == adapter and len(kept) <= len(ids) and _in_common(kept, ids) == len(kept):
                self._drop(key)
        self._kept[adapter, ids.tobytes()] = ids, columns
        self.tokens += columns.held
        while self.tokens > self.most_tokens:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str | None, bytes]) -> None:
        self.tokens -= self._kept.pop(key)[1].held


def _in_common(kept: Ids, ids: Ids) -> int:
    """How many tokens at the beginning are the same."""
    most = min(len(kept), len(ids))
    different = np.flatnonzero(kept[:most] != ids[:most])
    return int(different[0]) if len(different) else most
