"""A request's JSON, read field by field: each has its rule, and nothing is ignored in silence.

A field that OpenAI has and this server cannot do is refused by name, unless its value asks for nothing. A field that
nobody knows is refused, too, with the one that may have been meant. null is the same as left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from gptj.errors import did_you_mean, shown
from gptj.serving.refusals import Refusal

__all__ = ["CompletionRequest", "Prompt", "Sampling", "read_chat", "read_completion", "read_json"]

Prompt = str | tuple[int, ...]
"""A text, or token ids."""

MOST_CHOICES, MOST_STOPS, MOST_SCORES = 128, 64, 20

MOST_DIGITS = 1000
"""Of an integer, whatever it is for: Python's own bound can be moved from outside."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None is what the folder or OpenAI says.

    Attributes:
        temperature, top_p, top_k, min_p: of the draws; temperature 0 is greedy.
        repetition_penalty: above 1, said tokens are unlikelier.
        presence_penalty, frequency_penalty: taken off the logits of tokens that were made: once, and each time.
        logit_bias: added to these tokens' logits.
        seed: of the draws.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A checked request for completions.

    Attributes:
        model: the name that it asks for.
        prompts: each to be continued, `n` times; empty where `messages` are.
        messages: of a chat.
        max_tokens: new ones at most; None is the default.
        length_field: the field that says so.
        sampling: how.
        stop: texts that end a completion.
        stream: whether to answer piece by piece, `include_usage` with the counts at the end.
        echo: whether the answer begins with the prompt.
        scores: how many likely tokens to tell of each place; None: no scores.
        return_token_ids: whether to tell the ids of what was made.
    """

    model: str
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None = None
    length_field: str = "max_tokens"
    sampling: Sampling = Sampling()
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    scores: int | None = None
    return_token_ids: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it has messages."""
        return bool(self.messages)

    @property
    def text_field(self) -> str:
        """The field that its text came in."""
        return "messages" if self.is_chat else "prompt"


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a request's body is.

    Raises:
        Refusal: it is not UTF-8, not JSON, has a name twice or a number that is none, or is no object.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_whole)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body nests too deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        said = "a byte order mark" if "BOM" in error.msg else error.msg.removesuffix(" at")
        raise Refusal(400, f"the body is not JSON: {said} at character {error.pos}", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body is no JSON object", code="invalid_json")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{shown(name, longest=60)} stands twice in an object")
        result[name] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


