"""Every malformed request gets a 4xx with OpenAI's JSON error and nothing of the machine, and the server lives on."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, ToyModel

from gptj.serving import server
from gptj.serving.app import Access, Limits
from gptj.serving.server import Protocol

LIMIT = 200_000


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = Limits(body_bytes=LIMIT, read_s=0.5, answer_s=20)
    before = Protocol.headers_s, Protocol.rest_s
    Protocol.headers_s = Protocol.rest_s = 0.5
    with Served(ToyModel(), limits=limits, most_rows=4, most_waiting=16) as running:
        yield running
    Protocol.headers_s, Protocol.rest_s = before


def check_error(answer: Any) -> dict[str, Any]:
    assert answer.keys() == {"error"}, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    message = error["message"].replace("/v1/", "").replace("application/json", "")
    assert message and "Traceback" not in message and "/" not in message
    assert ".py" not in error["message"] and len(error["message"]) < 400
    return dict(error)


def check_alive(served: Served) -> None:
    assert served.ask("GET", "/health")[0] == 200
    assert len(served.tokens(prompt="Once", max_tokens=2, temperature=0)) == 2
    assert served.is_empty()


BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "half an object": b'{"model": "tiny", "prompt": "a"',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "a name twice": b'{"model": "tiny", "prompt": "a", "prompt": "b"}',
    "NaN": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
    "a huge number": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "more digits than Python reads": b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "UTF-16": '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
    "deep": b'{"model": "tiny", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a control character": b'{"model": "tiny", "prompt": "a\x01"}',
}

FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no prompt": ({}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, "prompt"),
    "empty ids": ({"prompt": [[]]}, "prompt"),
    "texts and ids": ({"prompt": ["a", [1]]}, "prompt"),
    "ids and texts": ({"prompt": [1, "a"]}, "prompt"),
    "a prompt that is an object": ({"prompt": {"text": "a"}}, "prompt"),
    "a prompt that is a number": ({"prompt": 3}, "prompt"),
    "ids that are true": ({"prompt": [True]}, "prompt"),
    "ids with a fraction": ({"prompt": [1.5]}, "prompt"),
    "an id below 0": ({"prompt": [-1]}, "prompt"),
    "an id beyond the model": ({"prompt": [300]}, "prompt"),
    "an id beyond int64": ({"prompt": [2**70]}, "prompt"),
    "half a character": ({"prompt": "\ud800"}, "prompt"),
    "too long": ({"prompt": [1] * 129}, "prompt"),
    "too long a text": ({"prompt": "fox " * 2000}, "prompt"),
    "no room": ({"prompt": [1] * 120, "max_tokens": 9}, "max_tokens"),
    "a prompt that fills the model": ({"prompt": [1] * 128}, "prompt"),
    "a prompt that fills the model, and one token": ({"prompt": [1] * 128, "max_tokens": 1}, "max_tokens"),
    "max_tokens below 0": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "max_tokens with a fraction": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens"),
    "max_tokens beyond all": ({"max_tokens": 2**80}, "max_tokens"),
    "n of 0": ({"n": 0}, "n"),
    "n of 129": ({"n": 129}, "n"),
    "more choices than may wait": ({"n": 17}, "n"),
    "best_of": ({"n": 1, "best_of": 2}, "best_of"),
    "temperature below 0": ({"temperature": -0.1}, "temperature"),
    "temperature as text": ({"temperature": "hot"}, "temperature"),
    "temperature as a list": ({"temperature": [1]}, "temperature"),
    "temperature that vanishes": ({"temperature": 1e-9}, "temperature"),
    "top_p above 1": ({"top_p": 1.1}, "top_p"),
    "top_k below 0": ({"top_k": -1}, "top_k"),
    "presence_penalty of 3": ({"presence_penalty": 3}, "presence_penalty"),
    "frequency_penalty as text": ({"frequency_penalty": "1"}, "frequency_penalty"),
    "logit_bias as a list": ({"logit_bias": [1]}, "logit_bias"),
    "logit_bias of a word": ({"logit_bias": {"fox": 1}}, "logit_bias"),
    "logit_bias of 101": ({"logit_bias": {"3": 101}}, "logit_bias"),
    "logit_bias beyond the model": ({"logit_bias": {"300": 1}}, "logit_bias"),
    "logit_bias of one token twice": ({"logit_bias": {"3": 1, "03": 2}}, "logit_bias"),
    "stop as a number": ({"stop": 3}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "more than 64 stops": ({"stop": ["a"] * 65}, "stop"),
    "logprobs true": ({"logprobs": True}, "logprobs"),
    "logprobs of 21": ({"logprobs": 21}, "logprobs"),
    "seed as text": ({"seed": "1"}, "seed"),
    "seed beyond 64 bits": ({"seed": 2**64}, "seed"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream_options unknown": ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    "echo as a number": ({"echo": 1}, "echo"),
    "a suffix": ({"suffix": "end"}, "suffix"),
    "an unknown field": ({"max_token": 4}, "max_token"),
    "another's field": ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
    "model as a number": ({"model": 3}, "model"),
    "no model": ({"model": None}, "model"),
}

CHATS: dict[str, dict[str, Any]] = {
    "no messages": {},
    "messages as text": {"messages": "hi"},
    "a message as text": {"messages": ["hi"]},
    "no role": {"messages": [{"content": "hi"}]},
    "an unknown role": {"messages": [{"role": "robot", "content": "hi"}]},
    "no content": {"messages": [{"role": "user"}]},
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "tools": {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]},
    "JSON asked for": {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}},
    "top_logprobs alone": {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2},
    "two lengths": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "max_completion_tokens": 2},
    "no template": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_object_is_refused(served, name):
    status, answer = served.post(body=BODIES[name])
    assert status == 400
    assert check_error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_breaks_its_rule_is_refused_by_name(served, name):
    members, param = FIELDS[name]
    status, answer = served.post(
        body={"model": "tiny", "prompt": "Once", **members} if name != "no prompt" else {"model": "tiny"}
    )
    assert status == 400, answer
    error = check_error(answer)
    assert error["param"] == param
    assert param is None or param in error["message"]


def test_a_short_list_or_object_is_shown_as_it_was_found(served):
    asked = {"model": "tiny", "prompt": "Once"}
    for name, value, shown in [
        ("prompt", [[1], [-5]], "found [[1], [-5]]"),
        ("logit_bias", {"-1": 1}, 'found {"-1": 1}'),
        ("stop", [3, "a" * 90], "found a list of 2"),
        ("prompt", [True] * 30, "found a list of 30"),
    ]:
        assert check_error(served.post(body=asked | {name: value})[1])["message"].endswith(shown)


def test_of_many_messages_the_one_at_fault_is_named(served):
    said = {"role": "user", "content": "hi"}
    for wrong in ({"role": "tool", "content": "hi"}, {"role": "user"}, "hi"):
        status, answer = served.post("/v1/chat/completions", messages=[said, said, wrong, said])
        error = check_error(answer)
        assert status == 400 and error["param"] == "messages" and error["message"].startswith("messages[2]: expected")


def test_of_many_prompts_the_one_at_fault_is_named(served):
    beyond, long, room = [1, 300], [1] * 129, "max_tokens: the model has 128 positions, and 120 of "
    for asked, said in (
        ({"prompt": [[1, 2], [3], beyond]}, "prompt[2][1]: no such token"),
        ({"prompt": beyond}, "prompt[1]: no such token"),
        ({"prompt": [[1], long]}, "prompt[1]: expected at most 128 tokens"),
        ({"prompt": ["a", "fox " * 600], "n": 2}, "prompt[1]: expected at most 128 tokens"),
        ({"prompt": long}, "prompt: expected at most 128 tokens"),
        ({"prompt": [[1], [1] * 120], "max_tokens": 9}, room + "prompt[1]"),
        ({"prompt": [[1] * 120], "max_tokens": 9}, room + "the prompt"),
        ({"prompt": [[1], [1] * 128]}, "prompt[1]: expected at most 127 tokens"),
    ):
        error = check_error(served.post(**asked)[1])
        assert error["message"].startswith(said) and error["param"] == said.partition(":")[0].partition("[")[0]


def test_best_of_below_n_is_not_called_above(served):
    for n, best_of in ((1, 2), (2, 1)):
        _, answer = served.post(prompt="Once", n=n, best_of=best_of)
        assert check_error(answer)["message"] == f"best_of is not supported but as n, which is {n}"


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_that_cannot_be_had_is_refused(served, name):
    status, answer = served.post("/v1/chat/completions", {"model": "tiny", **CHATS[name]})
    assert status == 400
    check_error(answer)


def test_the_server_lives_on(served):
    check_alive(served)


def test_an_unknown_model_is_not_found(served):
    status, answer = served.post(body={"model": "gpt-4", "prompt": "a"})
    assert (status, check_error(answer)["code"]) == (404, "model_not_found")
    assert served.ask("GET", "/v1/models/gpt-4")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/../../etc/passwd", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/models/", 404),
    ],
)
def test_what_is_not_there_is_said_in_json(served, method, path, status):
    found, answer = served.ask(method, path)
    assert found == status
    check_error(answer)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", 'application/json; charset="UTF-16"']
)
def test_a_form_that_any_page_may_send_is_refused(served, kind):
    status, answer = served.post(body=b'{"model": "tiny", "prompt": "a"}', headers={"Content-Type": kind})
    assert status == 415
    check_error(answer)


def test_too_large_a_body_is_refused_whether_or_not_it_says_its_size(served):
    body = json.dumps({"model": "tiny", "prompt": "a" * 10_000_000}).encode()
    assert len(body) > LIMIT
    status, answer = served.post(body=body[: 4 * LIMIT])
    assert (status, check_error(answer)["code"]) == (413, "body_too_large")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n" % 65536 + b"a" * 65536 + b"\r\n"
    answer = served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 8, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    served.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)  # cut off in the middle: it must not be kept
    check_alive(served)


def test_a_client_that_sends_nothing_or_slowly_is_answered_and_left(served):
    begin = time.monotonic()
    assert b"408" in served.raw(b"").split(b"\r\n")[0]
    assert b"408" in served.raw(b"POST /v1/comple").split(b"\r\n")[0]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    answer = served.raw(head, b'{"model"')
    assert b"408" in answer.split(b"\r\n")[0]
    check_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert served.raw(first, b"GET /hea", pause_s=0.1).count(b"HTTP/1.1") == 2, "a connection's second request, too"
    assert time.monotonic() - begin < 10
    check_alive(served)


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/two\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    ],
    ids=["a word", "another HTTP", "a size below 0", "two sizes", "a huge header", "TLS"],
)
def test_what_is_no_http_is_refused_in_json(served, sent):
    answer = served.raw(sent, b"\r\n\r\n")
    if answer:  # where more was sent than was read, the system may take the answer back
        assert answer.startswith(b"HTTP/1.1 4")
    check_alive(served)


_POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
_BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
_SIZED = b"Content-Length: %d\r\n" % len(_BODY)
_CHUNK = b"%x\r\n%s\r\n" % (len(_BODY), _BODY)

LIES: dict[str, tuple[bytes, int]] = {
    "a chunk longer than it says": (_CHUNKED + b"5\r\n" + _BODY + b"\r\n0\r\n\r\n", 400),
    "a chunk shorter than it says": (_CHUNKED + b"ff\r\n" + _BODY + b"\r\n0\r\n\r\n", 408),
    "a chunk's size in words": (_CHUNKED + b"ten\r\n" + _BODY + b"\r\n0\r\n\r\n", 400),
    "a chunk's size below 0": (_CHUNKED + b"-5\r\n" + _BODY + b"\r\n0\r\n\r\n", 400),
    "a chunk beyond 64 bits": (_CHUNKED + b"f" * 22 + b"\r\n" + _BODY + b"\r\n0\r\n\r\n", 400),
    "chunks that never end": (_CHUNKED + _CHUNK, 408),
    "a chunk's extension without end": (_CHUNKED + b"2;" + b"a" * 200_000 + b"\r\n", 400),
    "trailers without end": (_CHUNKED + _CHUNK + b"0\r\n" + b"X: y\r\n" * 40_000, 400),
    "chunks of a byte": (_CHUNKED + b"".join(b"1\r\n%c\r\n" % c for c in _BODY) + b"0\r\n\r\n", 200),
    "a coding of the transfer": (_POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "a coding of the body": (_POST + _SIZED + b"Content-Encoding: gzip\r\n\r\n" + _BODY, 415),
    "two sizes that differ": (_POST + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\n" + _BODY, 400),
    "a size in words": (_POST + b"Content-Length: ten\r\n\r\n" + _BODY, 400),
    "a size beyond all": (_POST + b"Content-Length: %s\r\n\r\n" % (b"9" * 30) + _BODY, 400),
    "a size too small": (_POST + b"Content-Length: 5\r\n\r\n" + _BODY, 400),
    "a size too large": (_POST + b"Content-Length: 100\r\n\r\n" + _BODY, 408),
    "no size": (_POST + b"\r\n" + _BODY, 400),
    "a name of a header with a space": (_POST + b"X A: b\r\n" + _SIZED + b"\r\n" + _BODY, 400),
    "a header with a zero": (_POST + b"X-A: \x00\r\n" + _SIZED + b"\r\n" + _BODY, 400),
    "5,000 headers": (_POST + b"X-A: b\r\n" * 5000 + _SIZED + b"\r\n" + _BODY, 200),
    "20,000 headers": (_POST + b"X-A: b\r\n" * 20_000 + _SIZED + b"\r\n" + _BODY, 400),
    "a websocket": (b"GET /v1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", 404),
    "a tunnel": (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "the beginning of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "a path that is no text": (b"GET /v1/models/%ff%00%zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "a target for a proxy": (_POST.replace(b"/v1", b"HTTP://x:1/v1") + _SIZED + b"\r\n" + _BODY, 200),
    "a proxy's target without a path": (b"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    "a target of another kind": (b"GET ftp://x/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    "a size that is refused unread": (_POST + b"Content-Length: 999999999\r\n\r\n", 413),
    "a size that asks first": (_POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (LIMIT + 1), 413),
}


def test_a_request_that_lies_about_itself_is_answered_in_json(served):
    for name, (sent, status) in LIES.items():
        answer = served.raw(sent)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b"\r\n")[0].startswith(b"HTTP/1.1 %d" % status), (name, answer[:200])
        if status != 200:
            check_error(json.JSONDecoder().raw_decode(body.decode())[0])
    check_alive(served)


def test_a_request_of_two_lengths_is_the_last_of_its_connection(served):
    """A proxy may take the other length, and what follows for another's request (RFC 9112, 6.1)."""
    body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 2}).encode()
    lengths = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    found = served.raw(head + lengths + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200") and found.count(b"HTTP/1.1") == 1


def test_a_half_closed_socket_takes_no_row(served):
    body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 60}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for sent in (head % len(body) + body, head % len(body) + body[:20], head[:20]):
        answer = served.raw(sent, half_close=True)
        assert answer.startswith(b"HTTP/1.1 400"), sent
        check_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
    short = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert served.raw(short, half_close=True).startswith(b"HTTP/1.1 200")
    assert served.raw(b"", half_close=True) == b""
    check_alive(served)


