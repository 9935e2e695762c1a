"""Prompts to be continued: from the command line, from a file, or from stdin, each with its own settings.

A file has a prompt a line. Where its first line begins with `{`, after a byte order mark or spaces, every line is a
JSON object instead: "prompt" or "token_ids", "seed" if it shall have one of its own, and any field of
`GenerationConfig`. Empty lines are skipped. All of a file is read and checked before a model is loaded, so that a
mistake in its last line costs no time.

A file of both kinds of line is refused, whichever comes first, and so is one that is a JSON array as a whole. Text that
looks like JSON and is no object is text, and said.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj.errors import GPTJError, InputError, LimitError, shown, warn_of
from gptj.generation.config import UNSUPPORTED, GenerationConfig
from gptj.paths.json_file import parse_json_object, read_small_file
from gptj.text.lines import decode_lines, decode_text, decode_whole

__all__ = ["STDIN", "OfMembers", "Prompt", "check_text", "check_token_ids", "read_lines", "read_prompt"]

STDIN = "-"
"""The name that stands for stdin."""

OfMembers = Callable[[dict[str, Any], str, int], "Prompt"]
"""From the members of a line's JSON object, the file's name and the line's number to the prompt."""

_FIELDS = frozenset(field.name for field in dataclasses.fields(GenerationConfig)) - {"extra"}

_LARGEST_FILE_BYTES = 1_000_000_000


def _as_json(what: str) -> str:
    """The sentence that says how a prompt, or a text to score, is written in a JSON line."""
    return f'A {what} as JSON is {{"{what}": "..."}}, and then every line is one'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what is to be continued; None where it came as token ids.
        token_ids: the same in token ids; None where it came as text.
        seed: its own seed, None for what the command line says.
        settings: fields of `GenerationConfig` that it changes.
        file, line: where it stands, None for the command line. Lines count from 1.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str | None = None
    line: int | None = None

    def add_place(self, error: GPTJError) -> GPTJError:
        """`error` with the line that it is about."""
        if self.line is None:
            return error
        where = f"line {self.line}" + (f": {error.where}" if error.where else "")
        return type(error)(error.problem, **error.facts(file=self.file, where=where))


def read_prompt(file: str) -> Prompt:
    """All of a file, or of stdin, as one prompt, as `decode_whole` gives it, without the line break at its end."""
    name, data = _read(file)
    return Prompt(decode_whole(data, file=name).removesuffix("\n"), file=name)


def read_lines(file: str, of_members: OfMembers | None = None) -> list[Prompt]:
    """The prompts in the lines of a file or of stdin.

    Args:
        file: its name.
        of_members: makes a prompt of a JSON object, where its members are others than those of a prompt to continue.

    Raises:
        InputError: it cannot be read, is not UTF-8, or has no prompt; or a line is not what its first line promises.
    """
    name, data = _read(file)
    text, filled = decode_lines(data, file=name)
    what = "prompt" if of_members is None else "text"
    if not filled:
        raise InputError(f"no {what}", file=name, expected=f"a {what} a line")
    if _beginning(filled[0][1]) == "{":
        return [_from_json(line, name, number, of_members or _of_members) for number, line in filled]
    _check_text(text, filled, name, _as_json(what))
    return [Prompt(line, file=name, line=number) for number, line in filled]


def _check_text(text: str, filled: list[tuple[int, str]], name: str, way: str) -> None:
    """Refuse text that was meant as JSON, and say what may have been.

    Raises:
        InputError: one of the lines is a JSON object, or all of them together are an array.
    """
    first, begins = filled[0][0], [_beginning(line) for _, line in filled]
    if begins[0] == "[" and isinstance(_json(text), list):
        hint = f"{way}: jq -c '.[]' makes lines of an array"
        raise InputError("a JSON array in place of lines", file=name, where=f"line {first}", hint=hint)
    braced = [one for one, begin in zip(filled, begins, strict=True) if begin == "{"]
    for number, line in braced:
        if isinstance(_json(line), dict):
            problem = f"a JSON object, and line {first} is text"
            raise InputError(problem, file=name, where=f"line {number}", found=shown(line), hint=way)
    if braced:
        number, line = braced[0]
        warn_of("begins with { and is read as text", file=name, where=f"line {number}", found=shown(line))
    if {*begins} <= {"[", '"'} and all(_json(line) is not None for _, line in filled):
        problem = "JSON that is no object, as every line is, is read as text"
        warn_of(problem, file=name, where=f"line {first}", found=shown(filled[0][1]), hint=way)


