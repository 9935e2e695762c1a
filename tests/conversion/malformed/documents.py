"""Files of texts to be scored whose lines are not what they seem, and texts that a model cannot score."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from lawful import good_folder

from gptj.command.documents import read_documents
from gptj.command.opened_model import OpenedModel, Request
from gptj.command.score import check_documents
from malformed import Malformed

TITLE = "texts to be scored"
GOOD = {"text": "one"}


def case(
    what: str, data: bytes, names: str, outcome: Literal["refused", "said"] = "refused", whole: bool = False
) -> Malformed:
    return Malformed(
        what,
        lambda folder: (folder / "texts").write_bytes(data),
        lambda folder: read_documents(str(folder / "texts"), whole=whole),
        names,
        outcome,
    )


def lines(*objects: object) -> bytes:
    return "\n".join(map(json.dumps, objects)).encode()


def second(
    what: str, value: object, names: str = "line 3", outcome: Literal["refused", "said"] = "refused"
) -> Malformed:
    """A case whose third line is wrong, the first being good and the second empty."""
    return case(what, lines(GOOD) + b"\n\n" + lines(value), names, outcome)


def checked(what: str, value: object, names: str, *, prefix: int | None = 0, before: object = GOOD) -> Malformed:
    """A case that is read, and refused as a text of a model."""

    def make(folder: Path) -> None:
        good_folder(folder / "model")
        (folder / "texts").write_bytes(lines(value) if before is None else lines(before, value))

    def door(folder: Path) -> None:
        with mock.patch("gptj.command.opened_model.choose_backend", lambda name: "pt"):
            opened = OpenedModel(Request(directory=folder / "model"), needs_tokenizer=True)
        [*check_documents(opened, read_documents(str(folder / "texts")), prefix)]

    return Malformed(what, make, door, names)


def _from_stdin(what: str, data: bytes, names: str) -> Malformed:
    def door(folder: Path) -> None:
        with mock.patch("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data))):
            read_documents("-")

    return Malformed(f"stdin: {what}", lambda folder: None, door, names)


_NO_TEXT: dict[str, Any] = {
    "a number": 3, "true": True, "a list of texts": ["one"], "an object": {"a": 1}, "a fraction": 1.5, "a list": [],
}  # fmt: skip
_NO_IDS: dict[str, Any] = {
    "text": "1 2", "a number": 3, "fractions": [1.0, 2.5], "truths": [True, False], "a null among them": [1, None],
    "text among them": [1, "2"], "a row of rows": [[1, 2]], "an object": {"ids": [1]},
}  # fmt: skip
_PAIRS: dict[str, Any] = {"prompt": "One", "completion": " two"}

CASES = [
    case("empty", b"", "texts"),
    case("empty, as a whole", b"", "no text", whole=True),
    case("a line break alone, as a whole", b"\n", "no text", whole=True),
    case("not UTF-8", b"one\ntwo \xff", "offset 8"),
    case("not UTF-8, as a whole", b"one\ntwo \xff", "offset 8", whole=True),
    case("UTF-16", "one".encode("utf-16"), "UTF-8"),
    case("UTF-16 without a mark, as a whole", "one".encode("utf-16-be"), "line 1: not UTF-8", whole=True),
    case("gzip, as a whole", gzip.compress(b"one"), "found gzip", whole=True),
    case("a byte order mark alone, as a whole", b"\xef\xbb\xbf", "no text", whole=True),
    case("strings, a line each", b'"a"\n"b"', 'A text as JSON is {"text": "..."}', "said"),
    case("spaces alone", b" \n\t\n", "no text"),
    case("JSON, then text", lines(GOOD) + b"\nplain", "line 2"),
    case("text, then JSON", b"plain\n" + lines(GOOD), "line 2"),
    case("an array of objects", json.dumps([GOOD, GOOD]).encode(), 'A text as JSON is {"text": "..."}'),
    case("a key twice", lines(GOOD) + b'\n{"text": "a", "text": "b"}', "line 2"),
    case("JSON that does not end", lines(GOOD) + b'\n{"text": "a"', "line 2"),
    case("a list in place of an object", lines(GOOD) + b"\n[1]", "line 2"),
    case("NaN", lines(GOOD) + b'\n{"text": NaN}', "line 2"),
    _from_stdin("empty", b"", "stdin"),
    _from_stdin("not UTF-8", b"\xff", "stdin"),
    _from_stdin("a bad line", lines(GOOD, {"text": 3}), "line 2"),
    *(second(f"text is {what}", {"text": value}) for what, value in _NO_TEXT.items()),
    *(second(f"token_ids are {what}", {"token_ids": value}) for what, value in _NO_IDS.items()),
    *(
        second(f"{key} is {what}", {**_PAIRS, key: value})
        for key in _PAIRS
        for what, value in _NO_TEXT.items()
        if not isinstance(value, list)
    ),
    *(
        second(f"{key} has {what}", {"prompt": [1], "completion": [2], key: value})
        for key in _PAIRS
        for what, value in _NO_IDS.items()
        if key == "completion" or isinstance(value, list)
    ),
    second("ids before text", {"prompt": [1], "completion": "a"}),
    second("text before ids", {"prompt": "a", "completion": [1]}),
    second("nothing", {}),
    second("null", {"text": None}),
    second("a prompt alone", {"prompt": "a"}),
    second("a completion alone", {"completion": "a"}),
    second("a prompt, and no completion", {"prompt": "a", "completion": None}),
    second("text and ids", {"text": "a", "token_ids": [1]}),
    second("text and a completion", {"text": "a", "completion": "b"}),
    second("ids and a completion", {"token_ids": [1], "completion": "b"}),
    second("everything", {"text": "a", "token_ids": [1], **_PAIRS}),
    *(
        second(f"{wrong} in place of {right}", {**(_PAIRS if right in _PAIRS else {right: "a"}), wrong: "b"}, wrong)
        for wrong, right in {
            "texts": "text", "Text": "text", "completions": "completion", "Completion": "completion",
            "prompts": "prompt", "promt": "prompt",
        }.items()
    ),
    second("a misspelt name beside the text", {"text": "a", "token_idss": [1]}, "token_idss"),
    second("a field that nothing reads", {"text": "a", "meta": {"set": "Pile"}}, "meta", "said"),
    second("a setting of generation", {"text": "a", "temperature": 2}, "temperature", "said"),
    *(checked(f"id {value}", {"token_ids": [1, value]}, "line 2") for value in (-1, 10**6, 2**63, 2**64, -(10**30))),
    *(
        checked(f"{key} has the id {value}", {"prompt": [1], "completion": [1], key: [value]}, f"line 2: {key}[0]")
        for key in _PAIRS
        for value in (-1, 10**6)
    ),
    checked("a completion of no token", {"prompt": "a", "completion": ""}, "line 2"),
    checked("a completion of no id", {"prompt": [1], "completion": []}, "line 2: completion"),
    checked("no context and no prefix", {"prompt": "", "completion": "a"}, "line 2", prefix=None),
    checked("no context and no prefix, in ids", {"prompt": [], "completion": [1]}, "line 2", prefix=None),
    checked("nothing but the prefix", {"prompt": [], "completion": [0]}, "line 2"),
    checked("a lone surrogate", {"text": "a\ud800"}, "line 2: text: a lone"),
    checked("a lone surrogate in a prompt", {"prompt": "a\ud800", "completion": "b"}, "line 2: prompt: a lone"),
    checked("a lone surrogate in a completion", {"prompt": "a", "completion": "\ud800"}, "line 2: completion: a lone"),
    checked("its place", {"prompt": "abc", "completion": "\ud800"}, "at offset 0"),
    checked("no text at all", {"text": ""}, "no token to score", before=None),
    checked("no id at all", {"token_ids": []}, "no token to score", before=None),
    checked("one token each, and no prefix", {"token_ids": [1]}, "no token to score", prefix=None, before={"text": ""}),
]  # fmt: skip
