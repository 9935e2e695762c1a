"""Prompts from files and stdin: what a line means, and every mistake named with its place."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptj.command.prompts import Prompt, read_lines, read_prompt, read_turns
from gptj.errors import CheckpointWarning, InputError, LimitError, MissingFileError


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def file(folder: Path, data: bytes) -> str:
    path = folder / "prompts"
    path.write_bytes(data)
    return str(path)


def test_a_line_is_a_prompt_and_empty_ones_are_skipped(tmp_path: Path) -> None:
    found = read_lines(file(tmp_path, "One\r\n\n  two\n \nthree\u2028four".encode()))
    assert [(p.text, p.line) for p in found] == [("One", 1), ("  two", 3), ("three\u2028four", 5)]


def test_json_lines_have_a_prompt_or_ids_a_seed_and_settings(tmp_path: Path) -> None:
    lines = b'{"prompt": "a\\nb", "top_k": 3}\n\n{"token_ids": [1, 2], "seed": 7}\n'
    name = file(tmp_path, lines)
    assert read_lines(name) == [
        Prompt("a\nb", settings={"top_k": 3}, file=name, line=1),
        Prompt(None, (1, 2), 7, {}, name, 3),
    ]


def test_all_of_stdin_is_one_prompt_without_its_mark_and_its_last_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "\ufeffone\r\ntwo\n\n".encode())
    assert read_prompt("-") == Prompt("one\ntwo\n", file="stdin")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt"),
        (b"\n \n", "no prompt"),
        (b"one\ntwo \xff", r"not UTF-8 \(found byte 0xff at offset 8\)"),
        (b'{"prompt": "a"}\nplain', "line 2: not JSON"),
        (b'{"prompt": "a"}\n[1]', "line 2: not a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' stands twice"),
        (b'{"text": "a"}', 'line 1: neither "prompt" nor "token_ids", or both'),
        (b'{"prompt": "a", "token_ids": [1]}', 'line 1: neither "prompt" nor "token_ids", or both'),
        (b'{"prompt": 3}', r"line 1: prompt: not text .*found 3"),
        (b'{"token_ids": [1, 2.0]}', r"line 1: token_ids: not token ids .*found \[1, 2.0\]"),
        (b'{"token_ids": [true]}', r"line 1: token_ids: not token ids"),
    ],
)
def test_a_file_that_has_no_prompts_is_refused_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    name = file(tmp_path, data)
    with pytest.raises(InputError, match=message) as caught:
        read_lines(name)
    assert caught.value.file == name


@pytest.mark.parametrize(
    "lines",
    [
        ["[Verse 1]", "Once"],
        ["[1] a footnote", "[2] another"],
        ['"Stay," she said.', '"No."'],
        ["a { b", 'say {"prompt": "a"} to it', "}"],
        ["null", "true", "42"],
        ["\u2028a", "b\u0085c", "d\x0ce"],
        ["x" * 1_000_000],
        [chr(0x1F600) * 3, "\u200d", "a\ufeffb"],
    ],
)
def test_lawful_text_is_a_prompt_a_line_and_nothing_is_said(tmp_path: Path, lines: list[str]) -> None:
    assert [prompt.text for prompt in read_lines(file(tmp_path, "\n".join(lines).encode()))] == lines


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n\n", b" \t", b"\xef\xbb\xbf\r\n "])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \n"])
def test_lawful_json_lines_are_read_after_a_mark_spaces_and_empty_lines(tmp_path, before, end) -> None:
    data = before + end.join([b'{"prompt": "a"}', b'  {"prompt": "b\\u0000"} ', b""])
    assert [prompt.text for prompt in read_lines(file(tmp_path, data))] == ["a", "b\0"]


def test_text_that_looks_like_json_is_read_and_said_once(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match=r"line 2: begins with \{ and is read as text") as said:
        assert [p.text for p in read_lines(file(tmp_path, b"a\n{ b\n{ c"))] == ["a", "{ b", "{ c"]
    assert len(said) == 1


def test_json_lines_from_stdin_are_read_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, b'{"prompt": "a"}\n{"token_ids": [1], "seed": 2}')
    assert [(p.text, p.token_ids, p.seed, p.file, p.line) for p in read_lines("-")] == [
        ("a", None, None, "stdin", 1),
        (None, (1,), 2, "stdin", 2),
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match="nowhere: no such file"):
        read_lines(str(tmp_path / "nowhere"))
    monkeypatch.setattr("gptj.command.prompts._LARGEST_FILE_BYTES", 3)
    with pytest.raises(LimitError, match="too large"):
        read_lines(file(tmp_path, b"four"))


def test_closed_stdin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    for read in (lambda: read_prompt("-"), lambda: read_lines("-"), lambda: next(read_turns())):
        with pytest.raises(InputError, match="stdin: is closed"):
            read()


def test_a_turn_that_ends_in_a_backslash_goes_on_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one\\\ntwo\r\né\nlast\\".encode())
    assert list(read_turns()) == ["one\ntwo", "é", "last\n"]


def test_a_turn_that_is_not_utf_8_is_named_with_its_place_in_all_of_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, b"one\ntwo\xc3\n")
    turns = read_turns()
    assert next(turns) == "one"
    with pytest.raises(InputError, match=r"stdin: not UTF-8 \(found byte 0xc3 at offset 7\)"):
        next(turns)
