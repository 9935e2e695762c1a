"""Answers: OpenAI's objects, whole or piece by piece, for completions and for chats."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from gptj.serving.continuation import Piece, Scored, TokenScores
from gptj.serving.requests import CompletionRequest
from gptj.serving.service import Choice, Service

__all__ = ["DONE", "Answer", "event"]

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """A server-sent event of JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class Answer:
    """The answer to a request, while its choices are made.

    Args:
        service: what is served.
        request: the checked request.
        choices: what it asks for.
    """

    def __init__(self, service: Service, request: CompletionRequest, choices: Sequence[Choice]) -> None:
        self._service, self._request = service, request
        self._choices = [_ChoiceAnswer(service, request, choice) for choice in choices]
        self._head = {
            "id": ("chatcmpl-" if request.is_chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if request.is_chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        prompts = {choice.index // request.n: len(choice.ids) for choice in choices}
        self._prompt_tokens = sum(prompts.values())
        self.reused = 0

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self._choices)

    def begin(self) -> Iterator[bytes]:
        """The events that a stream begins with."""
        if self._request.is_chat:
            for choice in self._choices:
                yield self._chunk(choice.index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def add(self, index: int, told: Piece | Scored) -> bytes | None:
        """Take what a continuation told, and return the event of it, None where there is nothing to say yet."""
        choice = self._choices[index]
        part = choice.add(told)
        if part is None:
            return None
        text, scores = part
        told_ids: dict[str, Any] = {}
        if self._request.return_token_ids and isinstance(told, Piece) and told.token is not None:
            told_ids = {"token_ids": [told.token]}
        if self._request.is_chat:
            delta = {"content": text} if text or choice.finish is None else {}
            return self._chunk(index, {"delta": delta, "logprobs": scores, **told_ids}, choice.finish)
        return self._chunk(index, {"text": text, "logprobs": scores, **told_ids}, choice.finish)

    def end(self) -> Iterator[bytes]:
        """The events that a stream ends with."""
        if self._request.include_usage:
            yield event({**self._chunk_head, "choices": [], "usage": self._usage})
        yield DONE

    @property
    def whole(self) -> dict[str, Any]:
        """The answer in one object, once all is done."""
        return {**self._head, "choices": [choice.whole for choice in self._choices], "usage": self._usage}

    @property
    def _usage(self) -> dict[str, Any]:
        made = sum(len(choice.tokens) for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._request.is_chat else "text_completion"}

    def _chunk(self, index: int, fields: dict[str, Any], finish: str | None) -> bytes:
        usage = {"usage": None} if self._request.include_usage else {}
        choice = {"index": index, **fields, "finish_reason": finish}
        return event({**self._chunk_head, "choices": [choice], **usage})


class _ChoiceAnswer:
    """One choice: its text, its tokens and their scores.

    Attributes:
        index: which.
        tokens: that were made.
        finish: why it ended, None while it goes on.
    """

    def __init__(self, service: Service, request: CompletionRequest, choice: Choice) -> None:
        self._service, self._request, self._choice = service, request, choice
        self.index = choice.index
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._text: list[str] = []
        self._scores: list[TokenScores] = []
        self._spelling = _Spelling(service, request)
        self._parts: list[dict[str, Any]] = []
        self._begun = False

    def add(self, told: Piece | Scored) -> tuple[str, dict[str, Any] | None] | None:
        """The text and the scores that it adds to the choice, None for nothing."""
        if isinstance(told, Scored):
            self._scores = list(told.prompt)
            return None
        scores, text = self._scores, told.text
        self._scores = []
        if self._request.echo and not self._begun:
            text = self._service.text(self._choice.prompt) + text
        self._begun = True
        if told.token is not None:
            self.tokens.append(told.token)
        if told.scores is not None:
            scores = [*scores, told.scores]
        self.finish = told.finish
        self._text.append(text)
        part = self._spelling.spell(scores) if self._request.scores is not None else None
        if part is not None:
            self._parts.append(part)
        if not text and not scores and told.finish is None and not self._request.return_token_ids:
            return None
        return text, part

    @property
    def whole(self) -> dict[str, Any]:
        """The choice in one object."""
        text = "".join(self._text)
        scores = _joined(self._parts) if self._request.scores is not None else None
        ids = {"token_ids": self.tokens} if self._request.return_token_ids else {}
        message = {"role": "assistant", "content": text, "refusal": None}  # OpenAI's answers have all three
        said = {"message": message} if self._request.is_chat else {"text": text}
        return {"index": self.index, **said, "logprobs": scores, "finish_reason": self.finish, **ids}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of the parts put together; what is null in them stays null."""
    lists = [name for name, found in parts[0].items() if found is not None]
    return {**parts[0], **{name: [one for part in parts for one in part[name]] for name in lists}}


class _Spelling:
    """Scores as an answer spells them, one token after another."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service, self._request = service, request
        self._decoder = service.decoder()
        self._offset = 0

    def spell(self, scores: Sequence[TokenScores]) -> dict[str, Any]:
        """The logprobs object of these tokens."""
        if self._request.is_chat:
            return {"content": [self._of_chat(one) for one in scores], "refusal": None}
        offsets = []
        for one in scores:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push([one.token]))
        return {
            "tokens": [self._service.spell(one.token) for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [self._top(one) for one in scores],
            "text_offset": offsets,
        }

    def _top(self, one: TokenScores) -> dict[str, float] | None:
        """The likeliest tokens, and this one; of two that are spelt alike, the likelier."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._service.spell(token), logprob)
        return found

    def _of_chat(self, one: TokenScores) -> dict[str, Any]:
        top = [self._entry(token, logprob) for token, logprob in one.top]
        return {**self._entry(one.token, one.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._service.spell(token), "logprob": logprob, "bytes": self._service.bytes_of(token)}