def test_a_client_who_leaves_before_its_body_is_there_is_no_error(served, caplog):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head + b"{")
    until = time.monotonic() + 5
    while 'status="499"' not in served.engine.metrics.text() and time.monotonic() < until:
        time.sleep(0.01)
    assert 'status="499"' in served.engine.metrics.text()
    assert not [one for one in caplog.records if one.exc_info]


def test_a_client_that_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr(Protocol, "unread_s", 0.3)
    with Served(ToyModel()) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.settimeout(5)
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 10:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        while served.server.server_state.connections and time.monotonic() - begin < 10:
            time.sleep(0.01)
        assert not served.server.server_state.connections
        assert served.ask("GET", "/health")[0] == 200


def test_what_is_one_connection_too_many_is_told_to_come_again(monkeypatch):
    monkeypatch.setattr(server, "_backlog", lambda: 2)
    monkeypatch.setattr(Protocol, "headers_s", 20.0)
    with Served(ToyModel()) as served, contextlib.ExitStack() as held:
        for _ in range(6):
            held.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        head, _, body = served.raw(b"").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in head
        assert check_error(json.loads(body))["code"] == "too_many_connections"
        held.close()
        until = time.monotonic() + 5
        while len(served.server.server_state.connections) and time.monotonic() < until:
            time.sleep(0.01)
        check_alive(served)


