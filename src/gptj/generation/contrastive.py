"""Contrastive search (Su et al. 2022, arXiv:2202.06417): probable, but unlike what has been said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.generation.output import TokenStep
from gptj.generation.sampling import best, softmax_of
from gptj.generation.session import Session

__all__ = ["contrastive_steps", "degeneration"]

Floats = NDArray[np.float64]


def contrastive_steps(session: Session) -> Iterator[TokenStep]:
    """Each step tries the top_k tokens in the model and takes the best of (1 - alpha) * p - alpha * degeneration.

    The cache holds top_k rows a prompt, one for each candidate, so that its shape never changes; a step is one
    model call over all of them. Among equals the more probable token is the better, then the lower id.
    """
    config, prompts = session.config, len(session.prompt)
    alpha, k = config.penalty_alpha or 0.0, min(config.top_k, session.model_config.vocab_size)
    want = session.want | {"hidden_states"}
    decoder = session.decoder()
    result = session.prefill(decoder, copies=1, want=want)
    context = _Context(_last_hidden(result), session.prompt_mask, session.total_length)
    decoder.select(np.repeat(np.arange(prompts), k))
    while True:
        scores = session.adjust(session.ids[:, : session.columns], result.logits)
        session.choose(scores, session.index)  # refuses a row that has no token left
        candidates = np.stack([best(row, k) for row in scores])
        tried = decoder.step(candidates.reshape(-1), want=want)
        hidden = _last_hidden(tried).reshape(prompts, k, -1)
        winners = np.zeros(prompts, np.int64)
        for n in np.flatnonzero(session.running):
            probabilities = softmax_of(scores[n], candidates[n])
            value = (1 - alpha) * probabilities - alpha * context.degeneration(int(n), hidden[n])
            value[np.isneginf(scores[n, candidates[n]])] = -np.inf  # what a processor forbade stays forbidden
            winners[n] = np.argmax(value)
        yield session.append(candidates[np.arange(prompts), winners], result, scores)
        if session.ended.all():
            return
        context.append(hidden[np.arange(prompts), winners])
        rows = np.arange(prompts) * k + winners
        decoder.select(np.repeat(rows, k))
        result = tried.select(rows)


class _Context:
    """The hidden states of every row so far as unit vectors, each made one once.

    Args:
        hidden: of the prompts, (b, t, m).
        mask: bool (b, t), True where a column is a token; padding is on the left.
        most: columns that there may be.
    """

    def __init__(self, hidden: NDArray[Any], mask: NDArray[np.bool_], most: int) -> None:
        self._starts = np.argmax(mask, axis=1)
        self._columns = hidden.shape[1]
        self._units = np.empty((len(hidden), most, hidden.shape[2]))
        for row, start in enumerate(self._starts):
            self._units[row, start : self._columns] = _unit(hidden[row, start:])

    def append(self, hidden: NDArray[Any]) -> None:
        """Take every row's next one, (b, m)."""
        self._units[:, self._columns] = _unit(hidden)
        self._columns += 1

    def degeneration(self, row: int, candidates: NDArray[Any]) -> Floats:
        """As the function of this name, of a row."""
        return _repetition(_unit(candidates), self._units[row, self._starts[row] : self._columns])


def degeneration(context: NDArray[Any], candidates: NDArray[Any]) -> Floats:
    """How much each of the candidates, (k, m), repeats one of the context, (n, m): the largest cosine, (k,)."""
    return _repetition(_unit(candidates), _unit(context))


def _repetition(candidates: Floats, context: Floats) -> Floats:
    return np.asarray((candidates @ context.T).max(axis=1))


def _unit(vectors: NDArray[Any]) -> Floats:
    exact = vectors.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=-1, keepdims=True))


def _last_hidden(result: Any) -> NDArray[Any]:
    """The last hidden states (after ln_f) of a step, (b, n, m)."""
    return np.asarray(result.hidden_states[-1])
