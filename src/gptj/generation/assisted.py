"""Assisted decoding: guess several tokens cheaply, check them with one call of the model, keep the right ones.

A guess is right if it is the very token that the model's own turn would have chosen: the best one, or the one
drawn with the uniform number that belongs to that step and row. So the output is not only distributed as without
assistance (what the rejection rule of speculative sampling, arXiv:2211.17192, achieves); it is the same output. And
an assistant that draws its guesses with the same numbers is right often: the two draws are coupled.

Rows of a batch advance together: a round keeps as many tokens as every row that has not ended got right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.errors import InputError
from gptj.generation.decoder import DecoderFactory, Step
from gptj.generation.output import TokenStep
from gptj.generation.sampling import softmax
from gptj.generation.session import Session

__all__ = ["AssistantGuesses", "Guesses", "PromptLookup", "assisted_steps", "look_up"]

Ids = NDArray[np.int64]


class Guesses(Protocol):
    """The source of guesses."""

    def guess(self, session: Session, most: int) -> Ids:
        """At most `most` tokens to follow each row's: int64 (rows, n), n 0 for no idea."""

    def learn(self, guessed: int, right: int) -> None:
        """Hear how many of a round's guesses were right."""


def assisted_steps(session: Session, guesses: Guesses) -> Iterator[TokenStep]:
    """The steps of `plain_steps`, several from each call of the model."""
    decoder = session.decoder()
    result = session.prefill(decoder, copies=session.copies, want=session.want)
    tokens, scores = session.next_tokens(result)
    yield session.append(tokens, result, scores)
    while not session.ended.all():
        # The last step of a round comes from the model alone, so one column fewer is to be guessed.
        guessed = guesses.guess(session, session.total_length - session.columns - 1)
        last = np.where(session.ended, 0, session.ids[:, session.columns - 1])
        result = decoder.extend(np.concatenate([last[:, None], guessed], axis=1), want=session.want)
        right = 0
        for n in range(guessed.shape[1] + 1):
            here = result.position(n)
            tokens, scores = session.next_tokens(here)
            yield session.append(tokens, here, scores)
            if session.ended.all():
                return
            if n == guessed.shape[1] or (session.running & (tokens != guessed[:, n])).any():
                break
            right += 1
        guesses.learn(guessed.shape[1], right)
        decoder.truncate(session.columns - 1)


class PromptLookup:
    """Guesses by finding a row's last few tokens earlier in the row (github.com/apoorvumang/prompt-lookup-decoding)."""

    def __init__(self, count: int, ngram_size: int) -> None:
        self._count = count
        self._ngram_size = ngram_size

    def guess(self, session: Session, most: int) -> Ids:
        """The tokens after the earlier occurrence of each row's last ngram; short ones are filled up with token 0."""
        found = [
            look_up(session.ids[r, session.starts[r] : session.columns], min(self._count, most), self._ngram_size)
            for r in np.flatnonzero(session.running)
        ]
        guessed = np.zeros((len(session.ids), max(len(f) for f in found)), np.int64)
        for row, ids in zip(np.flatnonzero(session.running), found, strict=True):
            guessed[row, : len(ids)] = ids
        return guessed

    def learn(self, guessed: int, right: int) -> None:
        """Nothing to learn."""


def look_up(ids: Ids, count: int, ngram_size: int) -> Ids:
    """At most `count` ids that follow the first earlier occurrence of the last ngram; shorter ngrams if none.

    >>> import numpy as np
    >>> look_up(np.array([5, 1, 2, 7, 8, 9, 1, 2]), 2, 3)
    array([7, 8])
    """
    for size in range(min(ngram_size, len(ids) - 1), 0, -1):
        earlier = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        places = np.flatnonzero((earlier == ids[-size:]).all(axis=1))
        if len(places):
            after = int(places[0]) + size
            return ids[after : after + max(count, 0)]
    return ids[:0]


class AssistantGuesses:
    """Guesses by a smaller model, by the same processors, and drawn with the same numbers.

    Args:
        session: the generation that is assisted.
        factory: makes the assistant's decoders.

    Raises:
        InputError: the assistant has another vocabulary.
    """

    def __init__(self, session: Session, factory: DecoderFactory) -> None:
        self._decoder = factory(len(session.prompt), session.total_length)
        ours, theirs = session.model_config.vocab_size, self._decoder.config.vocab_size
        if ours != theirs:
            raise InputError("another vocabulary than the model's", where="assistant", expected=ours, found=theirs)
        self._count = session.config.num_assistant_tokens
        self._constant = session.config.num_assistant_tokens_schedule == "constant"
        self._threshold = session.config.assistant_confidence_threshold

    def guess(self, session: Session, most: int) -> Ids:
        """Up to num_assistant_tokens of the assistant's own tokens; fewer where it is unsure."""
        count = min(self._count, most)
        ids = session.ids[:, : session.columns].copy()
        ids[session.ended] = 0
        step = self._catch_up(session, ids) if count > 0 else None
        while step is not None:
            chosen, scores = session.next_tokens(step, ids)
            tokens = np.where(session.running, chosen, 0)
            longer = np.concatenate([ids, tokens[:, None]], axis=1)
            enough = longer.shape[1] == session.columns + count or self._unsure(session, step, ids, tokens, scores)
            step, ids = None if enough else self._decoder.step(tokens), longer
        return ids[:, session.columns :]

    def learn(self, guessed: int, right: int) -> None:
        """By the heuristic schedule: two more after a perfect round, else one fewer."""
        if not self._constant and guessed:
            self._count = self._count + 2 if right == guessed else max(1, self._count - 1)

    def _catch_up(self, session: Session, ids: Ids) -> Step:
        """The step after all of `ids`, of which the cache keeps what was guessed right."""
        if self._decoder.length == 0:
            session.prefill(self._decoder, copies=session.copies, want=frozenset())
        self._decoder.truncate(min(self._decoder.length, session.columns - 1))
        return self._decoder.extend(ids[:, self._decoder.length :], last_only=True)

    def _unsure(self, session: Session, step: Step, ids: Ids, tokens: Ids, scores: NDArray[np.float64] | None) -> bool:
        """Whether a running row's guess has less probability than the threshold; scores are made if that is near."""
        if scores is None:
            if session.surely_above(step, ids, tokens, self._threshold):
                return False
            scores = session.adjust(ids, step.logits)
        rows = np.flatnonzero(session.running)
        return bool((softmax(scores[rows])[np.arange(len(rows)), tokens[rows]] < self._threshold).any())