def test_connections_leave_files_for_others(monkeypatch):
    for most, backlog in ((1024, 128), (120, 15), (2**20, 2048), (resource.RLIM_INFINITY, 2048), (4, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=most: (most, most))
        assert server._backlog() == backlog


def test_the_key_is_needed_where_there_is_one():
    with Served(ToyModel(), access=Access(api_key=" sécret")) as served:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic s"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics"):
                status, answer = served.ask("GET", path, headers=headers)
                assert status == 401 and served.last_headers["WWW-Authenticate"] == "Bearer"
                assert "cret" not in json.dumps(answer)
            assert served.post(prompt="a", headers=headers)[0] == 401
        right = {"Authorization": "Bearer sécret".encode().decode("latin-1")}
        assert served.ask("GET", "/v1/models", headers=right)[0] == 200
        assert served.post(prompt="a", headers=right)[0] == 200
        assert served.ask("GET", "/health")[0] == served.ask("GET", "/")[0] == 200


def test_pages_of_others_may_not_ask_unless_they_are_named():
    evil, friend = {"Origin": "http://evil.example"}, {"Origin": "http://friend.example"}
    with Served(ToyModel()) as served:
        own = {"Origin": f"http://127.0.0.1:{served.port}"}
        assert served.post(prompt="a", headers=own)[0] == 200
        assert served.post(prompt="a", headers={"Origin": "http://127.0.0.2:1"})[0] == 200
        assert served.post(prompt="a", headers={"Origin": "http://127.0.0.1.evil.example"})[0] == 403
        assert served.post(prompt="a", headers=evil)[0] == 403
        assert served.post(prompt="a", headers={"Origin": "null"})[0] == 403
        assert "access-control-allow-origin" not in served.last_headers
    with Served(ToyModel(), access=Access(origins=("http://friend.example",))) as served:
        assert served.post(prompt="a", headers=friend)[0] == 200
        assert served.last_headers["access-control-allow-origin"] == "http://friend.example"
        assert served.post(prompt="a", headers=evil)[0] == 403
        names = "authorization,content-type,x-stainless-os"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
        assert served.ask("OPTIONS", "/v1/completions", headers=friend | asked)[0] == 200
        assert served.ask("OPTIONS", "/v1/completions", headers=evil | asked)[0] == 400
        assert "access-control-allow-origin" not in served.last_headers
        assert served.last_headers.get_content_type() == "application/json"


