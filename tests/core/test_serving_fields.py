"""Every field of OpenAI's, with every kind of JSON in it: lawful by a table of its own, or refused by its name.

The table `RULES` is written from OpenAI's reference and docs/serve.md, and not from the reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Served, ToyModel

from gptj.serving.continuation import Continuation
from gptj.serving.refusals import Refusal, refusal_of
from gptj.serving.requests import CompletionRequest, read_chat, read_completion, read_json

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 300, 2**31 + 1, 2**63, 2**64, -(2**70), 10**300, 10**400, 0.0, 0.5, 1.0, 1.5,
    -0.5, 3.5, 101.0, 1e308, 1e-320, "", "a", "1", "true", "null", "auto", "none", "text", "\ud800", "a\x00b", "\u202e",
    [], [None], [[]], [0], [1, 2], [1.5], [True], [2**70], [-1], [300], ["a"], ["a", None], ["a", ""], ["\ud800"],
    ["a", 1], [["a"]], [[1], [2]], [[1], []], [[1], None], [{}], [[[]]], ["a"] * 5, ["a"] * 65, {},
    {"a": None}, {"a": 1}, {"5": 1}, {"5": None}, {"5": "1"}, {"5": True}, {"5": 101}, {"5": 10**400},
    {"05": 1, "5": 1}, {"-1": 1}, {"300": 1}, {"": 1},
    {"include_usage": None}, {"include_usage": True}, {"include_usage": 1}, {"type": "text"}, {"type": None},
    {"type": "text", "json_schema": None}, {"type": "json_object"}, [{"role": "user", "content": "a"}],
    [{"role": "user", "content": None}], [{"role": None, "content": "a"}], ["text"], ["audio"],
]  # fmt: skip

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "n", "stop", "stream", "stream_options", "return_token_ids", "logprobs", "max_tokens",
    "model", "user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier",
)  # fmt: skip
OF_COMPLETIONS = (*SAMPLING, "prompt", "echo", "best_of", "suffix")
OF_CHAT = (
    *SAMPLING, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions",
    "function_call", "parallel_tool_calls", "response_format", "modalities", "audio", "prediction", "reasoning_effort",
    "verbosity", "web_search_options", "store", "prompt_cache_retention", "prompt_cache_options", "moderation",
)  # fmt: skip


def number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and low <= v <= high


def whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda v: any(repr(v) == repr(one) for one in values)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def says(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\ud800" not in value


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(type(i) is int and 0 <= i < 300 for i in value)


def is_prompt(value: Any) -> bool:
    many = isinstance(value, list) and value != [] and (all(map(says, value)) or all(map(is_ids, value)))
    return says(value) or is_ids(value) or many


def are_messages(value: Any) -> bool:
    return value == [{"role": "user", "content": "a"}]


def is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name.isdecimal() and int(name) < 300 and type(v) in (int, float) and abs(v) <= 100 for name, v in value.items()
    ) and len({int(name) for name in value}) == len(value)  # fmt: skip


def are_options(value: Any) -> bool:
    said = {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else {"": None}
    return said == {} or (said.keys() == {"include_usage"} and is_bool(said["include_usage"]))


def draws(value: Any) -> bool:
    return number(0, 100)(value) and (value == 0 or value > 1e-300)


RULES: dict[str, Callable[[Any], bool]] = {
    "temperature": draws, "top_p": number(0, 1), "top_k": whole(0, 2**31 - 1), "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 100), "presence_penalty": number(-2, 2), "frequency_penalty": number(-2, 2),
    "logit_bias": is_bias, "seed": whole(-(2**63), 2**64 - 1), "n": whole(1, 128),
    "stop": lambda v: says(v) or (isinstance(v, list) and len(v) <= 64 and all(map(says, v))), "stream": is_bool,
    "stream_options": are_options, "return_token_ids": is_bool,
    "model": one_of("tiny"), "user": is_text, "service_tier": is_text, "prompt_cache_key": is_text,
    "safety_identifier": is_text, "metadata": lambda v: isinstance(v, dict), "prompt": is_prompt, "echo": is_bool,
    "best_of": one_of(1), "suffix": one_of(""), "messages": are_messages, "top_logprobs": whole(0, 20),
    "tools": one_of([]), "tool_choice": one_of("none"), "functions": one_of([]), "function_call": one_of("none"),
    "parallel_tool_calls": is_bool,
    "response_format": one_of({"type": "text"}, {"type": "text", "json_schema": None}), "modalities": one_of(["text"]),
    "audio": one_of(), "prediction": one_of(), "reasoning_effort": one_of("none"), "verbosity": one_of(),
    "web_search_options": one_of(), "store": one_of(False), "prompt_cache_retention": one_of(),
    "prompt_cache_options": one_of(), "moderation": one_of(),
}  # fmt: skip

MISSING_IS_REFUSED = {"model", "prompt", "messages"}


def rule_of(field: str, chat: bool) -> Callable[[Any], bool]:
    if field == "logprobs":
        return is_bool if chat else whole(0, 20)
    if field in ("max_tokens", "max_completion_tokens"):
        return whole(1 if chat else 0, 100)
    return RULES[field]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    template = Template()
    with Served(ToyModel(), most_waiting=500, template=template) as running:
        yield running


class Template:
    """A chat template that says the last message."""

    def render(self, messages: Any) -> str:
        return str(messages[-1]["content"]) or "x"


def prepared(served: Served, chat: bool, body: Any) -> tuple[CompletionRequest, list[Continuation]]:
    """A request as the application prepares it, up to the engine."""
    given = read_json(body if isinstance(body, bytes) else json.dumps(body).encode())
    asked = (read_chat if chat else read_completion)(given)
    choices = served.service.choices(asked)
    return asked, served.service.continuations(asked, choices, lambda index: lambda told: None)


def base_of(chat: bool) -> dict[str, Any]:
    return {"model": "tiny", **({"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"})}


def refused(served: Served, chat: bool, body: Any) -> Refusal | None:
    try:
        prepared(served, chat, body)
    except Exception as error:
        found = refusal_of(error)
        assert 400 <= found.status < 500, (body, error)
        json.dumps(found.body, allow_nan=False, ensure_ascii=False).encode()
        assert len(found.message) < 400 and "Traceback" not in found.message and ".py" not in found.message
        return found
    return None


CASES = [(False, field) for field in OF_COMPLETIONS] + [(True, field) for field in OF_CHAT]


@pytest.mark.parametrize(("chat", "field"), CASES, ids=[f"{'chat ' * c}{f}" for c, f in CASES])
def test_a_field_is_lawful_or_refused_by_its_name(served, chat, field):
    """Each kind of value in each field; null is the same as left out."""
    rule = rule_of(field, chat)
    beside: dict[str, Any] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}.get(field, {})
    assert any(map(rule, VALUES)) or field in ("audio", "prediction", "verbosity", "web_search_options", "max_tokens",
        "prompt_cache_retention", "prompt_cache_options", "moderation",
        "model"), "the table has a lawful value"  # fmt: skip
    for value in VALUES:
        found = refused(served, chat, {**base_of(chat), **beside, field: value})
        lawful = field not in MISSING_IS_REFUSED if value is None else rule(value)
        assert (found is None) == lawful, (field, value, found)
        if found is not None:
            assert (found.param == field and field in found.message) or found.code == "model_not_found", (value, found)
            assert found.code != "unknown_parameter"


def at_every_depth(value: Any, put: Any) -> Iterator[Any]:
    """`value` with `put` in place of each of its members in turn, and as one more member of each object."""
    if isinstance(value, dict):
        yield {**value, "more": put}
        for name, member in value.items():
            yield {**value, name: put}
            for changed in at_every_depth(member, put):
                yield {**value, name: changed}
    elif isinstance(value, list):
        for n, member in enumerate(value):
            yield [*value[:n], put, *value[n + 1 :]]
            for changed in at_every_depth(member, put):
                yield [*value[:n], changed, *value[n + 1 :]]


NESTED: dict[str, tuple[bool, Any]] = {
    "messages": (True, [{"role": "system", "content": [{"type": "text", "text": "hi"}], "name": "a"},
        {"role": "user", "content": "b"}]),
    "stream_options": (False, {"include_usage": True, "include_obfuscation": False}),
    "logit_bias": (False, {"5": 1.5}),
    "stop": (False, ["a", "b"]),
    "prompt": (False, [[1, 2], [3]]),
    "response_format": (True, {"type": "text"}),
    "modalities": (True, ["text"]),
}  # fmt: skip


@pytest.mark.parametrize("field", NESTED)
def test_whatever_is_inside_a_field_is_lawful_or_refused_by_the_fields_name(served, field):
    chat, sample = NESTED[field]
    base = {**base_of(chat), **({"stream": True} if field == "stream_options" else {})}
    assert refused(served, chat, {**base, field: sample}) is None
    tried = 0
    for put in VALUES:
        for value in at_every_depth(sample, put):
            found = refused(served, chat, {**base, field: value})
            assert found is None or (found.param == field and field in found.message), (value, found)
            tried += 1
    assert tried >= len(VALUES)


@pytest.mark.parametrize(
    "members",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": None}]}]},
        {"messages": [{"role": "user", "content": "hi", "name": None}]},
        {"messages": [{"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "tool_calls": []}]},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}},
        {"stream_options": None, "stream": None, "logit_bias": None, "stop": None, "tools": None, "nothing": None},
        {"response_format": {"type": "text", "json_schema": None}},
    ],
    ids=["a part", "a message", "an answer that comes back", "usage", "obfuscation", "all", "a format"],
)
def test_null_is_left_out_at_every_depth(served, members):
    """OpenAI's clients send what they were given, nulls and empty lists with it."""
    asked, _ = prepared(served, True, {**base_of(True), **members})
    without = read_chat({**base_of(True), "stream": asked.stream, "messages": list(asked.messages),
        **({"stream_options": {"include_usage": True}} if asked.include_usage else {})})  # fmt: skip
    assert asked == without


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


