"""JSON read strictly: what a lenient parser would repair in silence is an error here.

Config files, weight indexes, safetensors headers and manifests all pass through `parse_json_object`, so one
rule holds for all: UTF-8 (a BOM is accepted), an object at the top, no key twice in one object, no NaN or
Infinity, no integer that a float64 cannot hold, and a cap on the bytes before anything is parsed.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from gptj.errors import FormatError, GPTJError, LimitError, MissingFileError, shown
from gptj.paths import kind_of_path, safe_path

__all__ = ["encoding_hint", "parse_json_object", "read_files_of", "read_json_object", "read_small_file"]

SMALL_FILE_BYTES = 1_000_000
"""The cap for config-like files: transformers' own largest config.json is under 10 kB."""

MOST_DIGITS = 300
"""Of an integer in JSON: float64 holds 308, and Python converts none of more than 4,300."""


def read_small_file(path: str | os.PathLike[str], *, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit_bytes`.

    The file's kind is looked at before it is opened, since opening a FIFO waits for ever.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is a folder, FIFO, socket or device, or cannot be read.
        LimitError: it is larger than the cap.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MissingFileError("no such file", file=path) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be looked at: {getattr(error, 'strerror', None) or error}", file=path) from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(
            "not a regular file", file=path, expected="a regular file", found=kind_of_path(status.st_mode)
        )
    if status.st_size > limit_bytes:
        raise LimitError(
            "too large", file=path, expected=f"at most {limit_bytes} bytes", found=f"{status.st_size} bytes"
        )
    try:
        with path.open("rb") as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from None
    if len(data) > limit_bytes:
        raise LimitError("grew while it was read", file=path, expected=f"at most {limit_bytes} bytes")
    return data


def read_files_of(directory: Path, names: Iterable[str], *, limit_bytes: int) -> dict[str, bytes]:
    """The bytes of those of the files that a folder has, by name, to be carried into another folder as they are.

    Raises:
        FormatError: one is no regular file, or cannot be read.
        UnsafeFileError: one is a link out of the folder, which may lead to anything that this user may read.
        LimitError: one is larger than the cap.
    """
    there = [name for name in names if os.path.lexists(directory / name)]
    return {name: read_small_file(safe_path(directory, name), limit_bytes=limit_bytes) for name in there}


def encoding_hint(data: bytes) -> str | None:
    """A hint for bytes that are no text in UTF-8, where their beginning tells what they are; else None."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2] != b"\0\0":
        return "It looks like UTF-16: save it as UTF-8"
    return None if data.strip() else "It is empty"


def read_json_object(
    path: str | os.PathLike[str], *, limit_bytes: int = SMALL_FILE_BYTES, error: type[GPTJError] = FormatError
) -> dict[str, Any]:
    """The JSON object in the file at `path`; see `parse_json_object` for the rules and errors."""
    return parse_json_object(read_small_file(path, limit_bytes=limit_bytes), file=path, error=error)


def parse_json_object(
    data: bytes, *, file: str | os.PathLike[str], where: str | None = None, error: type[GPTJError] = FormatError
) -> dict[str, Any]:
    """The JSON object that `data` spells.

    Args:
        data: the bytes, UTF-8 with or without a BOM.
        file, where: what the error message names.
        error: the class to raise.

    Raises:
        error: not UTF-8, not JSON, a key twice, a NaN or Infinity, or something else than an object at the top.
    """

    def refuse(problem: str, **facts: Any) -> NoReturn:
        raise error(problem, file=file, where=where, **facts) from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"the key {shown(twice)} stands twice in one object")
        return members

    def finite(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            refuse("a number too large", found=shown(literal))
        return value

    def whole(literal: str) -> int:
        digits = len(literal.lstrip("-"))
        if digits > MOST_DIGITS:
            refuse(f"a number too large: an integer of {digits:,} digits", found=shown(literal, longest=20))
        return int(literal)

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not JSON", hint="Write a finite number or null")

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        found = f"byte 0x{data[problem.start]:02x} at offset {problem.start}"
        refuse("not UTF-8", found=found, hint=encoding_hint(data))
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=finite, parse_int=whole)
    except GPTJError:
        raise
    except json.JSONDecodeError as problem:
        place = f"at line {problem.lineno}, column {problem.colno}"
        refuse(f"not JSON: {problem.msg} {place}", hint=encoding_hint(data))
    except RecursionError:
        refuse("nested too deeply for JSON")
    if not isinstance(value, dict):
        refuse("not a JSON object", expected="{...} at the top", found=type(value).__name__)
    return value
