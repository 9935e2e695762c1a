"""What generation hands back: a `TokenStep` after each step, and a `GenerateOutput` at the end."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from gptj.brief import brief, brief_fields, html_table
from gptj.outputs import Array

__all__ = ["GenerateOutput", "TokenStep"]

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
        return brief_fields(self, _given(self))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GenerateOutput(Generic[Array]):
    """The finished rows: prompt 0's `num_return_sequences`, then prompt 1's, and so on.

    Attributes:
        sequences: the wing's whole numbers (rows, columns): prompts as given, new tokens, then the padding id.
        lengths: int64 (rows,): where each row's padding begins; `sequences[r, :lengths[r]]` is the row.
        seeds: the seed of each row's draws: to be passed again, also where none was given.
        sequences_scores: float64 (rows,), beam searches only: log probability / length ** length_penalty.
        beam_indices: int64 (rows, new columns), beam searches only: the row of the step's logits from which each
            token was chosen, -1 after the end.
        logits, scores, hidden_states, attentions: where asked, one entry a step, as in `TokenStep`; a beam search's
            have prompts * num_beams rows.
    """

    sequences: Array
    lengths: NDArray[np.int64]
    seeds: tuple[int, ...] = ()
    sequences_scores: NDArray[np.float64] | None = None
    beam_indices: NDArray[np.int64] | None = None
    logits: tuple[NDArray[Any], ...] | None = None
    scores: tuple[NDArray[Any], ...] | None = None
    hidden_states: tuple[Layers, ...] | None = None
    attentions: tuple[Layers, ...] | None = None

    def __repr__(self) -> str:
        return brief_fields(self, _given(self))

    def _repr_html_(self) -> str:
        """The fields that are there, for a notebook."""
        rows = [(name, brief(getattr(self, name))) for name in _given(self)]
        return html_table("GenerateOutput", rows, ("field", "value"))


def _given(value: Any) -> tuple[str, ...]:
    """The names of the fields that are there."""
    return tuple(f.name for f in dataclasses.fields(value) if getattr(value, f.name) is not None)
