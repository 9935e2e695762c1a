"""Text from outside, decoded, and its lines: one reader for prompts, for texts to score and for training data."""

from __future__ import annotations

import os
from collections.abc import Callable

from gptj.errors import GPTJError, InputError

__all__ = ["decode_lines", "decode_text", "decode_whole"]

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}
"""How files begin that are taken for text by mistake."""


def decode_text(
    data: bytes,
    *,
    file: str | os.PathLike[str],
    where: Callable[[int], str | None] = lambda place: None,
    offset: int = 0,
    error: type[GPTJError] = InputError,
) -> str:
    """UTF-8 as text.

    Args:
        data: the bytes.
        file: which errors name.
        where: what they say of a byte's place, beside its offset.
        offset: where in the file they begin.
        error: the class to raise.

    Raises:
        error: it is not UTF-8; it names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        found = f"byte 0x{data[problem.start]:02x} at offset {offset + problem.start}"
        raise error("not UTF-8", file=file, where=where(problem.start), found=found) from None


def decode_whole(data: bytes, *, file: str | os.PathLike[str], error: type[GPTJError] = InputError) -> str:
    r"""A file's text without a byte order mark, its lines ended by "\n".

    Raises:
        error: it is packed, not UTF-8, or has a NUL; it names the byte.
    """

    def line_of(place: int) -> str:
        line = data.count(10, 0, place) + 1  # 10 is the line break
        return f"line {line}"

    packed = next((name for begin, name in _PACKED.items() if data.startswith(begin)), None)
    if packed is not None:
        raise error("no text", file=file, found=packed, hint="Unpack it first")
    if (place := data.find(0)) >= 0:
        hint = "Is it UTF-16? Save it as UTF-8"
        raise error("not UTF-8", file=file, where=line_of(place), found=f"NUL at offset {place}", hint=hint)
    return decode_text(data, file=file, where=line_of, error=error).removeprefix("\ufeff").replace("\r\n", "\n")


def decode_lines(
    data: bytes, *, file: str | os.PathLike[str], error: type[GPTJError] = InputError
) -> tuple[str, list[tuple[int, str]]]:
    """A file's text as `decode_whole` gives it, and its lines that are not blank, each with its number from 1."""
    text = decode_whole(data, file=file, error=error)
    numbered = enumerate(text.split("\n"), 1)
    return text, [(number, line.removesuffix("\r")) for number, line in numbered if line.strip()]
