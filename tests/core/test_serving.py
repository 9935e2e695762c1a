"""A server of a toy model, whose bits do not depend on the batch: each answer is a lone run's, to the token."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Served, ToyModel
from toy_decoder import ToyDecoder, toy_config

from gptj.errors import CheckpointWarning, TokenizerError
from gptj.generation import Columns, GenerationConfig, Step
from gptj.generation.sampling import log_softmax
from gptj.generation.session import prepare
from gptj.serving import prefixes
from gptj.serving.apart import RowsApart
from gptj.serving.batch import power_of_two
from gptj.serving.chat import ChatTemplate
from gptj.serving.continuation import Continuation, Transcript, no_decoder
from gptj.serving.engine import Engine
from gptj.serving.metrics import _HELP as HELP
from gptj.serving.prefill import Pace, Prefill, Prompt
from gptj.serving.prefixes import PrefixStore
from gptj.serving.prefixes import _in_common as in_common
from gptj.serving.requests import read_chat
from gptj.serving.service import IdTokenizer, servable
from gptj.serving.warming import sizes, warm_up, warm_up_behind

PROMPT = "Once upon a time there was"
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["rows at one slot", "rows apart"])
def joins(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Everything here holds for both kinds of engine: see `Decoder.joins`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyModel, "joins", request.param)
        patch.setattr(ToyDecoder, "joins", request.param)
        yield request.param


@pytest.fixture(scope="module")
def served(joins: bool) -> Iterator[Served]:
    with Served(ToyModel(), most_rows=4, most_waiting=1000) as running:
        yield running


def ids_of(served: Served, text: str) -> list[int]:
    return list(served.tokenizer.encode(text))


# ---- what is asked for


def test_a_greedy_completion_is_that_of_generate(served):
    made = served.lone(PROMPT, max_new_tokens=16)
    assert served.tokens(prompt=PROMPT, **GREEDY) == made
    assert served.text(prompt=PROMPT, **GREEDY) == served.tokenizer.decode(made, unknown="show")


def test_a_drawn_completion_is_that_of_generate_with_its_seed(served):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    made = served.lone(PROMPT, seed=2**64 - 3, max_new_tokens=30, **settings)
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 30}
    assert served.tokens(prompt=PROMPT, seed=-3, **asked) == made
    assert served.tokens(prompt=PROMPT, seed=5, **asked) != made


def test_what_is_left_out_is_openais_default(served):
    plain = {"do_sample": True, "top_k": 0}
    assert served.tokens(prompt=PROMPT, seed=1) == served.lone(PROMPT, seed=1, max_new_tokens=16, **plain)


def test_what_is_left_out_is_the_folders_where_it_samples():
    base = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, eos_token_id=289)
    with Served(ToyModel(), base=base) as served:
        assert served.tokens(prompt=PROMPT, seed=1) == served.lone(PROMPT, seed=1, max_new_tokens=16)
        assert served.tokens(prompt=PROMPT, **GREEDY) == served.lone(PROMPT, max_new_tokens=16, do_sample=False)


def test_prompts_are_texts_or_token_ids_one_or_several(served):
    ids = ids_of(served, PROMPT)
    one = served.text(prompt=PROMPT, **GREEDY)
    assert served.text(prompt=[PROMPT], **GREEDY) == served.text(prompt=ids, **GREEDY) == one
    assert served.text(prompt=[ids], **GREEDY) == one
    status, answer = served.post(prompt=["a fox", PROMPT, "hello"], **GREEDY)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][1]["text"] == one
    assert answer["usage"]["prompt_tokens"] == sum(len(ids_of(served, text)) for text in ("a fox", PROMPT, "hello"))


def test_a_top_p_of_0_is_greedy(served):
    assert served.tokens(prompt=PROMPT, top_p=0) == served.tokens(prompt=PROMPT, temperature=0)


def test_null_in_a_message_is_left_out():
    message = {"role": "assistant", "content": "hi"}
    asked = {"model": "tiny", "messages": [{**message, "refusal": None, "tool_calls": None, "name": None}]}
    assert read_chat(asked).messages == (message,)


def test_several_choices_are_the_sequences_of_generate_and_prompts_count_the_seed_up(served):
    status, answer = served.post(prompt=["a fox", PROMPT], n=3, seed=7, max_tokens=12, return_token_ids=True)
    assert status == 200
    fields = {"max_new_tokens": 12, "do_sample": True, "top_k": 0}
    expected = [
        served.lone(text, seed=7 + p, copy=n, **fields) for p, text in enumerate(("a fox", PROMPT)) for n in range(3)
    ]
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == sum(map(len, expected))


def test_an_end_of_text_ends_it_and_is_counted_but_not_shown(served):
    _, answer = served.post(prompt=PROMPT, logit_bias={"289": 100}, return_token_ids=True, logprobs=0)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("", "stop", [289])
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 1


def test_a_stop_text_ends_it_and_is_no_part_of_it(served):
    whole = served.text(prompt=PROMPT, max_tokens=40, **GREEDY)
    stop = whole[9:12]
    _, answer = served.post(prompt=PROMPT, max_tokens=40, stop=["never there", stop], **GREEDY)
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    with served.streamed(prompt=PROMPT, max_tokens=40, stop=stop, **GREEDY) as events:
        text = "".join(event["choices"][0]["text"] for event in events if event != "[DONE]")
    assert text == whole[: whole.index(stop)]
    assert served.text(prompt=PROMPT, max_tokens=40, stop="never there", **GREEDY) == whole


def test_a_stop_string_of_the_folder_ends_it_as_in_generate(served):
    whole = served.text(prompt=PROMPT, max_tokens=40, **GREEDY)
    base = GenerationConfig(eos_token_id=289, stop_strings=[whole[9:12]])
    with Served(ToyModel(), base=base) as other:
        _, answer = other.post(prompt=PROMPT, max_tokens=40, **GREEDY)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop" and whole.startswith(choice["text"]) and whole[9:12] in choice["text"]


def test_a_stop_that_may_have_begun_is_held_back_until_it_is_known():
    class Letters:
        push, finish = staticmethod("".join), staticmethod(lambda: "!")

    transcript = Transcript(Letters(), ["abc", "xx"])
    said = [transcript.push(letters) for letters in ("hel", "ab", "d", "ab", "x")]
    assert said == [("hel", False), ("", False), ("abd", False), ("", False), ("ab", False)]
    assert transcript.finish() == "x!"
    transcript = Transcript(Letters(), ["abc", "xx"])
    assert [transcript.push(letters) for letters in ("1a", "bcxx")] == [("1", False), ("", True)]


def test_logit_bias_and_penalties_are_those_of_openai(served):
    made = served.tokens(prompt=PROMPT, max_tokens=30, logit_bias={"40": 100}, **GREEDY)
    assert made == [40] * 30
    made = served.tokens(
        prompt=PROMPT, max_tokens=8, logit_bias={str(i): 50 for i in (40, 41)}, presence_penalty=2, **GREEDY
    )
    assert set(made) <= {40, 41}
    step_logits = logits_of(served, PROMPT)
    counts = np.zeros(300)
    expected = []
    for _ in range(20):
        scores = step_logits(expected)[:290] - 0.75 * counts[:290] - 0.5 * (counts[:290] > 0)
        expected.append(int(np.argmax(scores)))
        counts[expected[-1]] += 1
    got = served.tokens(prompt=PROMPT, max_tokens=20, frequency_penalty=0.75, presence_penalty=0.5, **GREEDY)
    assert got == expected[: len(got)]
    assert got != served.lone(PROMPT, max_new_tokens=20)


def logits_of(served: Served, prompt: str) -> Any:
    """The model's logits after the prompt and some tokens, float64."""

    def after(made: list[int]) -> np.ndarray:
        ids = np.array([[*ids_of(served, prompt), *made]])
        return np.asarray(served.model._decoder(1, ids.shape[1]).prefill(ids).logits[0], np.float64)

    return after