def test_who_would_wait_too_long_is_told_to_come_again():
    with Served(ToyModel(slow_s=0.05), most_rows=1, most_waiting=2) as served:
        endless = {"prompt": "Once", "max_tokens": 120, "temperature": 0, "logit_bias": {"289": -100}}
        with served.streamed(**endless) as first, served.streamed(**endless):
            next(first)
            while served.engine.running < 2 and next(first):  # the second's prompt is read before it has a row
                pass
            with served.streamed(prompt="Once"), served.streamed(prompt="Once"):
                status, answer = served.post(prompt="Once")
                assert (status, check_error(answer)["code"]) == (429, "queue_full")
                assert served.last_headers["Retry-After"]
        assert served.is_empty()


def test_an_answer_that_takes_too_long_is_given_up():
    with Served(ToyModel(slow_s=0.05), limits=Limits(answer_s=0.3)) as served:
        status, answer = served.post(prompt="Once", max_tokens=100, temperature=0)
        assert (status, check_error(answer)["code"]) == (504, "timeout")
        assert served.last_headers["x-should-retry"] == "false"
        with served.streamed(prompt="Once", max_tokens=100, temperature=0) as events:
            *_, last = events
        assert last["error"]["code"] == "timeout"
        assert served.is_empty()


def test_an_error_of_the_model_is_said_without_its_traceback_and_the_rest_goes_on(caplog):
    model = ToyModel()
    with Served(model) as served:
        make, model._decoder = model._decoder, lambda *_: 1 / 0  # type: ignore[method-assign]
        served.engine.make_decoder = model._decoder
        status, answer = served.post(prompt="Once")
        assert (status, check_error(answer)["code"]) == (500, "internal_error")
        served.engine.make_decoder = make
        check_alive(served)
        admit, served.engine._admit = served.engine._admit, lambda: 1 / 0  # type: ignore[method-assign]
        assert served.post(prompt="Once")[0] == 500, "a mistake of the engine's own"
        served.engine._admit = admit  # type: ignore[method-assign]
        check_alive(served)
    assert "ZeroDivisionError" in caplog.text