class _Fields:
    """The members of a request, each to be taken once.

    Args:
        members: the request.
        unsupported: those that OpenAI has and we have not, with the values that ask for nothing.
    """

    def __init__(self, members: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        self._members = _without_null(members)
        self._unsupported = unsupported
        self._known: set[str] = set()

    def take(self, name: str, expected: str, read: Callable[[Any], Any], default: Any = None) -> Any:
        """The member, made of its value by `read`, which returns None or raises where that breaks the rule."""
        self._known.add(name)
        if name not in self._members:
            return default
        value = self._members.pop(name)
        try:
            found = read(value)
        except (TypeError, ValueError, OverflowError):
            found = None
        if found is None:
            raise Refusal.of_field(name, expected, value)
        return found

    def number(self, name: str, low: float, high: float, default: Any = None) -> Any:
        """The member as a finite number of `low` to `high`."""

        def read(value: Any) -> float | None:
            fits = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
            return value if fits else None

        return self.take(name, f"a number, {low:g} to {high:g}", read, default)

    def whole(self, name: str, low: int, high: int, default: Any = None) -> Any:
        """The member as a whole number of `low` to `high`."""
        rule = f"a whole number, {low} to {high}"
        return self.take(name, rule, lambda v: v if type(v) is int and low <= v <= high else None, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """The member as a bool."""
        found: bool = self.take(name, "true or false", lambda v: v if isinstance(v, bool) else None, default)
        return found

    def finish(self) -> None:
        """Refuse what was not taken."""
        for name in _HARMLESS:
            self.take(name, "a text", lambda value: value if isinstance(value, str) else None)
        self.take("metadata", "an object", lambda value: value if isinstance(value, dict) else None)
        for name, value in self._members.items():
            if name in self._unsupported:
                value = _without_null(value) if isinstance(value, dict) else value
                if not any(type(value) is type(one) and value == one for one in self._unsupported[name]):
                    raise Refusal(400, f"{name} is not supported", param=name, code="unsupported_parameter")
                continue
            hint = did_you_mean(name, self._known)
            said = f"unknown field {shown(name, longest=60)}" + (f". {hint}" if hint else "")
            param = name[:60] if _is_spelt(name) else None
            raise Refusal(400, said, param=param, code="unknown_parameter")


_HARMLESS = ("user", "prompt_cache_key", "safety_identifier", "service_tier")
"""They name the caller, or a price, and change nothing of an answer; nor does metadata."""

_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
_OF_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}


def read_completion(members: Mapping[str, Any]) -> CompletionRequest:
    """The request of /v1/completions.

    Raises:
        Refusal: naming the field and its rule.
    """
    fields = _Fields(members, _OF_COMPLETIONS)
    rule = "a text, a list of texts, token ids, or a list of lists of them; none of them empty"
    prompts = fields.take("prompt", rule, _prompts)
    request = _read_common(
        fields,
        prompts=prompts,
        echo=fields.flag("echo"),
        scores=fields.whole("logprobs", 0, MOST_SCORES),
        max_tokens=fields.whole("max_tokens", 0, 2**31),
    )
    best_of = fields.whole("best_of", 1, MOST_CHOICES)
    if best_of not in (None, request.n):
        said = f"best_of is not supported but as n, which is {request.n}"
        raise Refusal(400, said, param="best_of", code="unsupported_parameter")
    fields.finish()
    if prompts is None:
        raise Refusal(400, f"prompt is missing: {rule}", param="prompt", code="missing_parameter")
    return request


def read_chat(members: Mapping[str, Any]) -> CompletionRequest:
    """The request of /v1/chat/completions.

    Raises:
        Refusal: naming the field and its rule.
    """
    fields = _Fields(members, _OF_CHAT)
    rule = f"a list of messages, each {_MESSAGE}"
    messages = fields.take("messages", rule, _messages)
    asked = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_SCORES)
    if top is not None and not asked:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    lengths = [fields.whole(name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")]
    if None not in lengths and lengths[0] != lengths[1]:
        raise Refusal(400, "max_tokens contradicts max_completion_tokens", param="max_tokens", code="invalid_value")
    request = _read_common(
        fields,
        messages=messages,
        scores=(top or 0) if asked else None,
        max_tokens=lengths[1] if lengths[0] is None else lengths[0],
        length_field="max_tokens" if lengths[0] is None else "max_completion_tokens",
    )
    fields.finish()
    if messages is None:
        raise Refusal(400, f"messages is missing: {rule}", param="messages", code="missing_parameter")
    return request


def _read_common(fields: _Fields, **own: Any) -> CompletionRequest:
    """The fields that both kinds have, with those of one."""
    model = fields.take("model", "a model's name", lambda v: v if isinstance(v, str) and v else None)
    if model is None:
        raise Refusal(400, "model is missing: GET /v1/models names it", param="model", code="missing_parameter")
    stream = fields.flag("stream")
    options = fields.take("stream_options", '{"include_usage": true or false}', _stream_options)
    if options is not None and not stream:
        raise Refusal(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 100),
        top_p=fields.number("top_p", 0, 1),
        top_k=fields.whole("top_k", 0, 2**31 - 1),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        logit_bias=fields.take("logit_bias", "an object of token ids and numbers, -100 to 100", _biases, {}),
        seed=fields.take("seed", "a whole number, -2**63 to 2**64 - 1", _seed),
    )
    return CompletionRequest(
        model=model,
        sampling=sampling,
        n=fields.whole("n", 1, MOST_CHOICES, 1),
        stop=fields.take("stop", f"a text, or up to {MOST_STOPS} of them, none of them empty", _stops, ()),
        stream=stream,
        include_usage=bool(options),
        return_token_ids=fields.flag("return_token_ids"),
        **{name: value for name, value in own.items() if value is not None or name in ("scores", "max_tokens")},
    )


# ---- how a value is read; None and errors are refusals


def _without_null(members: Mapping[str, Any]) -> dict[str, Any]:
    """An object's members without those that are null, which is the same as left out, at every depth of ours."""
    return {name: value for name, value in members.items() if value is not None}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def _prompts(value: Any) -> tuple[Prompt, ...] | None:
    if isinstance(value, str):
        return (value,) if _is_said(value) else None
    if _is_ids(value):
        return (tuple(value),)
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(one, str) and _is_said(one) for one in value):
        return tuple(value)
    return tuple(map(tuple, value)) if all(map(_is_ids, value)) else None