def test_echo_begins_with_the_prompt(served):
    text = served.text(prompt=PROMPT, **GREEDY)
    assert served.text(prompt=PROMPT, echo=True, **GREEDY) == PROMPT + text
    assert served.text(prompt=PROMPT, echo=True, max_tokens=0) == PROMPT
    assert served.text(prompt=PROMPT, max_tokens=0) == ""
    with served.streamed(prompt=ids_of(served, PROMPT), echo=True, **GREEDY) as events:
        assert "".join(event["choices"][0]["text"] for event in events if event != "[DONE]") == PROMPT + text


def test_an_echo_and_its_answer_are_one_text(served):
    """A character that the prompt begins and the answer ends is one; of numbers none runs into the next."""
    first, second = served.tokenizer.encode("é")
    asked = {"prompt": [5, first], "echo": True, "temperature": 0, "logprobs": 0, "logit_bias": {str(second): 100}}
    before = served.tokenizer.decode([5])
    for count, expected in ((0, before + "\ufffd"), (1, before + "é"), (2, before + "é\ufffd")):
        [choice] = served.post(**asked, max_tokens=count)[1]["choices"]
        assert choice["text"] == expected
        assert choice["logprobs"]["text_offset"] == [0, len(before), len(before), len(before) + 1][: 2 + count]
        with served.streamed(**asked, max_tokens=count) as events:
            assert "".join(event["choices"][0]["text"] for event in events if event != "[DONE]") == expected
    with Served(ToyModel(), tokenizer=None) as numbers:
        ids = [5, 6, *numbers.tokens(prompt=[5, 6], max_tokens=3, **GREEDY)]
        assert numbers.text(prompt=[5, 6], echo=True, max_tokens=3, **GREEDY) == " ".join(map(str, ids))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models_own_with_those_of_the_prompt(served, stream):
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 3, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    if stream:
        with served.streamed(**asked) as events:
            parts = [event["choices"][0] for event in events if event != "[DONE]"]
        scores = {name: [one for part in parts for one in part["logprobs"][name]] for name in parts[0]["logprobs"]}
        made = [one for part in parts for one in part["token_ids"]]
    else:
        _, answer = served.post(**asked)
        scores, made = answer["choices"][0]["logprobs"], answer["choices"][0]["token_ids"]
    ids, after = [*ids_of(served, PROMPT), *made], logits_of(served, PROMPT)
    count = len(ids) - len(made)
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        prompt = np.array([ids[:place]])
        logits = served.model._decoder(1, place).prefill(prompt).logits[0]
        expected = log_softmax(logits)
        assert scores["token_logprobs"][place] == pytest.approx(expected[ids[place]], abs=1e-6)
        top = scores["top_logprobs"][place]
        assert max(top.values()) == pytest.approx(expected.max(), abs=1e-6)
        assert scores["token_logprobs"][place] in top.values() and 1 <= len(top) <= 4
    assert len(scores["tokens"]) == len(scores["text_offset"]) == len(ids)
    assert scores["text_offset"][:3] == [0, len(scores["tokens"][0]), len("".join(scores["tokens"][:2]))]
    assert after([]).argmax() == made[0] and count == len(ids_of(served, PROMPT))


