"""One text that is being made: its session, its text so far, and who listens.

A continuation is chosen by a `Session` of its own with one row, the same that `generate` would make of its prompt, its
settings and its seed. So its tokens are those of a lone run, whatever else is in the batch, as far as the model gives
the same logits in batches of other sizes: in float32 they differ in the last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptj.generation import Step
from gptj.generation.sampling import best, log_softmax
from gptj.generation.session import Session

__all__ = [
    "Continuation",
    "Failed",
    "Listener",
    "Piece",
    "Scored",
    "TextDecoder",
    "TokenScores",
    "Transcript",
    "no_decoder",
]


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How likely the model held a token to be, before any processor and any temperature.

    Attributes:
        token: which.
        logprob: the natural logarithm of its probability; None for a prompt's first, which nothing predicts.
        top: the likeliest tokens in its place with theirs, the best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: NDArray[Any], token: int, count: int) -> TokenScores:
        """The scores of a token by the logits (v,) of its place, with the `count` likeliest."""
        scores = log_softmax(logits)
        top = tuple((int(i), float(scores[i])) for i in best(scores, count)) if count else ()
        return cls(token, float(scores[token]), top)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One more token of a continuation.

    Attributes:
        token: which; None where the text ended without one, as where no token was asked for.
        text: what it adds to the text, often a word, sometimes nothing; held back where a stop may have begun.
        scores: where asked.
        finish: why the text ends here: "stop" or "length"; None where it goes on.
    """

    token: int | None
    text: str
    scores: TokenScores | None = None
    finish: str | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of every token of a prompt."""

    prompt: tuple[TokenScores, ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """The error that ended a continuation."""

    error: BaseException


def no_decoder(batch: int, capacity: int) -> Any:
    """The decoder of a continuation's session, which has none: the engine has them."""
    raise NotImplementedError("the engine has the decoders")


Listener = Callable[[Piece | Scored | Failed], None]
"""Is told what happens to a continuation, in the engine's thread."""


class TextDecoder(Protocol):
    """Token ids in, text out: a tokenizer's `TextStream`, or the ids themselves."""

    def push(self, token_ids: Any) -> str:
        """The text of one or several more ids."""

    def finish(self) -> str:
        """The rest: the text of a token that waited for the next."""


class Transcript:
    """The text of a continuation, up to the first stop string, which is no part of it.

    What may be the beginning of a stop string is held back until the next token says.

    Args:
        decoder: of the text.
        stops: the stop strings.
    """

    def __init__(self, decoder: TextDecoder, stops: Sequence[str] = ()) -> None:
        self._decoder, self._stops = decoder, tuple(stops)
        self._held = ""

    def push(self, token: int | None) -> tuple[str, bool]:
        """The text that a token adds, and whether a stop string ends it; None for a token that is no text."""
        self._held += "" if token is None else self._decoder.push([token])
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._begun(stop) for stop in self._stops), default=0)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return said, False

    def finish(self) -> str:
        """The text that was held back, where no token follows."""
        return self._held + self._decoder.finish()

    def _begun(self, stop: str) -> int:
        """How many of the last characters are the first of `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)


class Continuation:
    """One prompt's one continuation.

    Args:
        prompt: its token ids, int64 (t,).
        session: with one row, which chooses its tokens; None where none is wanted.
        transcript: its text.
        listener: is told every piece.
        scores: how many of the likeliest tokens to tell of each place; None where no scores are asked for.
        scores_prompt: whether those of the prompt's tokens are asked for, too.
        adapter: which of the model's adapters computes it.
        is_copy: whether another continuation, of the same request and prompt, counts the prompt's tokens.

    Attributes:
        ended: whether there will be no more of it.
        failed: whether an error ended it.
        left: set by anybody, at any time, when nobody listens any more; its row is freed before the next step.
        reused: how many of the prompt's tokens were not computed again.
    """

    def __init__(
        self,
        prompt: NDArray[np.int64],
        session: Session | None,
        transcript: Transcript,
        listener: Listener,
        *,
        scores: int | None = None,
        scores_prompt: bool = False,
        adapter: str | None = None,
        is_copy: bool = False,
    ) -> None:
        self.prompt, self.session = prompt, session
        self.scores, self.scores_prompt, self.adapter = scores, scores_prompt, adapter
        self._transcript, self._listener = transcript, listener
        self.is_copy = is_copy
        self.left = self.ended = self.failed = False
        self.reused = 0

    @property
    def last_token(self) -> int:
        """The token that was chosen last, which the model has not read."""
        assert self.session is not None
        return int(self.session.ids[0, self.session.columns - 1])

    @property
    def cached(self) -> int:
        """How many of its tokens the model has read, once its prompt was."""
        return len(self.prompt) if self.session is None else self.session.columns - 1

    @property
    def longest(self) -> int:
        """How many tokens it will have at most."""
        return len(self.prompt) if self.session is None else self.session.total_length

    def choose(self, step: Step) -> int | None:
        """Choose the next token by the logits (1, v), tell it, and return it; None where none is wanted.

        Raises:
            GPTJError: the logits are not finite, or no token is left.
        """
        session = self.session
        if session is None:
            self._tell(Piece(None, self._transcript.finish(), finish="length"))
            return None
        tokens, scores = session.next_tokens(step)
        token = int(tokens[0])
        made = session.append(tokens, step, scores)
        is_eos = token in session.config.eos_token_ids
        text, stopped = self._transcript.push(None if is_eos else token)
        finish = None
        if is_eos or stopped or made.ended[0]:  # the folder's own stop strings end it before its length, too
            finish = "stop" if is_eos or stopped or session.columns < session.total_length else "length"
        if finish is not None and not stopped:
            text += self._transcript.finish()
        found = None if self.scores is None else TokenScores.of(step.logits[0], token, self.scores)
        self._tell(Piece(token, text, found, finish))
        return token

    def tell_scores(self, prompt: Sequence[TokenScores]) -> None:
        """Tell the prompt's scores."""
        self._listener(Scored(tuple(prompt)))

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.ended = self.failed = True
        self._listener(Failed(error))

    def _tell(self, piece: Piece) -> None:
        self.ended = piece.finish is not None
        self._listener(piece)
