"""Files of prompts whose lines are not what they seem."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

from lawful import good_folder

from gptj.command.opened_model import OpenedModel, Request
from gptj.command.prompts import read_lines, read_prompt, read_turns
from malformed import Malformed

TITLE = "prompts"


def case(what: str, data: bytes, names: str, outcome: Literal["refused", "said"] = "refused") -> Malformed:
    return Malformed(
        what,
        lambda folder: (folder / "prompts").write_bytes(data),
        lambda folder: read_lines(str(folder / "prompts")),
        names,
        outcome,
    )


def typed(what: str, data: bytes, names: str, read: Callable[[], object] = lambda: read_lines("-")) -> Malformed:
    """A case whose bytes come from stdin."""

    def door(folder: Path) -> None:
        with mock.patch("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data))):
            read()

    return Malformed(f"stdin: {what}", lambda folder: None, door, names)


def checked(what: str, line: bytes, names: str) -> Malformed:
    """A case that is read, and refused as a prompt of a model."""

    def make(folder: Path) -> None:
        good_folder(folder / "model")
        (folder / "prompts").write_bytes(GOOD + line)

    def door(folder: Path) -> None:
        with mock.patch("gptj.command.opened_model.choose_backend", lambda name: "pt"):
            opened = OpenedModel(Request(directory=folder / "model"), needs_tokenizer=True)
        opened.jobs(read_lines(str(folder / "prompts")))

    return Malformed(what, make, door, names)


class Endless(io.RawIOBase):
    """A stdin that does not end."""

    def read(self, size: int = -1) -> bytes:
        """As many bytes as are asked for."""
        assert 0 <= size < 2_000_000_000, "all of what has no end was asked for"
        return b"a" * 1001

    def readline(self, size: int | None = -1) -> bytes:
        """The same."""
        return self.read(-1 if size is None else size)


def _endless(read: Callable[[], object]) -> Callable[[Path], None]:
    def door(folder: Path) -> None:
        limit = mock.patch("gptj.command.prompts._LARGEST_FILE_BYTES", 1000)
        with limit, mock.patch("sys.stdin", SimpleNamespace(buffer=Endless())):
            read()

    return door


def _array(value: list[object], indent: int | None) -> bytes:
    if value == [10**5000]:  # which Python does not print
        return b"[" + b"9" * 5000 + b"]"
    return json.dumps(value, indent=indent).encode()


GOOD = b'{"prompt": "a"}\n'

CASES = [
    *(
        case(f"the field {name}", f'{{"prompt": "a", "{name}": 1}}'.encode(), name)
        for name in ("self", "extra", "file", "line", "text", "changes", "max_new_token", "__class__")
    ),
    *(
        case(f"a prompt that is {value}", f'{{"prompt": {value}}}'.encode(), "prompt")
        for value in ("1", "1.5", "true", "[]", '["a"]', "{}", "null", "NaN")
    ),
    *(
        case(f"after a {start!r}, a prompt that is a number", start + b'{"prompt": 3}', "prompt")
        for start in (b"\xef\xbb\xbf", b" ", b"\t", b"\xef\xbb\xbf ", b"\xef\xbb\xbf\r\n")
    ),
    *(case(f"UTF-16, {kind}", GOOD.decode().encode(kind), "UTF-8") for kind in ("utf-16", "utf-16-le", "utf-16-be")),
    *(
        case(f"a second line {line!r}", GOOD + line, "line 2")
        for line in (b"[1]", b"3", b"text", b'"a"', b"{", b"null")
    ),
]
CASES = [one for one in CASES if "NaN" not in one.what] + [
    case("a prompt that is NaN", b'{"prompt": NaN}', "NaN"),
    case("5,000 digits", b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", "line 1"),
]

OBJECTS = (
    '{"prompt": "b"}', '{"token_ids": [1]}', '{"text": "b"}', "{}", ' {"prompt": "b"}', '\t{"prompt": "b", "seed": 1}',
    '\ufeff{"prompt": "b"}', '{"prompt": "b"}\r',
)  # fmt: skip
TEXTS = ("text", "# a comment", "// a comment", "[a", '"a"', "1", "null", "\ufeff\ufefftext", "id,prompt", "---")
ARRAYS = (
    [{"prompt": "a"}], [{"prompt": "a"}, {"prompt": "b"}], ["a", "b"], [1, 2, 3], [[1, 2], [3]], [], [None], [10**5000],
)  # fmt: skip
ODD_TEXT = (
    '{"prompt": "b"',
    '{"prompt": "b"},',
    "{'prompt': 'b'}",
    "{% if a %}",
    "{",
    '{"prompt": "a"}{"prompt": "b"}',
)

CASES += [
    *(case(f"{text!r}, then JSON", f"{text}\n\n{GOOD.decode()}".encode(), "line 3") for text in TEXTS),
    *(case(f"text, then {line!r}", f"text\n{line}".encode(), "line 2") for line in OBJECTS),
    *(
        case(
            f"a hundred lines of text, then {line!r}", f"{'text' + chr(10)}".encode() * 100 + line.encode(), "line 101"
        )
        for line in OBJECTS[:3]
    ),
    *(case(f"JSON, then {text!r}", GOOD + b"\n" + text.encode(), "line 3") for text in TEXTS),
    *(case(f"JSON, then {text!r}", GOOD + text.encode(), "line 2") for text in ODD_TEXT),
    *(case(f"text, then {text!r}", b"text\n" + text.encode(), "line 2", "said") for text in ODD_TEXT),
    *(
        case(
            f"the array {array!r:.60}" if array != [10**5000] else "the array of 5,000 digits",
            _array(array, indent),
            "JSON array",
        )
        for array in ARRAYS
        for indent in (None, 1)
    ),
    case("an array after a byte order mark", b"\xef\xbb\xbf\n [1]", "JSON array"),
    case("an object over several lines", b'{\n  "prompt": "a"\n}', "line 1"),
    case("lines that are JSON strings", b'"a"\n"b"\n', "line 1", "said"),
    case("lines that are JSON arrays", b'["a"]\n["b"]\n', "line 1", "said"),
    *(
        case(f"bytes {bad!r}", b"text\n" + bad, "not UTF-8")
        for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"a\0b", b"\xf5\x80\x80\x80")
    ),
    *(
        case(f"{kind} that begins outside ASCII", "\u201cfour\n".encode(kind), "UTF-8")
        for kind in ("utf-16-le", "utf-16-be", "utf-32", "utf-32-le")
    ),
    *(case(f"JSON, then bytes {bad!r}", GOOD + bad, "not UTF-8") for bad in (b"\xff", b"\xed\xa0\x80")),
    typed("nothing", b"", "stdin: no prompt"),
    typed("JSON after text", b"text\n" + GOOD, "stdin: line 2"),
    typed("text after JSON", GOOD + b"text", "stdin: line 2"),
    typed("an array", b"[1]", "stdin: line 1"),
    typed("Latin-1", b"caf\xe9", "stdin: line 1: not UTF-8"),
    typed("Latin-1, as one prompt", b"caf\xe9", "stdin: line 1: not UTF-8", lambda: read_prompt("-")),
    typed("a NUL, as one prompt", b"one\ntwo\0", "stdin: line 2: not UTF-8", lambda: read_prompt("-")),
    typed("Latin-1, as a turn", b"one\ncaf\xe9", "stdin: not UTF-8", lambda: [*read_turns()]),
    *(
        Malformed(f"stdin without an end: {what}", lambda folder: None, _endless(read), "stdin")
        for what, read in (
            ("lines", lambda: read_lines("-")),
            ("one prompt", lambda: read_prompt("-")),
            ("turns", lambda: [*read_turns()]),
        )
    ),
    checked("a lone surrogate in a prompt", b'{"prompt": "a\\ud800"}', "line 2"),
    checked("a lone surrogate in stop_strings", b'{"prompt": "a", "stop_strings": "\\ud800"}', "line 2: stop_strings"),
    checked("a line of 3,000,000 characters", b'{"prompt": "' + b"a" * 3_000_000 + b'"}', "line 2: prompt"),
    checked("a line of 3,000,000 words", b'{"prompt": "' + b"a " * 3_000_000 + b'"}', "line 2: prompt"),
    checked("an empty prompt", b'{"prompt": ""}', "line 2: prompt"),
    checked("no token ids", b'{"token_ids": []}', "line 2: prompt"),
    *(
        checked(f"the token id {i}", b'{"token_ids": [1, %s]}' % i.encode(), "line 2: input_ids[0][1]")
        for i in ("-1", "300", str(2**63), str(2**64), "1" + "0" * 40)
    ),
    *(
        checked(f"the seed {seed}", b'{"prompt": "a", "seed": %s}' % seed.encode(), "line 2: seed")
        for seed in ("-1", str(2**64), "1" + "0" * 40, "1.5", "true", '"1"', "[]")
    ),
]
