"""The official client of OpenAI against each backend's server: each way to ask, and what it raises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="pip install openai")

PROMPT, LIMIT = "Once upon a time", 12
GREEDY = {"temperature": 0, "max_tokens": LIMIT}

SAYS: dict[str, Any] = {
    "best_of": 1, "echo": True, "frequency_penalty": 0.5, "functions": [{"name": "f"}], "logit_bias": {"5": 1},
    "logprobs": 1, "max_completion_tokens": 3, "max_tokens": 3, "messages": [{"role": "user", "content": "Once"}],
    "metadata": {"a": "b"}, "modalities": ["audio"], "model": "tiny", "n": 2, "parallel_tool_calls": True,
    "presence_penalty": 0.5, "prompt": PROMPT, "prompt_cache_key": "a", "response_format": {"type": "json_object"},
    "safety_identifier": "a", "seed": 1, "service_tier": "auto", "stop": ["a", "b"], "store": True, "stream": False,
    "stream_options": {"include_usage": True}, "suffix": "a", "temperature": 0.5, "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}], "top_logprobs": 1, "top_p": 0.5, "user": "a",
}  # fmt: skip
"""A value that asks for something, of each field that has one; any object for the others."""

DONE = {
    "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty", "seed",
    "stop", "stream", "stream_options", "temperature", "top_p", "user",
}  # fmt: skip
DONE_OF = {
    False: DONE | {"best_of", "prompt"},
    True: DONE - {"echo"} | {"max_completion_tokens", "messages", "metadata", "parallel_tool_calls",
        "prompt_cache_key", "safety_identifier", "service_tier", "top_logprobs"},
}  # fmt: skip


class Template:
    """A chat template that says the last message."""

    def render(self, messages: Any) -> str:
        return str(messages[-1]["content"])


@pytest.fixture(scope="module")
def ask(served: Any) -> Any:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0) as client:
        yield lambda prompt=PROMPT, **members: client.completions.create(model="tiny", prompt=prompt, **members)


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def test_prompts_of_every_kind_are_answered_as_lone_runs(served, ask):
    ids = served.tokenizer.encode(PROMPT)
    tokens = served.lone(PROMPT, max_new_tokens=LIMIT)
    answer = ask(**GREEDY, extra_body={"return_token_ids": True})
    (text,) = texts(answer)
    assert answer.choices[0].model_extra["token_ids"] == tokens
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens))
    assert answer.usage.total_tokens == len(ids) + len(tokens) and answer.choices[0].finish_reason == "length"
    assert texts(ask(ids, **GREEDY)) == [text]
    assert texts(ask([PROMPT, "fox"], **GREEDY)) == [text, *texts(ask("fox", **GREEDY))]
    assert texts(ask([ids, [5]], n=2, **GREEDY))[:2] == [text, text]
    stop = text[4:6]
    for stops in (stop, ["zzz", stop]):
        (choice,) = ask(stop=stops, **GREEDY).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_streams_are_the_whole_answers_in_pieces(ask):
    asked: dict[str, Any] = {"prompt": [PROMPT, "fox"], "n": 2, "seed": 4, "max_tokens": 8}
    found, ends = [""] * 4, [None] * 4
    *events, last = ask(**asked, stream=True, stream_options={"include_usage": True})
    for event in events:
        assert event.usage is None
        (choice,) = event.choices
        assert ends[choice.index] is None, "nothing after the end"
        found[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    whole = ask(**asked)
    assert found == texts(whole) and ends == [choice.finish_reason for choice in whole.choices]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens


def test_scores_biases_penalties_and_seeds(served, ask):
    answer = ask(**GREEDY, echo=True, logprobs=3)
    text, scores = answer.choices[0].text, answer.choices[0].logprobs
    count = answer.usage.total_tokens
    assert text == PROMPT + texts(ask(**GREEDY))[0]
    assert [len(one) for one in (scores.tokens, scores.token_logprobs, scores.top_logprobs)] == [count] * 3
    assert scores.token_logprobs[0] is None and scores.text_offset[0] == 0
    for top, score in list(zip(scores.top_logprobs, scores.token_logprobs, strict=True))[4:]:
        assert max(top.values()) == score
    alone = ask(max_tokens=0, echo=True, logprobs=0).choices[0]
    assert (alone.text, alone.finish_reason) == (PROMPT, "length")
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:4], abs=1e-4)
    assert texts(ask(temperature=0, max_tokens=4, logit_bias={"18": 100})) == [served.tokenizer.decode([18]) * 4]
    fewer = ask(temperature=0, max_tokens=20, frequency_penalty=2, presence_penalty=2)
    assert texts(fewer) != texts(ask(temperature=0, max_tokens=20))
    assert texts(ask(seed=7)) == texts(ask(seed=7)) != texts(ask(seed=8))


@pytest.mark.parametrize(
    ("param", "members"),
    [
        ("prompt", {"prompt": [300]}),
        ("max_tokens", {"max_tokens": 300}),
        ("stop", {"stop": ["a"] * 65}),
        ("suffix", {"suffix": "end"}),
        ("nonsense", {"extra_body": {"nonsense": 1}}),
    ],
)
def test_what_is_refused_is_its_exception(ask, param, members):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**members)
    assert caught.value.param == param and caught.value.body["message"]


def test_many_at_once_get_what_they_get_alone(served, ask):
    async def gather() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none") as client:
            asked = [client.completions.create(model="tiny", prompt=PROMPT, seed=seed % 3) for seed in range(9)]
            return await asyncio.gather(*asked)

    with pytest.raises(openai.NotFoundError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none").models.retrieve("gpt-4")
    alone = [texts(ask(seed=seed)) for seed in range(3)]
    assert [texts(answer) for answer in asyncio.run(gather())] == alone * 3


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_each_field_of_the_clients_types_is_done_or_refused_by_its_name(serve, chat):
    """Answers hold what the client's types demand, strictly, whole and in pieces."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OfChat
    from openai.types.completion_create_params import CompletionCreateParamsBase as OfCompletions

    named = {*(OfChat if chat else OfCompletions).__annotations__, "stream"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    base = {name: SAYS[name] for name in ("model", "messages" if chat else "prompt")} | {"max_tokens": 3}
    done = set()
    with serve(template=Template()) as served:
        for field in sorted(named):
            asked = base | {field: SAYS.get(field, {"type": "a"})}
            if field == "max_completion_tokens":
                del asked["max_tokens"]
            if chat and field in ("logprobs", "top_logprobs"):
                asked["logprobs"] = True
            if field == "stream_options":
                with served.streamed(path, **asked) as events:
                    *parts, _ = events
                    assert parts[-1]["usage"]["completion_tokens"] == 3
                done.add(field)
                continue
            status, answer = served.post(path, asked)
            if status == 200:
                done.add(field)
                check_answer(answer, chat)
            else:
                assert status == 400 and answer["error"]["param"] == field and field in answer["error"]["message"]
    assert done == DONE_OF[chat]


def check_answer(answer: Any, chat: bool) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    for choice in answer["choices"]:
        assert not chat or {"role", "content", "refusal"} <= choice["message"].keys()
        if not chat and choice["logprobs"] is not None:
            counts = {len(found) for found in choice["logprobs"].values()}
            assert len(counts) == 1
    (ChatCompletion if chat else Completion).model_validate(answer, strict=True)