def _is_said(text: str) -> bool:
    """Whether a text says anything that UTF-8 can spell."""
    return bool(text) and _is_spelt(text)


def _is_spelt(text: str) -> bool:
    """Whether UTF-8 can spell a text: JSON's escapes can be half a character."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _stops(value: Any) -> tuple[str, ...] | None:
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    return tuple(stops) if fits and all(isinstance(one, str) and _is_said(one) for one in stops) else None


def _biases(value: Any) -> dict[int, float] | None:
    if not isinstance(value, dict):
        return None
    fits = all(
        name.isascii() and name.isdigit() and len(name) < 10 and type(bias) in (int, float) and -100 <= bias <= 100
        for name, bias in value.items()
    )
    biases = {int(name): float(bias) for name, bias in value.items()} if fits else {}
    return biases if len(biases) == len(value) else None


def _seed(value: Any) -> int | None:
    return value % 2**64 if type(value) is int and -(2**63) <= value < 2**64 else None


def _stream_options(value: Any) -> bool | None:
    options = _without_null(value) if isinstance(value, dict) else {"": None}
    known = options.keys() <= {"include_usage", "include_obfuscation"}
    if not known or not all(isinstance(one, bool) for one in options.values()) or options.get("include_obfuscation"):
        return None
    return bool(options.get("include_usage", False))


_ROLES = ("system", "developer", "user", "assistant")
_MESSAGE = "an object with role (system, developer, user or assistant) and content, a text"

_OF_ANSWERS = ("annotations", "tool_calls")
"""Lists in a message of OpenAI's answers, which say nothing where they are empty, and come back with a conversation."""


def _messages(value: Any) -> tuple[dict[str, str], ...] | None:
    if not isinstance(value, list) or not value:
        return None
    read = []
    for number, one in enumerate(value):
        try:
            read.append(_message(one))
        except ValueError:
            raise Refusal.of_field("messages", _MESSAGE, one, place=f"messages[{number}]") from None
    return tuple(read)


def _message(value: Any) -> dict[str, str]:
    """A message's role and text, its name too; ValueError where it is another."""
    if not isinstance(value, dict):
        raise ValueError
    value = {name: one for name, one in _without_null(value).items() if name not in _OF_ANSWERS or one != []}
    known = value.keys() <= {"role", "content", "name"}
    if not known or value.get("role") not in _ROLES:
        raise ValueError
    content = value.get("content")
    if isinstance(content, list) and content:
        parts = [_without_null(part) for part in content if isinstance(part, dict)]
        texts = all(part.keys() == {"type", "text"} and part["type"] == "text" for part in parts)
        if len(parts) < len(content) or not texts:
            raise ValueError
        content = "".join(part["text"] for part in parts)
    name = value.get("name")
    if not isinstance(content, str) or not isinstance(name, str | None):
        raise ValueError
    if not (_is_spelt(content) and _is_spelt(name or "")):
        raise ValueError
    role = "system" if value["role"] == "developer" else value["role"]
    return {"role": role, "content": content, **({} if name is None else {"name": name})}