def _beginning(line: str) -> str:
    """The first character of a filled line, spaces and byte order marks aside."""
    return line.lstrip(" \t\r\n\v\f\ufeff")[:1]


def _json(text: str) -> Any:
    """The value that the text spells as JSON; None where it spells nothing or null."""
    try:
        return json.loads(text.strip().removeprefix("\ufeff"), parse_int=str)
    except (ValueError, RecursionError):
        return None


def read_turns() -> Iterator[str]:
    """Each line of stdin without its line break, as soon as it is there; one that ends in a backslash goes on."""
    turn = ""
    offset = 0
    for line in _stdin_lines():
        turn += decode_text(line, file="stdin", offset=offset).removesuffix("\n").removesuffix("\r")
        offset += len(line)
        if turn.endswith("\\"):
            turn = turn[:-1] + "\n"
            continue
        yield turn
        turn = ""
    if turn:
        yield turn


def _stdin_lines() -> Iterator[bytes]:
    """The lines of stdin, as they come.

    Raises:
        InputError: it cannot be read.
        LimitError: a line does not end.
    """
    stdin = _stdin()
    while True:
        try:
            line: bytes = stdin.readline(_LARGEST_FILE_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", where="stdin") from None
        if len(line) > _LARGEST_FILE_BYTES:
            raise LimitError("a line too large", where="stdin", expected=f"at most {_LARGEST_FILE_BYTES} bytes")
        if not line:
            return
        yield line


def _from_json(line: str, file: str, number: int, of_members: OfMembers) -> Prompt:
    where = f"line {number}"
    try:
        members = parse_json_object(line.encode(), file=file, where=where, error=InputError)
    except InputError as error:
        if _beginning(line) != "{":
            error.hint = "The first line begins with {, so that every line is a JSON object"
        raise
    return of_members(members, file, number)


def _of_members(members: dict[str, Any], file: str, number: int) -> Prompt:
    where, given = f"line {number}", dict(members)
    text, ids, seed = (members.pop(key, None) for key in ("prompt", "token_ids", "seed"))
    if (text is None) == (ids is None):
        problem = 'neither "prompt" nor "token_ids", or both'
        raise InputError(problem, file=file, where=where, found=shown(json.dumps(given)))
    unknown = [key for key in members if key not in _FIELDS and key not in UNSUPPORTED]
    if unknown:
        expected = "prompt, token_ids, seed or a field of GenerationConfig"
        raise InputError("no such field", file=file, where=where, expected=expected, found=shown(unknown[0]))
    return Prompt(
        check_text(text, file, f"{where}: prompt"),
        check_token_ids(ids, file, f"{where}: token_ids"),
        seed,
        members,
        file,
        number,
    )


def check_text(value: Any, file: str, where: str) -> str | None:
    """A member that is text, or None for one that is not there.

    Raises:
        InputError: it is something else.
    """
    if value is not None and not isinstance(value, str):
        raise InputError("not text", file=file, where=where, expected="a string", found=shown(value))
    return value


def check_token_ids(value: Any, file: str, where: str) -> tuple[int, ...] | None:
    """A member that is a list of token ids, or None for one that is not there.

    Raises:
        InputError: it is something else.
    """
    if value is None:
        return None
    if not (isinstance(value, list) and all(type(i) is int for i in value)):
        expected = "a list of whole numbers"
        raise InputError("not token ids", file=file, where=where, expected=expected, found=shown(value))
    return tuple(value)


def _read(file: str) -> tuple[str, bytes]:
    """The name of the source in errors, and its bytes."""
    if file == STDIN:
        return "stdin", _all_of_stdin()
    return file, read_small_file(Path(file), limit_bytes=_LARGEST_FILE_BYTES)


def _all_of_stdin() -> bytes:
    """The bytes of stdin.

    Raises:
        InputError: it cannot be read.
        LimitError: it does not end.
    """
    try:
        data: bytes = _stdin().read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:  # such as a folder
        raise InputError(f"cannot be read: {error.strerror or error}", where="stdin") from None
    if len(data) > _LARGEST_FILE_BYTES:
        raise LimitError("too large", where="stdin", expected=f"at most {_LARGEST_FILE_BYTES} bytes")
    return data


def _stdin() -> Any:
    """Stdin as bytes."""
    if sys.stdin is None:
        raise InputError("is closed", where="stdin", hint="Give a file in its place")
    return sys.stdin.buffer