def test_a_prompt_that_fills_the_model_is_scored(served):
    ids = [1 + n % 280 for n in range(128)]
    _, answer = served.post(prompt=ids, echo=True, logprobs=1, max_tokens=0)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 128
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stream_is_the_whole_answer_in_pieces_and_ends_with_its_counts(served):
    asked = {"prompt": ["a fox", PROMPT], "n": 2, "seed": 3, "max_tokens": 20}
    _, answer = served.post(**asked)
    with served.streamed(stream_options={"include_usage": True}, **asked) as events:
        *parts, last, done = events
    assert done == "[DONE]" and last["choices"] == [] and last["usage"] == answer["usage"]
    texts = ["", "", "", ""]
    for part in parts:
        assert part["usage"] is None and part["object"] == "text_completion" and part["id"] == parts[0]["id"]
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert sorted(one for one in reasons if one) == sorted(choice["finish_reason"] for choice in answer["choices"])


def test_a_folder_without_a_tokenizer_takes_and_gives_numbers():
    with Served(ToyModel(), tokenizer=None) as served:
        made = served.tokens(prompt=[5, 6, 7], **GREEDY)
        assert served.text(prompt=[5, 6, 7], **GREEDY) == " ".join(map(str, made))
        assert served.post(prompt="text")[0] == served.post(prompt=[1], stop="a")[0] == 400


def test_the_model_is_listed(served):
    _, answer = served.ask("GET", "/v1/models")
    assert [(one["id"], one["max_model_len"]) for one in answer["data"]] == [("tiny", 128)]
    assert served.ask("GET", "/v1/models/tiny")[1] == answer["data"][0]


def test_metrics_are_prometheus_text(served):
    served.text(prompt=PROMPT, **GREEDY)
    assert served.is_empty(), "an answer may be there before its row is given back"
    status, text = served.ask("GET", "/metrics")
    assert status == 200 and served.last_headers["Content-Type"].startswith("text/plain; version=0.0.4")
    line = r'(# (HELP|TYPE) \S+ .+|[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+)'
    assert all(re.fullmatch(line, one) for one in text.splitlines()), text
    assert 'gptj_requests_total{path="/v1/completions",status="200"}' in text
    assert "gptj_rows_running 0" in text and "gptj_rows_most 4" in text and "gptj_step_seconds_count" in text


def test_metrics_are_there_from_the_beginning_and_count_a_prompt_once():
    """A rate would miss the first count of a counter that begins with it; usage says what the counters say."""
    with Served(ToyModel(), most_rows=4) as served:
        before = served.ask("GET", "/metrics")[1]
        for name in ("prompt_tokens_total", "prompt_tokens_reused_total", "generated_tokens_total", "cancelled_total"):
            assert f"\ngptj_{name} 0\n" in before
        for name in ("step", "first_token", "request"):
            assert f"\ngptj_{name}_seconds_count 0\n" in before
        assert {line.split()[2] for line in before.splitlines() if line.startswith("# TYPE")} | {
            "gptj_requests_total"
        } == {*HELP}
        usages = [
            served.post(**asked)[1]["usage"]
            for asked in ({"prompt": PROMPT, "n": 3}, {"prompt": [[5, 6, 7]] * 2}, {"prompt": [[8] * 40], "n": 9})
        ]
        assert usages[1]["prompt_tokens_details"] == {"cached_tokens": 3}, "two that are one were read together"
    value = served.engine.metrics.value  # of an engine that is closed, and has counted the last token
    assert value("gptj_prompt_tokens_total") == sum(one["prompt_tokens"] for one in usages)
    assert value("gptj_generated_tokens_total") == sum(one["completion_tokens"] for one in usages)
    reused = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usages)
    assert value("gptj_prompt_tokens_reused_total") == reused


def test_the_page_needs_nothing_from_anywhere_and_may_do_nothing_else(served):
    status, page = served.ask("GET", "/")
    assert status == 200
    policy = served.last_headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "//" not in page.replace("http://", "")
    for control in re.findall(r"<(?:textarea|input|select|output) id=\"(\w+)\"", page):
        assert f'<label for="{control}">' in page


def test_logits_that_stay_on_a_device_give_the_same_answers(served):
    asked: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "temperature": 0.8, "top_p": 0.9},
        {"seed": 2, "frequency_penalty": 0.5, "logit_bias": {"7": 3}},
        {"temperature": 0, "echo": True, "logprobs": 2},
    ]
    with Served(ToyModel(held=True), most_rows=4) as on_device:
        for members in asked:
            here = served.post(prompt=PROMPT, max_tokens=20, **members)[1]["choices"]
            assert on_device.post(prompt=PROMPT, max_tokens=20, **members)[1]["choices"] == here


