"""The server over each backend's own decoder: rows that come and go, and the answers of lone runs."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from adapter_samples import write_sample_adapter
from served import Served

from gptj.checkpoint import write_checkpoint
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.serving import engine, prefill, warming
from gptj.serving.warming import warm_up, warm_up_behind

PROMPT = "Once upon a time there was a little fox"


@pytest.mark.parametrize(("start", "count", "to"), [(0, 5, 3), (3, 9, 3), (1, 40, 20)])
def test_columns_that_are_moved_to_another_cache_give_the_same_logits(model, start, count, to):
    """Copied out of one row and slot, put into others beside another row, and then continued."""
    ids = np.array([[7 * n % 300 for n in range(start + count)]])
    first = model._decoder(2, 64)
    first.restart(start)
    first.extend(np.repeat(ids[:, start:], 2, 0), np.array([[False] * count, [True] * count]))
    second = model._decoder(4, 64)
    second.restart(to + count)
    second.write(1, to, first.read(1, start, count))
    there = np.array([[False], [True], [False], [False]])
    moved = second.extend(np.full((4, 1), 5), there, last_only=True).logits[1]
    lone = model._decoder(1, count + 1).prefill(np.array([[*ids[0, start:], 5]])).logits[0]
    assert np.abs(moved - lone).max() < 2e-5
    some = max(count // 2, 1)
    third = model._decoder(1, some + 1)
    third.restart(some)
    third.write(0, 0, first.read(1, start, count), some)
    part = third.extend(np.array([[5]]), last_only=True).logits[0]
    lone = model._decoder(1, some + 1).prefill(np.array([[*ids[0, start : start + some], 5]])).logits[0]
    assert np.abs(part - lone).max() < 2e-5


@pytest.mark.parametrize("to", [9, 12, 14, 40], ids=["shortest", "before", "where they are", "later"])
def test_rows_that_are_moved_within_a_cache_go_on_as_before(model, to):
    """Rows of several lengths and one that is empty; then each takes another token."""
    rows = [[7 * n % 300 for n in range(9)], [], [5, 8, 13], [290]]
    decoder = model._decoder(4, 64)
    decoder.restart(14 - 9)
    padded = np.array([[0] * (9 - len(ids)) + ids for ids in rows])
    there = np.array([[False] * (9 - len(ids)) + [True] * len(ids) for ids in rows])
    decoder.extend(padded, there)
    with pytest.raises(InputError, match="expected 9 to 64, found 8"):
        decoder.move(8)
    decoder.move(to)
    assert decoder.length == to and decoder.mask.sum(1).tolist() == [9, 0, 3, 1]
    found = decoder.extend(np.full((4, 1), 5), np.array([[True], [False], [True], [True]]), last_only=True).logits
    for row, ids in enumerate(rows):
        if ids:
            lone = model._decoder(1, len(ids) + 1).prefill(np.array([[*ids, 5]])).logits[0]
            assert np.abs(found[row] - lone).max() < 2e-5


def test_answers_under_load_are_those_of_lone_runs_and_no_row_is_lost(served):
    made: list[Any] = []
    begin = [11 * n % 290 for n in range(30)]  # few lengths, since XLA compiles a lone run of each

    def ask(number: int) -> None:
        chooser = random.Random(number)
        ids = [*begin, number] if number % 3 == 0 else [chooser.randrange(290) for _ in range(number % 2 * 28 + 4)]
        new = 1 + number * 7 % 25
        drawn = number % 2
        settings = {"temperature": 0.9, "top_p": 0.95, "seed": number} if drawn else {"temperature": 0}
        if number % 5 == 4:
            with served.streamed(prompt=ids, max_tokens=150, **settings) as events:
                next(events)
            return
        made.append((ids, number if drawn else None, new, served.tokens(prompt=ids, max_tokens=new, **settings)))

    def client(first: int) -> None:
        for number in range(first, 30, 8):
            ask(number)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert served.is_empty() and len(made) == 24
    for ids, seed, new, tokens in made:
        fields = {} if seed is None else {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
        assert tokens == served.lone(ids, seed=seed, max_new_tokens=new, **fields)
    assert served.engine.metrics.value("gptj_prompt_tokens_reused_total") > 0


def test_a_long_prompt_while_another_is_answered(served):
    long = [13 * n % 290 for n in range(200)]
    with served.streamed(prompt=PROMPT, max_tokens=60, temperature=0, logit_bias={"289": -100}) as events:
        next(events)
        made = served.tokens(prompt=long, max_tokens=20, temperature=0)
        *parts, done = events
    assert made == served.lone(long, max_new_tokens=20)
    assert done == "[DONE]" and len(parts) > 20


def test_nothing_is_compiled_after_the_warm_up(wing, tmp_path, monkeypatch):
    """Prompts of many lengths, with prefixes in common, that join and leave: XLA has met all their sizes."""
    if wing.name == "pt":
        return  # compiles nothing
    for room in (engine, prefill, warming):
        monkeypatch.setattr(room, "MOST", 32)  # fewer widths, to be quick
    # Models that are built alike share programs: no other test's has these sizes.
    config = revealing_config(n_positions=256, n_inner=88, vocab_size=300, eos_token_id=289, bos_token_id=289)
    model = prepared(wing, write_checkpoint(tmp_path / "tiny", config, revealing_fill(0)))
    made = programs(wing, model)
    with Served(model, most_rows=2) as served:
        warm_up(served.engine)
        before = made()
        assert len(before) > 20
        prompts = [[(seed + n) % 290 for n in range(length)] for seed, length in ((0, 3), (1, 240), (2, 100), (0, 60))]
        with served.streamed(prompt=PROMPT, max_tokens=200, temperature=0, logit_bias={"289": -100}) as events:
            next(events)
            for prompt in [*prompts, [*prompts[1][:200], 3, 4]]:
                assert served.post(prompt=prompt, max_tokens=5, logprobs=2, echo=len(prompt) == 100)[0] == 200
        assert served.post(prompt=prompts[0], n=2, max_tokens=5)[0] == 200
        assert made() == before


def test_larger_caches_are_compiled_behind_the_engine_with_every_adapter(wing, tmp_path, monkeypatch):
    """Then a prompt for any of them compiles nothing; two adapters of one shape share their programs."""
    if wing.name == "pt":
        return  # compiles nothing
    for room in (engine, prefill, warming):
        monkeypatch.setattr(room, "MOST", 8)  # one width, to be quick
    config = revealing_config(n_positions=512, vocab_size=300, eos_token_id=289, bos_token_id=289)
    folder = write_checkpoint(tmp_path / "tiny", config, revealing_fill(0))
    model = prepared(wing, folder)
    names = ("one", "two")
    for seed, name in enumerate(names):
        model.load_adapter(write_sample_adapter(tmp_path / name, "default", config=config, seed=seed), name)
    prompt = [7 * n % 290 for n in range(300)]
    made = programs(wing, model)
    with Served(model, adapters=names, use_adapter=model.set_adapter, most_rows=1) as served:
        warm_up_behind(served.engine, names[:1]).join()
        first = made()
        warm_up_behind(served.engine, names).join()
        before, answers = made(), []
        assert first and {key[0] for key, *_ in before - first} <= {"_run"}, "all programs are one's"
        for name in ("tiny", *names):
            asked = {"model": name, "prompt": prompt, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
            status, answer = served.post(body=asked)
            assert status == 200
            answers.append(answer["choices"][0]["token_ids"])
        assert made() == before
        for adapter, answer in zip((None, *names), answers, strict=True):
            model.set_adapter(adapter)
            assert answer == served.lone(prompt, max_new_tokens=4)


def prepared(wing, folder):
    model = wing.model("causal_lm").from_pretrained(folder, param_dtype="float32")
    model.prepare_for_inference()
    model.to_numpy = wing.numpy
    return model


def programs(wing, model):
    """Gives what has been compiled since for the model."""
    if wing.name == "tf":
        return lambda: {
            (key, id(function), number)
            for compiled in getattr(model, "_compiled", {}).values()
            for key, function in compiled.functions.items()
            for number in range(function.experimental_get_tracing_count())
        }
    import jax

    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **more: names.append(str(more)) if event.endswith("backend_compile_duration") else None
    )
    return lambda: {(("program",), number, name) for number, name in enumerate(names)}


def test_a_prompts_scores_are_the_models_own(served, model, wing):
    _, answer = served.post(prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    ids = served.tokenizer.encode(PROMPT)
    logits = wing.numpy(model(np.array([ids])).logits)[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [scores[n, token] for n, token in enumerate(ids[1:])]
    assert answer["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def test_adapters_are_models_of_their_own_names_at_the_same_time(wing, folder, tmp_path):
    """Base and two adapters, greedy and drawn, mixed: each answer is the lone run's with its adapter and its seed."""
    model = wing.model("causal_lm").from_pretrained(folder, param_dtype="float32")
    model.prepare_for_inference()
    model.to_numpy = wing.numpy
    names = {"tiny": None, "one": "one", "two": "two"}
    for name, kind in (("one", "all"), ("two", "patterns")):
        model.load_adapter(write_sample_adapter(tmp_path / name, kind, config=model.config), name)
    prompt = [3 * n % 290 for n in range(20)]  # long enough for a prefix, which must not be another adapter's
    draws = [{"temperature": 0}, {"seed": 3}, {"seed": 2**63, "n": 2, "top_p": 0.9}]
    with Served(model, adapters=("one", "two"), use_adapter=model.set_adapter, most_rows=4) as served:
        found: dict[str, Any] = {}

        def ask(name: str) -> None:
            asked = {"model": name, "prompt": prompt, "max_tokens": 12, "return_token_ids": True}
            answers = [served.post(body={**asked, **draw})[1] for draw in draws]
            found[name] = [choice["token_ids"] for answer in answers for choice in answer["choices"]]

        clients = [threading.Thread(target=ask, args=(name,)) for name in names]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        assert [one["id"] for one in served.ask("GET", "/v1/models")[1]["data"]] == [*names]
        expected = {}
        for name, adapter in names.items():
            model.set_adapter(adapter)
            drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 12}
            expected[name] = [
                served.lone(prompt, max_new_tokens=12, do_sample=False),
                served.lone(prompt, seed=3, **drawn),
                *(served.lone(prompt, seed=2**63, copy=copy, top_p=0.9, **drawn) for copy in range(2)),
            ]
    assert found == expected
    for n in range(len(expected["tiny"])):
        assert len({tuple(texts[n]) for texts in expected.values()}) == 3, "three models"