NAMES = st.sampled_from(sorted({*OF_COMPLETIONS, *OF_CHAT})) | st.sampled_from(["\ud800", "", "N", "promt", "a" * 99])


@given(st.booleans(), st.dictionaries(NAMES, JSON, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_json_in_any_fields_is_lawful_or_refused(served, chat, members):
    base = base_of(chat) if len(members) % 2 else {}
    refused(served, chat, json.dumps({**base, **members}, ensure_ascii=True).encode())


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_object_or_refused(body):
    try:
        assert isinstance(read_json(body), dict)
    except Refusal as refusal:
        assert refusal.status == 400 and refusal.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
        (b'{"a": {"n": 1, "n": null}}', "'n' stands twice"),
        (b'{"seed": %s}' % (b"9" * 4301), "an integer of 4301 digits"),
        (b'{"seed": -%s}' % (b"9" * 1001), "an integer of 1002 digits"),
        (b'{"n": NaN}', "NaN is no number of JSON"),
        (b'{"n": [-Infinity]}', "-Infinity is no number of JSON"),
        (b"[" * 100_000, "nests too deep"),
        (b'{"a":' * 100_000, "nests too deep"),
        (b'{"n": 1,}', "not JSON"),
        (b'{"n": 01}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON: a byte order mark at character 0"),
        (b'{"a": "\x01"}', "not JSON: Invalid control character at character 7"),
    ],
    ids=range(12),
)
def test_what_is_no_json_says_why_in_jsons_words(body, words):
    with pytest.raises(Refusal, match=words) as caught:
        read_json(body)
    assert "python" not in caught.value.message.lower() and "sys." not in caught.value.message


def test_what_is_too_long_is_named_by_the_field_that_it_came_in(served):
    long = [{"role": "user", "content": "fox " * 300}]
    for chat, members, param in (
        (True, {"messages": long}, "messages"),
        (True, {"messages": [{"role": "user", "content": "fox " * 20_000}]}, "messages"),
        (False, {"prompt": "fox " * 300}, "prompt"),
        (False, {"prompt": ["a"] * 501}, "prompt"),
        (False, {"prompt": ["a"] * 251, "n": 2}, "n"),
        (False, {"prompt": [1] * 128}, "prompt"),
        (False, {"prompt": [1] * 128, "max_tokens": 1}, "max_tokens"),
        (True, {"max_tokens": 128}, "max_tokens"),
        (True, {"max_completion_tokens": 128}, "max_completion_tokens"),
    ):
        found = refused(served, chat, {**base_of(chat), **members})
        assert found is not None and (found.status, found.param) == (400, param) and param in found.message


def test_the_largest_top_k_is_the_one_that_is_named(served):
    assert refused(served, False, {**base_of(False), "top_k": 2**31 - 1}) is None
    found = refused(served, False, {**base_of(False), "top_k": 2**31})
    assert found is not None and "0 to 2147483647, found 2147483648" in found.message


def test_lawful_floats_are_finite_in_every_answer(served):
    """A bias that decides everything leaves log-probabilities of minus infinity nowhere: JSON has no such number."""
    for members in ({"logit_bias": {"5": 100}}, {"temperature": 100}, {"top_p": 1e-300}, {"repetition_penalty": 0.01}):
        status, answer = served.post(prompt="a", logprobs=20, max_tokens=3, **members)
        assert status == 200, answer
        told = [v for top in answer["choices"][0]["logprobs"]["top_logprobs"] for v in top.values()]
        assert told and all(map(math.isfinite, told))
