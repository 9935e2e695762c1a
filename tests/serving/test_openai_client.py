"""The official client of OpenAI against each backend's server: each way to ask, and what it raises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="pip install openai")

PROMPT, LIMIT = "Once upon a time", 12
GREEDY = {"temperature": 0, "max_tokens": LIMIT}


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
