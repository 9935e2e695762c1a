"""Contrastive search (Su et al. 2022, arXiv:2202.06417): probable, but unlike what has been said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.generation.output import TokenStep
from gptj.generation.sampling import best, softmax
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
    context, seen = _last_hidden(result), session.prompt_mask
    decoder.select(np.repeat(np.arange(prompts), k))
    while True:
        scores = session.adjust(session.ids[:, : session.columns], result.logits)
        session.choose(scores, session.index)  # refuses a row that has no token left
        candidates = np.stack([best(row, k) for row in scores])
        tried = decoder.step(candidates.reshape(-1), want=want)
        hidden = _last_hidden(tried).reshape(prompts, k, -1)
        winners = np.zeros(prompts, np.int64)
        for n in np.flatnonzero(session.running):
            probabilities = softmax(scores[n])[candidates[n]]
            value = (1 - alpha) * probabilities - alpha * degeneration(context[n, seen[n]], hidden[n])
            value[np.isneginf(scores[n, candidates[n]])] = -np.inf  # what a processor forbade stays forbidden
            winners[n] = np.argmax(value)
        yield session.append(candidates[np.arange(prompts), winners], result, scores)
        if session.ended.all():
            return
        context = np.concatenate([context, hidden[np.arange(prompts), winners][:, None]], axis=1)
        seen = np.concatenate([seen, np.ones((prompts, 1), bool)], axis=1)
        rows = np.arange(prompts) * k + winners
        decoder.select(np.repeat(rows, k))
        result = tried.select(rows)


def degeneration(context: NDArray[Any], candidates: NDArray[Any]) -> Floats:
    """How much each of the candidates, (k, m), repeats one of the context, (n, m): the largest cosine, (k,)."""
    return np.asarray((_unit(candidates) @ _unit(context).T).max(axis=1))


def _unit(vectors: NDArray[Any]) -> Floats:
    exact = vectors.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=-1, keepdims=True))


def _last_hidden(result: Any) -> NDArray[Any]:
    """The last hidden states (after ln_f) of a step, (b, n, m)."""
    return np.asarray(result.hidden_states[-1])
