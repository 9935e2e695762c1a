"""What is to be continued: prompts from the command line, from a file, or from stdin, each with its own settings.

A file has a prompt a line. Where its first line begins with `{`, after a byte order mark or spaces, every line is a
JSON object instead: "prompt" or "token_ids", "seed" if it shall have one of its own, and any field of
`GenerationConfig`. Empty lines are skipped. All of a file is read and checked before a model is loaded, so that a
mistake in its last line costs no time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj.errors import GPTJError, InputError, shown
from gptj.generation.config import UNSUPPORTED, GenerationConfig
from gptj.json_file import parse_json_object, read_small_file

__all__ = ["STDIN", "Prompt", "read_lines", "read_prompt"]

STDIN = "-"
"""The name that stands for stdin."""

_FIELDS = frozenset(field.name for field in dataclasses.fields(GenerationConfig)) - {"extra"}

_LARGEST_FILE_BYTES = 1_000_000_000


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

    def named(self, error: GPTJError) -> GPTJError:
        """`error` with the line that it is about."""
        if self.line is None:
            return error
        where = f"line {self.line}" + (f": {error.where}" if error.where else "")
        return type(error)(
            error.problem, file=self.file, where=where, expected=error.expected, found=error.found, hint=error.hint
        )


def read_prompt(file: str) -> Prompt:
    """All of a file, or of stdin, as one prompt, without the line break at its end."""
    name, data = _read(file)
    return Prompt(_decoded(data, name).removesuffix("\n").removesuffix("\r"))


def read_lines(file: str) -> list[Prompt]:
    """The prompts in the lines of a file or of stdin.

    Raises:
        InputError: it cannot be read, is not UTF-8, or has no prompt; or a line is not what its first line promises.
    """
    name, data = _read(file)
    if b"\0" in data[:2]:
        raise InputError(
            "not UTF-8", file=name, found="NUL among its first bytes", hint="Is it UTF-16? Save it as UTF-8"
        )
    text = _decoded(data, name).removeprefix("\ufeff")  # the mark of an encoding, and no text
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    filled = [(number, line) for number, line in lines if line.strip()]
    if not filled:
        raise InputError("no prompt", file=name, expected="a prompt a line")
    if filled[0][1].lstrip().startswith("{"):
        return [_from_json(line, name, number) for number, line in filled]
    return [Prompt(line, file=name, line=number) for number, line in filled]


def read_turns() -> Iterator[str]:
    """Each line of stdin without its line break, as soon as it is there; one that ends in a backslash goes on."""
    turn = ""
    offset = 0
    for line in _stdin():
        turn += _decoded(line, "stdin", offset).removesuffix("\n").removesuffix("\r")
        offset += len(line)
        if turn.endswith("\\"):
            turn = turn[:-1] + "\n"
            continue
        yield turn
        turn = ""
    if turn:
        yield turn


def _from_json(line: str, file: str, number: int) -> Prompt:
    where = f"line {number}"
    members = parse_json_object(line.encode(), file=file, where=where, error=InputError)
    text, ids, seed = (members.pop(key, None) for key in ("prompt", "token_ids", "seed"))
    if (text is None) == (ids is None):
        raise InputError('neither "prompt" nor "token_ids", or both', file=file, where=where, found=shown(line))
    unknown = [key for key in members if key not in _FIELDS and key not in UNSUPPORTED]
    if unknown:
        expected = "prompt, token_ids, seed or a field of GenerationConfig"
        raise InputError("no such field", file=file, where=where, expected=expected, found=shown(unknown[0]))
    if text is not None and not isinstance(text, str):
        raise InputError("not text", file=file, where=f"{where}: prompt", expected="a string", found=shown(text))
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        expected = "a list of whole numbers"
        raise InputError("not token ids", file=file, where=f"{where}: token_ids", expected=expected, found=shown(ids))
    return Prompt(text, None if ids is None else tuple(ids), seed, members, file, number)


def _read(file: str) -> tuple[str, bytes]:
    """What errors call the source, and its bytes."""
    if file == STDIN:
        return "stdin", _stdin().read()
    return file, read_small_file(Path(file), limit_bytes=_LARGEST_FILE_BYTES)


def _stdin() -> Any:
    """Stdin as bytes."""
    if sys.stdin is None:
        raise InputError("is closed", where="stdin", hint="Give the prompt as an argument, or with --prompts FILE")
    return sys.stdin.buffer


def _decoded(data: bytes, name: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        found = f"byte 0x{data[error.start]:02x} at offset {place}"
        raise InputError("not UTF-8", file=name, found=found) from None