# ---- chats

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_chat_is_the_template_continued():
    with Served(ToyModel(), template=ChatTemplate(TEMPLATE, {"bos_token": None})) as served:
        asked = {
            "messages": [
                {"role": "system", "content": "a fox"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ]
        }
        rendered = "system: a fox\nuser: hi\nassistant:"
        expected = served.text(prompt=rendered, max_tokens=9, **GREEDY)
        _, answer = served.post(
            "/v1/chat/completions", max_completion_tokens=9, temperature=0, logprobs=True, top_logprobs=2, **asked
        )
        [choice] = answer["choices"]
        assert answer["object"] == "chat.completion"
        assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
        assert choice["logprobs"]["refusal"] is None
        assert len(choice["logprobs"]["content"]) == 9 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
        spelt = b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"])
        assert spelt.decode(errors="replace") == expected
        with served.streamed("/v1/chat/completions", max_tokens=9, temperature=0, **asked) as events:
            first, *parts, done = events
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and done == "[DONE]"
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected
        assert all(part["object"] == "chat.completion.chunk" for part in parts)
        status, answer = served.post("/v1/chat/completions", messages=[{"role": "assistant", "content": "hi"}])
        assert status == 400 and "begin with the user" in answer["error"]["message"]
        _, answer = served.post("/v1/chat/completions", temperature=0, **asked)  # to the end of the positions
        assert answer["usage"]["total_tokens"] <= 128


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"]
)
def test_a_template_stays_in_its_sandbox(source):
    with Served(ToyModel(), template=ChatTemplate(source, {})) as served:
        status, answer = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert status == 400 and "class" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hé!"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ {'b': messages[0].content, 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
         '{"a":1,"b":"h\\u00e9"}'),
        ("{{ {'b': 1} | tojson(indent=1) }}", '{\n "b": 1\n}'),
    ],
)  # fmt: skip
def test_a_template_has_what_transformers_gives_it(source, expected):
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hé"}]) == expected


def test_a_template_is_found_where_transformers_keeps_it(tmp_path: Path):
    class Tokens:
        bos_token = eos_token = pad_token = unk_token = "<end>"

    def render(directory: Path) -> str | None:
        template = ChatTemplate.of_folder(directory, Tokens())
        return None if template is None else template.render([{"role": "user", "content": "hi"}])

    assert render(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ eos_token }}{{ messages[0].content }}"}))
    assert render(tmp_path) == "<end>hi"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert render(tmp_path) == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert render(tmp_path) == '[{"role": "user", "content": "hi"}]'
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TokenizerError, match="jinja2"):
        render(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="UTF-8"):
        render(tmp_path)


# ---- many at once


