"""Results of generation: a `TokenStep` after each step, and a `GenerateOutput` at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from gptj.calls.outputs import Array, KVCache, ModelOutput
from gptj.errors import InputError
from gptj.errors.brief import brief_fields
from gptj.generation.sampling import log_softmax

__all__ = ["GenerateOutput", "TokenStep", "transition_scores"]

Layers = tuple[NDArray[Any], ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenStep:
    """One new token a row.

    Attributes:
        index: 0 for the first new token.
        tokens: int64 (rows,); the padding id in rows that had ended before.
        running: bool (rows,), True where the token is a new one and no padding.
        ended: bool (rows,), True where the row ends with this token or ended before.
        logits: where asked, what the model gave, (rows, v).
        scores: where asked, the logits after all processors, (rows, v), in the logits' own dtype.
        hidden_states: where asked, n_layer + 1 arrays (rows, n, m): n is the prompt's at index 0, then 1.
        attentions: where asked, n_layer arrays (rows, h, n, s).
    """

    index: int
    tokens: NDArray[np.int64]
    running: NDArray[np.bool_]
    ended: NDArray[np.bool_]
    logits: NDArray[Any] | None = None
    scores: NDArray[Any] | None = None
    hidden_states: Layers | None = None
    attentions: Layers | None = None

    def __repr__(self) -> str:
        given = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)
        return brief_fields(self, given)


@dataclasses.dataclass(eq=False, repr=False)
class GenerateOutput(ModelOutput, Generic[Array]):
    """The finished rows: prompt 0's `num_return_sequences`, then prompt 1's, and so on.

    It is a mapping too, of the fields that are there.

    Attributes:
        sequences: the wing's whole numbers (rows, columns): prompts as given, new tokens, then the padding id.
        sequences_scores: float64 (rows,), beam searches only: log probability / length ** length_penalty.
        scores, logits: where asked, one entry a step, as in `TokenStep`; a beam search's have prompts * num_beams rows.
        beam_indices: int64 (rows, new columns), beam searches only: the row of the step's logits from which each
            token was chosen, -1 after the end.
        attentions, hidden_states: where asked, one entry a step, as in `TokenStep`.
        past_key_values: with return_dict_in_generate and use_cache, greedy or sampled: the `KVCache` of all columns but
            the last, which a call with the last token and the whole attention_mask goes on from.
        lengths: int64 (rows,): where each row's padding begins; `sequences[r, :lengths[r]]` is the row.
        seeds: the seed of each row's draws: to be passed again, also where none was given.
    """

    sequences: Array
    sequences_scores: NDArray[np.float64] | None = None
    scores: tuple[NDArray[Any], ...] | None = None
    logits: tuple[NDArray[Any], ...] | None = None
    beam_indices: NDArray[np.int64] | None = None
    attentions: tuple[Layers, ...] | None = None
    hidden_states: tuple[Layers, ...] | None = None
    past_key_values: KVCache[Array] | None = None
    lengths: NDArray[np.int64] | None = None
    seeds: tuple[int, ...] = ()

    def without_columns(self, count: int) -> GenerateOutput[Array]:
        """The output without the first `count` columns of its rows."""
        if not count:
            return self
        lengths = None if self.lengths is None else self.lengths - count
        rows: Any = self.sequences
        return dataclasses.replace(self, sequences=rows[:, count:], lengths=lengths)


Mapping.register(GenerateOutput)


def transition_scores(
    sequences: NDArray[np.int64],
    scores: Sequence[NDArray[Any]],
    beam_indices: NDArray[np.int64] | None = None,
    *,
    normalize_logits: bool = False,
) -> NDArray[Any]:
    """The score that each new token had when it was chosen, (rows, new), 0 after a beam search's row has ended.

    Args:
        sequences: whole numbers (rows, columns), whose last columns are the new tokens.
        scores: a step each, (rows of the search, v).
        beam_indices: (rows, new), which row of a step's scores chose the token, -1 after the end; None: its own.
        normalize_logits: log_softmax of the scores first.

    Raises:
        InputError: they do not belong together.

    >>> import numpy as np
    >>> transition_scores(np.array([[7, 1, 0]]), [np.array([[0.0, 3.0]]), np.array([[5.0, 1.0]])]).tolist()
    [[3.0, 5.0]]
    """
    if not len(scores):
        raise InputError("no scores", where="scores", hint="Generate with output_scores=True")
    rows = (
        np.arange(len(sequences))[:, None].repeat(len(scores), 1) if beam_indices is None else np.asarray(beam_indices)
    )
    new = int((rows >= 0).sum(axis=1).max())
    stacked = np.stack(scores)
    fits = rows.ndim == 2 and rows.shape[0] == len(sequences) and new <= min(len(scores), sequences.shape[1])
    if stacked.ndim != 3 or not fits or rows.max() >= stacked.shape[1]:
        found = f"{len(scores)} steps {stacked.shape[1:]} for {sequences.shape}"
        raise InputError("not the scores of these sequences", where="scores", found=found)
    if normalize_logits:
        stacked = log_softmax(stacked.astype(np.float64)).astype(stacked.dtype)
    rows = rows[:, :new]
    tokens = sequences[:, sequences.shape[1] - new :]
    chosen = stacked[np.arange(new), np.maximum(rows, 0), tokens]
    return np.where(rows >= 0, chosen, np.zeros((), stacked.dtype))