def test_the_command_serves_and_ends_in_order(wing, folder):
    """One process: its line, an answer, and the end that waits for what was begun. It says nothing of its template."""
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    command = [sys.executable, "-m", "gptj", "serve", str(folder), "--backend", wing.name, "--port", "0"]
    command += ["--no-warm-up"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(rf"tiny in {wing.name} at http://127\.0\.0\.1:(\d+)\n", line)
            assert found, line + process.stderr.read()
            client = Served.__new__(Served)
            client.port = int(found[1])
            assert len(client.tokens(prompt="Once", max_tokens=3, temperature=0)) == 3
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 3}
            assert client.post("/v1/chat/completions", asked)[0] == 200
            assert b"invalid_http" in client.raw(b"no HTTP\r\n\r\n")
            endless = {"max_tokens": 200, "temperature": 0, "logit_bias": {"289": -100}}
            with client.streamed(prompt=PROMPT, **endless) as events:
                next(events)
                process.send_signal(signal.SIGTERM)
                *parts, done = events
            assert done == "[DONE]" and parts[-1]["choices"][0]["finish_reason"] == "length"
            assert process.wait(20) == 0
            said = process.stderr.read()
            assert re.fullmatch(r"gptj serve: \S+ \S+ uvicorn.error: Invalid HTTP request received.\n", said), said
        finally:
            process.kill()