def test_answers_under_load_are_those_of_lone_runs_and_no_row_is_lost():
    """Prompts of all lengths, greedy and drawn, some that leave early, some scored, some that begin alike."""
    with Served(ToyModel(), most_rows=5, most_waiting=1000) as served:
        begin = [7 * n % 290 for n in range(40)]
        wrong: list[Any] = []

        def ask(number: int) -> None:
            chooser = random.Random(number)
            ids = (begin if number % 3 == 0 else []) + [chooser.randrange(290) for _ in range(chooser.randint(1, 60))]
            new = chooser.randint(1, 128 - len(ids)) if number % 7 else 1
            drawn = number % 2
            settings = {"temperature": 0.9, "seed": number} if drawn else GREEDY
            if number % 5 == 4:
                with served.streamed(prompt=ids, max_tokens=new, **settings) as events:
                    for _ in range(chooser.randint(0, 3)):
                        next(events, None)
                return
            scores = {"logprobs": 1, "echo": True} if number % 11 == 1 else {}
            made = served.tokens(prompt=ids, max_tokens=new, **settings, **scores)
            fields = {"do_sample": True, "temperature": 0.9, "top_k": 0} if drawn else {}
            if made != (expected := served.lone(ids, seed=number if drawn else None, max_new_tokens=new, **fields)):
                wrong.append((number, made, expected))

        def client(first: int) -> None:
            for number in range(first, 120, 12):
                try:
                    ask(number)
                except Exception as error:
                    wrong.append((number, repr(error)))

        clients = [threading.Thread(target=client, args=(n,)) for n in range(12)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        assert wrong == []
        assert served.is_empty()
        assert served.engine.metrics.value("gptj_cancelled_total") > 5
        assert served.engine.metrics.value("gptj_prompt_tokens_reused_total") > 300
        assert served.post(prompt=PROMPT)[0] == 200


def test_a_client_who_leaves_frees_its_row_at_once():
    with Served(ToyModel(slow_s=0.02), most_rows=1) as served:
        with served.streamed(prompt="Once", max_tokens=100, temperature=0, logit_bias={"289": -100}) as events:
            next(events)
            assert served.engine.running == 1
        begin = time.monotonic()
        assert served.is_empty()
        assert time.monotonic() - begin < 1
        thread = threading.Thread(target=lambda: served.raw(request(prompt="Once", max_tokens=100), half_close=True))
        thread.start()  # one who leaves before anything was answered
        thread.join(5)
        assert served.is_empty(1)


def request(**members: Any) -> bytes:
    body = json.dumps({"model": "tiny", **members}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def test_a_long_prompt_is_read_between_the_steps_of_the_others():
    model = ToyModel(n_positions=512, slow_s=0.002)
    endless = {"prompt": "Once", "max_tokens": 400, "temperature": 0, "logit_bias": {"289": -100}}
    with Served(model, most_rows=4) as served, served.streamed(**endless) as events:
        next(events)
        calls = len(watched(served))
        served.text(prompt=[1 + n % 280 for n in range(300)], max_tokens=3, **GREEDY)
        made = watched(served)[calls:]
    reads = [n for n, (kind, _) in enumerate(made) if kind == "read"]
    assert len(reads) >= 2, "in pieces"
    for one, next_one in itertools.pairwise(reads):
        assert any(kind == "step" for kind, _ in made[one + 1 : next_one]), "a step of the others between two pieces"
    assert all(columns <= 512 for _, columns in made)


def watched(served: Served) -> list[tuple[str, int]]:
    """The calls of the model so far: what was read in pieces, and the steps; in their order."""
    calls: list[tuple[str, int]] = served.__dict__.setdefault("calls", [])
    if not calls:
        engine = served.engine
        extend = engine._extend

        def extends(adapter: Any, asked: Any) -> Any:
            running = [batch._decoder for batch in engine._batches.values()]
            for one in asked:
                calls.append(("step" if one.decoder in running else "read", one.token_ids.shape[1]))
            return extend(adapter, asked)

        engine._extend = extends  # type: ignore[method-assign]
        calls.append(("step", 1))
    return calls


@pytest.mark.parametrize(
    ("step", "weights", "a_token", "most"),
    [(70, 0, 1.5, 64), (77, 65, 1.6, 32), (108, 68, 5, 16), (100, 90, 20, 8), (9, 0, 0.01, 512)],
    ids=["joined", "read apart", "slow", "no room", "a device"],
)
def test_as_much_is_read_as_delays_the_others_by_less_than_two_steps(step, weights, a_token, most):
    pace, random = Pace(), np.random.default_rng(0)
    for _ in range(4):
        pace.note_step((8, 256), step * random.uniform(0.95, 1.05))
    delays = []
    for _ in range(600):
        tokens = pace.tokens
        delays.append((weights + a_token * tokens) * random.uniform(0.97, 1.03))
        pace.note_prompt((8, tokens), tokens, delays[-1])
    assert pace.tokens == most
    assert max(delays) < 2 * step or most == 8
    assert sum(delay == max(delays) for delay in delays) < 3


def test_a_size_that_was_slow_for_another_reason_is_tried_again():
    pace = Pace()
    for _ in range(3):
        pace.note_step("rows", 70)
    for turn in range(900):
        tokens = pace.tokens
        pace.note_prompt(tokens, tokens, (1 if turn > 60 else 9) * tokens)
    assert pace.tokens == 64


def test_what_was_compiled_meanwhile_teaches_nothing():
    pace = Pace()
    pace.note_step("rows", 9000)
    assert pace.step_s("rows") is None
    pace.note_step("rows", 70)
    for tokens in (8, 16, 32):
        pace.note_prompt(tokens, tokens, 9000)
        for _ in range(2):
            pace.note_prompt(tokens, tokens, tokens)
        assert pace.tokens == tokens, "known by three that taught, of which the first is none"
        pace.note_prompt(tokens, tokens, tokens)
        assert pace.tokens == 2 * tokens
    assert pace.tokens == 64, "the next, which the two before allow"


def test_of_a_prompt_and_rows_that_are_read_together_the_one_at_fault_fails_alone():
    class Failing(ToyDecoder):
        def _run(self, ids: np.ndarray, *arguments: Any, **options: Any) -> Any:
            if 277 in ids and ids.shape[1] > 1:
                raise MemoryError("no room for this prompt")
            return super()._run(ids, *arguments, **options)

    model = ToyModel()
    model._decoder = lambda batch, capacity: Failing(model.config, batch, capacity)
    endless = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "logit_bias": {"289": -100}}
    with Served(model, most_rows=4) as served, served.streamed(**endless) as events:
        next(events)
        assert served.post(prompt=[5, 277, 6, 7], max_tokens=2)[0] == 500
        assert served.post(prompt=[5, 6, 7], max_tokens=2)[0] == 200
        *_, last = (event for event in events if event != "[DONE]")
        assert last["choices"][0]["finish_reason"] == "length"
        assert served.is_empty()


class Spoiling(ToyDecoder):
    """After token 277 a row has no numbers, and none in any other place of that slot: nothing times NaN is NaN."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.spoilt = np.zeros((self.batch, self.capacity), bool)

    def _run(self, ids: np.ndarray, positions: Any, mask: Any, offset: int, **options: Any) -> Any:
        step, end = super()._run(ids, positions, mask, offset, **options), offset + ids.shape[1]
        self.spoilt[:, offset:end] = ids == 277
        logits = step.logits
        logits[self.spoilt[:, :end].any(1)] = np.nan
        return Step(logits, None, None)

    def _run_rows(self, token_ids: Any, slots: Any) -> Any:
        logits = super()._run_rows(token_ids, slots).logits
        for row, slot in enumerate(slots):
            self.spoilt[row, slot] = token_ids[row, 0] == 277
        wide = max(slots) + 1  # what is seen of one row is as wide as of all
        logits[self.spoilt[: len(slots), :wide].any(1)] = np.nan
        return Step(logits, None, None)

    def _write(self, row: int, start: int, columns: Any) -> None:
        super()._write(row, start, columns)
        self.spoilt[row, start : start + columns.count] = False


@pytest.mark.parametrize("bad", [{"prompt": [5], "logit_bias": {"277": 100}}, {"prompt": [277] + [4] * 31}])
def test_a_text_that_is_no_number_spoils_none_that_takes_its_place(bad):
    model = ToyModel(n_positions=300)
    model._decoder = lambda batch, capacity: Spoiling(model.config, batch, capacity)
    endless = {"prompt": "Once", "max_tokens": 200, "temperature": 0, "logit_bias": {"289": -100, "277": -100}}
    known = [7 * n % 200 for n in range(20)]
    # Three rows, two of which are taken, are not put together anew in the steps until another takes the third.
    with (
        Served(model, most_rows=3) as served,
        served.streamed(**endless) as events,
        served.streamed(**endless) as others,
    ):
        served.tokens(prompt=known, max_tokens=1, temperature=0)
        for _ in range(40):
            next(events), next(others)
        assert served.post(**bad, max_tokens=9, temperature=0)[0] == 500
        for _ in range(20):
            next(events), next(others)
        for prompt in ([*known, 8, 9, 10], [5, 6, 7]):  # of what is known, the slots before are not written
            assert served.tokens(prompt=prompt, max_tokens=3, temperature=0, logit_bias={"277": -100})
        *_, last = (event for event in events if event != "[DONE]")
        assert last["choices"][0]["finish_reason"] == "length"


def test_caches_are_used_again():
    """Turn by turn, so that a machine that is slow between two texts changes nothing."""
    model, made = ToyModel(n_positions=300), []
    make = model._decoder

    def counted(batch: int, capacity: int) -> Any:
        made.append((batch, capacity))
        return make(batch, capacity)

    model._decoder = counted  # type: ignore[method-assign]
    engine = Engine(model, most_rows=2)

    def submit(ids: list[int], new: int) -> Continuation:
        config = GenerationConfig(max_new_tokens=new, pad_token_id=0, eos_token_id=None)
        session = prepare(no_decoder, np.array([ids]), model_config=model.config, generation_config=config)
        one = Continuation(np.array(ids), session, Transcript(IdTokenizer()), lambda told: None)
        engine.submit([one])
        return one

    endless = submit([4, 5, 6], 290)
    for number in range(12):
        short = submit([5 + number, 6, 7], 4)
        while not short.ended:
            engine.turn()
    assert not endless.ended and not short.failed
    assert 0 < len(made) <= 4, "one for prompts, one for a row, one for two, and a larger one at most"


def test_a_cache_of_rows_apart_grows_for_who_joins_and_shrinks_when_nobody_is_there():
    config, sizes = toy_config(n_positions=1024), []

    def make(batch: int, capacity: int) -> ToyDecoder:
        sizes.append((batch, capacity))
        made = ToyDecoder(config, batch, capacity)
        made.joins = True
        return made

    def text(length: int) -> tuple[Continuation, Columns]:
        ids = np.arange(length)[None] % 23
        settings = GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=None)
        session = prepare(no_decoder, ids, model_config=config, generation_config=settings)
        prompt = ToyDecoder(config, 1, length)
        step = prompt.prefill(ids)
        tokens, scores = session.next_tokens(step)
        session.append(tokens, step, scores)
        return Continuation(ids[0], session, Transcript(IdTokenizer()), print), prompt.read(0, 0, length)

    rows = RowsApart(make, config, 4)
    short, long = text(5), text(600)
    rows.join([])
    assert not sizes and not len(rows)
    rows.join([short])
    rows.join([long])
    assert sizes == [(1, 256), (2, 1024)] and rows.shape == (2, 0)
    asked = rows.extension()
    assert asked.slots is not None and asked.slots.tolist() == [5, 600]
    rows.leave(long[0])
    rows.join([text(7)])
    assert len(sizes) == 2, "the long one's row is taken"
    for one in rows.continuations:
        rows.leave(one)
    rows.join([text(5)])
    assert sizes[2:] == [(1, 256)]


def test_a_prompt_that_begins_as_another_did_is_not_computed_again(joins):
    """At one slot but for the 8 tokens that are read at least; apart from a multiple of 16 on."""
    with Served(ToyModel(), most_rows=2) as served:
        first = [7 * n % 290 for n in range(60)]
        served.tokens(prompt=first, **GREEDY)
        longer = [*first[:50], 7, 8, 9]
        _, answer = served.post(prompt=longer, return_token_ids=True, **GREEDY)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 48 if joins else 45}
        assert answer["choices"][0]["token_ids"] == served.lone(longer, max_new_tokens=16)
        _, answer = served.post(prompt=first, n=3, seed=1)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 48 if joins else 52}


def test_the_pieces_of_a_prompt_are_widths_that_are_compiled_once(joins):
    if joins:
        pytest.skip("for wings that compile")
    config = toy_config(n_positions=300)
    for begin in (0, 130, 203):
        prompt = Prompt(Continuation(np.arange(297) % 23, None, Transcript(IdTokenizer()), print), None)
        prefill = Prefill(lambda batch, capacity: ToyDecoder(config, batch, capacity), config, [prompt])
        prefill.decoder.restart(begin)
        while not prefill.is_done:
            room = prefill.decoder.slots - prefill.decoder.length
            piece = prefill.extension(512)
            prefill.take(piece.decoder.extend(piece.token_ids, piece.mask, last_only=True))
            width = power_of_two(piece.token_ids.shape[1], 512)
            assert width <= max(room, 8), "no piece is cut at the cache's end to an odd width"


def test_few_numbers_of_rows_are_met_whatever_the_lengths(joins):
    """A program is compiled for each number of rows. Who joins calls pads them itself."""
    if joins:
        pytest.skip("for wings that compile")
    model, met = ToyModel(n_positions=256), set()
    with Served(model, most_rows=4, prefix_tokens=0) as served:
        extend = ToyDecoder._run

        def watch(decoder: ToyDecoder, ids: np.ndarray, *arguments: Any, **options: Any) -> Any:
            met.add(ids.size)
            return extend(decoder, ids, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ToyDecoder, "_run", watch)
            for length in range(1, 200, 3):
                assert served.post(prompt=[5 + length] * length, max_tokens=2)[0] == 200
                assert served.post(prompt=[5] * length, max_tokens=1, echo=True, logprobs=1)[0] == 200
    assert met <= {1, 2, 4, *range(8, 513, 8)} and len(met) > 20


def columns(held: int, count: int) -> Columns:
    array = np.zeros((1, held, 2), np.float32)
    return Columns((array,), (array,), 0, count)


def test_kept_prompts_are_counted_by_the_columns_that_are_held():
    store = PrefixStore(128)
    first, second, third = (np.full(20, n) for n in range(3))
    store.keep(first, columns(64, 20))
    store.keep(second, columns(64, 20))
    assert store.tokens == 128
    store.keep(third, columns(192, 20))
    assert store.find(np.append(third, 5)) is None, "alone above the limit"
    store.keep(third, columns(64, 20))
    assert store.tokens == 128 and store.find(np.append(first, 5)) is None
    assert store.find(np.append(second, 5)) is not None


def test_only_prompts_that_may_have_more_in_common_are_compared(monkeypatch):
    store, compared = PrefixStore(10_000), []
    monkeypatch.setattr(prefixes, "_in_common", lambda a, b: compared.append(a) or in_common(a, b))
    for n in range(50):
        store.keep(np.array([n, *range(30)]), columns(31, 31))
    store.keep(np.array([7, *range(20), 99, 99]), columns(23, 23))
    compared.clear()
    found = store.find(np.array([7, *range(25), 1, 2]))
    assert found is not None and found[1] == 26
    assert store.find(np.array([90, *range(30)])) is None
    assert len(compared) == 1


def test_warming_up_meets_all_sizes_and_leaves_no_trace():
    model = ToyModel()
    with Served(model, most_rows=6) as served:
        warm_up(served.engine)
        assert {1, 2, 4, 6} <= {decoder.batch for decoder in model.decoders}
        assert "gptj_generated_tokens_total 0\n" in served.engine.metrics.text()
        assert served.is_empty(1) and served.post(prompt=PROMPT)[0] == 200


def test_who_needs_what_is_not_compiled_yet_waits_without_the_others():
    """A prompt whose cache has not been met is left while rows run, and taken once it is, or when nobody runs."""
    long, short = [1 + n % 280 for n in range(300)], [5] * 9
    endless = {"prompt": "Once", "max_tokens": 400, "temperature": 0, "logit_bias": {"289": -100}}
    with Served(ToyModel(n_positions=512, slow_s=0.005), most_rows=4) as served:
        served.engine.met_slots = 256
        assert served.post(prompt=long, max_tokens=2)[0] == 200, "nobody else is there"
        with served.streamed(**endless) as events:
            next(events)
            answered = threading.Event()
            asker = threading.Thread(target=lambda: (served.post(prompt=long, max_tokens=2), answered.set()))
            asker.start()
            for _ in range(3):
                assert served.post(prompt=short, max_tokens=3)[0] == 200
            assert not answered.is_set() and served.engine.waiting == 1
            served.engine.met_slots = None
            assert answered.wait(10), "while the first is still being answered"
            next(events)
        asker.join()


def test_a_text_that_outgrows_what_is_compiled_waits_without_the_others(joins):
    """It is put aside with its columns while others run, and goes on once its cache is met, or nobody else is there."""
    if joins:
        pytest.skip("for wings that compile")
    model = ToyModel(n_positions=512, slow_s=0.003)
    endless = {"max_tokens": 400, "temperature": 0, "logit_bias": {"289": -100}}
    ids = [3 * n % 280 for n in range(90)]

    def largest() -> int:
        return max(decoder.slots for decoder in model.decoders)

    with Served(model, most_rows=4) as served:
        expected = served.tokens(prompt=ids, **endless)
        served.engine.met_slots = 256
        assert served.tokens(prompt=ids, **endless) == expected, "nobody else is there: it waits for no thread"
        found: list[Any] = []
        model.decoders.clear()
        thread = threading.Thread(target=lambda: found.append(served.tokens(prompt=ids, **endless)))
        with served.streamed(prompt="Once", **{**endless, "max_tokens": 500}) as events:
            next(events)
            thread.start()
            (batch,) = served.engine._batches.values()
            while not batch.aside:
                next(events)
            assert served.engine.running == 2 and largest() == 256
            served.engine.met_slots = None
            while batch.aside or largest() < 512:  # none is aside any more before its cache is made
                next(events)
        thread.join(20)
        assert found == [expected]
        served.engine.met_slots = 256
        with served.streamed(prompt="Once", **endless) as events:
            next(events)
            with served.streamed(prompt=ids, **endless) as others:
                next(others)
                while not batch.aside:
                    next(events)
        assert served.is_empty(), "who leaves while it is aside is forgotten"


def test_larger_caches_are_met_behind_the_engine():
    model = ToyModel(n_positions=512)
    with Served(model, most_rows=2) as served:
        thread = warm_up_behind(served.engine)
        assert served.post(prompt=PROMPT)[0] == 200
        thread.join(120)
        assert served.engine.met_slots is None and not thread.is_alive()
        assert {(decoder.batch, decoder.slots) for decoder in model.decoders} >= set(sizes(model.config, 2))


def test_larger_caches_are_met_with_each_adapter_which_the_engine_alone_brings_into_use():
    model, used = ToyModel(n_positions=512, slow_s=0.001), []
    made = []  # the adapter at work, and the size
    make = model._decoder

    def make_and_tell(batch: int, capacity: int) -> Any:
        decoder = make(batch, capacity)
        made.append((used[-1][0], decoder.batch, decoder.slots))
        return decoder

    model._decoder = make_and_tell  # type: ignore[method-assign]
    with Served(
        model, most_rows=2, use_adapter=lambda name: used.append((name, threading.current_thread().name))
    ) as served:
        thread = warm_up_behind(served.engine, ["one", "two"])
        while thread.is_alive():
            assert served.post(prompt=PROMPT, max_tokens=2)[0] == 200
            thread.join(0.05)  # which runs when nobody else would
        assert served.engine.met_slots is None
    assert {name for _, name in used} == {"gptj-engine"}
    assert {(name, *size) for name in (None, "one", "two") for size in sizes(model.config, 2)} <= {*made}


def test_the_end_waits_for_what_was_begun_and_takes_no_more():
    served = Served(ToyModel(slow_s=0.01), most_rows=1)
    with served:
        with served.streamed(prompt="Once", max_tokens=50, temperature=0, logit_bias={"289": -100}) as events:
            next(events)
            served.server.handle_exit(2, None)
            *parts, done = events
            assert done == "[DONE]" and parts[-1]["choices"][0]["finish_reason"] == "length"
        served._thread.join(10)
        with pytest.raises(ConnectionError):
            served.ask("GET", "/health")


def test_the_second_signal_ends_at_once():
    served = Served(ToyModel(slow_s=0.05), most_rows=1)
    with served:
        with served.streamed(prompt="Once", max_tokens=120, temperature=0, logit_bias={"289": -100}) as events:
            next(events)
            begin = time.monotonic()
            served.server.handle_exit(2, None)
            served.server.handle_exit(2, None)
            served._thread.join(10)
            assert served.server.was_forced and time.monotonic() - begin < 3
            *_, last = events
            assert last["error"]["code"] == "shutting_down"
        served.engine.close(10)


def test_a_folder_that_searches_is_served_without_its_search():
    with pytest.warns(CheckpointWarning, match="greedy or sampled"):
        assert servable(GenerationConfig(num_beams=4)).strategy == "greedy"
    assert servable(GenerationConfig(num_return_sequences=1)).strategy == "greedy"


def test_the_prompt_of_the_next_text_is_read_before_there_is_a_row_for_it():
    """While all rows are taken one prompt is read ahead, and no second; its text has the row of whoever ends first."""
    model = ToyModel(n_positions=512, slow_s=0.002)
    endless = {"max_tokens": 450, "temperature": 0, "logit_bias": {"289": -100}}
    with Served(model, most_rows=2) as served:
        prompts = ["Once", "Twice", "Thrice", "Four times"]
        alone = [served.tokens(prompt=prompt, **{**endless, "max_tokens": 20}) for prompt in prompts]
        with served.streamed(prompt="One", **endless) as one, served.streamed(prompt="Two", **endless) as two:
            next(one), next(two)
            found: dict[int, Any] = {}

            def ask(n: int) -> None:
                found[n] = served.tokens(prompt=prompts[n], **{**endless, "max_tokens": 20})

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
            for thread in threads:
                thread.start()
            (batch,) = served.engine._batches.values()
            while not batch.aside or served.engine.waiting < len(prompts) - 1:
                next(one)
            assert served.engine.running == 3 and len(batch) == 2
        for thread in threads:
            thread.join(20)
        assert [found[n] for n in range(len(prompts))] == alone
        assert served.is_empty()
