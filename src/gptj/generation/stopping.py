"""When a row ends: an eos, the length, the time, a stop string, or a criterion of the caller's.

One question, asked of rows that have just got a token, whether they are the rows of a batch or the candidates of
a beam search: `Stopper.ends(ids)`. It keeps no state between calls but the moment at which it was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.errors import InputError
from gptj.generation.config import GenerationConfig

__all__ = ["DecodeText", "Stopper", "StoppingCriterion", "decode_with"]

DecodeText = Callable[[Sequence[int]], str]
"""Token ids to text, bytes that are no UTF-8 as U+FFFD."""

StoppingCriterion = Callable[[NDArray[np.int64], Any], Any]
"""`criterion(ids, scores)`, ids (rows, columns): a bool for all rows, or one a row."""

_SPARE_TOKENS = 8  # beyond one token a byte of the stop string: the rest of a token, and tokens without text


def decode_with(tokenizer: Any) -> DecodeText | None:
    """The tokenizer's `decode`, or its `decode_any` where it has one, as ours has.

    Refusing an unknown id would lose all that was made, and its number is no text that could be stopped at.
    """
    decode: DecodeText | None = getattr(tokenizer, "decode_any", None)
    return tokenizer.decode if decode is None and tokenizer is not None else decode


class Stopper:
    """Answers which rows end with their last token.

    Args:
        config: eos_token_id, max_time and stop_strings are read.
        total_length: columns of the longest result.
        prompt_columns: columns of the prompt; stop strings are looked for after it.
        criteria: the caller's.
        decode: needed for stop strings.
        unseen: leading columns that the caller's criteria are not shown.

    Raises:
        InputError: there are stop strings but no `decode`.
    """

    def __init__(
        self,
        config: GenerationConfig,
        total_length: int,
        prompt_columns: int,
        *,
        criteria: Sequence[StoppingCriterion] = (),
        decode: DecodeText | None = None,
        unseen: int = 0,
    ) -> None:
        if config.stop_strings and decode is None:
            raise InputError("stop_strings need the tokenizer", where="decode", expected="a function of token ids")
        self._eos = np.array(config.eos_token_ids, np.int64)
        self._total_length = total_length
        self._prompt_columns = prompt_columns
        self._unseen = unseen
        self._strings = config.stop_strings or ()
        self._window = max((len(s.encode()) for s in self._strings), default=0) + _SPARE_TOKENS
        self._decode = decode
        self._criteria = tuple(criteria)
        self._deadline_s = None if config.max_time is None else time.monotonic() + config.max_time

    @property
    def reads_scores(self) -> bool:
        """Whether anybody looks at the scores that `ends` is given."""
        return bool(self._criteria)

    def ends(self, ids: NDArray[np.int64], scores: Any = None) -> NDArray[np.bool_]:
        """For each row of `ids` (rows, columns), whether it ends with its last token: bool (rows,)."""
        result = np.isin(ids[:, -1], self._eos)
        if ids.shape[1] >= self._total_length:
            result |= True
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            result |= True
        if self._strings:
            result |= [self._completes_a_string(row) for row in ids]
        for criterion in self._criteria:
            answer = np.asarray(criterion(ids[:, self._unseen :], scores))
            if answer.dtype != np.bool_ or answer.shape not in ((), (len(ids),)):
                raise InputError(
                    "answered neither a bool nor one a row",
                    where="stopping_criteria",
                    expected=f"bool ({len(ids)},)",
                    found=f"{answer.dtype} {answer.shape}",
                )
            result |= answer
        return result

    def _completes_a_string(self, row: NDArray[np.int64]) -> bool:
        """Whether a stop string stands in the text of the last new tokens; an earlier one would have ended the row."""
        assert self._decode is not None
        new = row[self._prompt_columns :][-self._window :]
        text = self._decode(new.tolist())
        return any(string in text for string in self._strings)
