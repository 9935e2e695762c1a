"""The records of manifest.json and of a resume journal, and how strictly they are read back from JSON.

Both are files like any other, which somebody may have edited: a member that is missing, unknown, of another kind or
out of range is refused with its place, and nothing is cast.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from gptj.errors import FormatError, shown
from gptj.reading.safetensors_file import MOST_DIMENSIONS, WEIGHT_DTYPES
from gptj.reading.tally import CastRecord, ValueRecord

__all__ = [
    "FileRecord",
    "Fingerprint",
    "Origin",
    "TensorRecord",
    "file_record",
    "fingerprint",
    "hash_of",
    "records_of",
    "require_file_name",
    "tensor_record",
    "text_of",
]

_T = TypeVar("_T")
_SHA256 = re.compile("[0-9a-f]{64}")
_LARGEST_COUNT = 2**62


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file's size, and the hash of its first `hashed_bytes`.

    That is all of it, but for a safetensors file's header: each tensor behind it lies there as its own hash has it,
    and to hash 12 GB a second time would take as long as writing them.
    """

    nbytes: int
    sha256: str
    hashed_bytes: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of a tensor: the source's files, by their path in it, and how the tensor was made of them."""

    files: tuple[str, ...]
    rule: str


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor as it is stored.

    Attributes:
        files: those that hold it, by their path in the directory; several where a format cuts tensors.
        dtype, shape: what it is.
        sha256: of its canonical bytes.
        values: its extremes, and its elements that are not finite.
        cast: what a narrowing cast did; None where nothing was narrowed.
        origin: where it came from; None where the writer was not told.
    """

    files: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    values: ValueRecord
    cast: CastRecord | None = None
    origin: Origin | None = None


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A few numbers of the reference's forward pass, by which a config or matrix that fits but is wrong is seen.

    Attributes:
        token_ids: the prompt.
        output: "logits", or "hidden_state" for a model without a language-model head; of the last position.
        places: which of its elements were kept.
        values: those elements.
        norm: the square root of the sum of the squares of all elements.
    """

    token_ids: tuple[int, ...]
    output: str
    places: tuple[int, ...]
    values: tuple[float, ...]
    norm: float


# ---- read back


def records_of(value: Any, where: str, read: Callable[[Any, str], _T]) -> dict[str, _T]:
    """An object whose members are records, read by `read`, by their names.

    Raises:
        FormatError: it is no object, or a record breaks its rule.
    """
    if not isinstance(value, dict):
        _refuse(where, "an object", value)
    return {name: read(record, f"{where}[{shown(name)}]") for name, record in value.items()}


def file_record(value: Any, where: str) -> FileRecord:
    """The record of a file.

    Raises:
        FormatError: it breaks its rule.
    """
    members = _members(value, where, ("nbytes", "sha256", "hashed_bytes"))
    nbytes, hashed = (_count(members[key], f"{where}.{key}") for key in ("nbytes", "hashed_bytes"))
    if hashed > nbytes:
        _refuse(f"{where}.hashed_bytes", f"at most its {nbytes} bytes", hashed)
    return FileRecord(nbytes, hash_of(members["sha256"], f"{where}.sha256"), hashed)


def tensor_record(value: Any, where: str) -> TensorRecord:
    """The record of a tensor.

    Raises:
        FormatError: it breaks its rule.
    """
    members = _members(value, where, ("files", "dtype", "shape", "sha256", "values"), ("cast", "origin"))
    files = _list(members["files"], f"{where}.files", text_of)
    if len(set(files)) != len(files):
        _refuse(f"{where}.files", "each file once", files)
    shape = _list(members["shape"], f"{where}.shape", _count)
    if len(shape) > MOST_DIMENSIONS:
        _refuse(f"{where}.shape", f"at most {MOST_DIMENSIONS} axes", shape)
    cast, origin = members.get("cast"), members.get("origin")
    return TensorRecord(
        files,
        _dtype(members["dtype"], f"{where}.dtype"),
        shape,
        hash_of(members["sha256"], f"{where}.sha256"),
        _value_record(members["values"], f"{where}.values"),
        None if cast is None else _cast_record(cast, f"{where}.cast"),
        None if origin is None else _origin(origin, f"{where}.origin"),
    )


def fingerprint(value: Any, where: str) -> Fingerprint:
    """The fingerprint.

    Raises:
        FormatError: it breaks its rule.
    """
    members = _members(value, where, ("token_ids", "output", "places", "values", "norm"))
    if members["output"] not in ("logits", "hidden_state"):
        _refuse(f"{where}.output", "logits or hidden_state", members["output"])
    places = _list(members["places"], f"{where}.places", _count)
    values = _list(members["values"], f"{where}.values", _number)
    if len(places) != len(values) or not places or [*places] != sorted(set(places)):
        _refuse(f"{where}.places", f"{len(values) or 'some'} rising places, one a value", places)
    norm = _number(members["norm"], f"{where}.norm")
    if norm < 0:
        _refuse(f"{where}.norm", "0 or above", norm)
    token_ids = _list(members["token_ids"], f"{where}.token_ids", _count)
    return Fingerprint(token_ids, members["output"], places, values, norm)


def hash_of(value: Any, where: str) -> str:
    """A sha256 in hexadecimal digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        _refuse(where, "a sha256 of 64 hexadecimal digits", value)
    return value


def text_of(value: Any, where: str) -> str:
    """Text."""
    if not isinstance(value, str):
        _refuse(where, "text", value)
    return value


def require_file_name(name: str, where: str, *, folders: bool) -> None:
    """Make sure that a name is a plain file's in the directory; with `folders` also of a file in a folder of it."""
    parts = name.split("/")
    plain = name.isprintable() and not set(name) & set("\\:") and set(parts).isdisjoint(("", ".", ".."))
    if not plain or (len(parts) > 1 and not folders):
        raise FormatError("not a plain file name", where=where, found=shown(name))


def _value_record(value: Any, where: str) -> ValueRecord:
    members = _members(value, where, ("minimum", "maximum", "nan", "inf"))
    ends = [members[key] for key in ("minimum", "maximum")]
    lowest, highest = (None if end is None else _number(end, f"{where}.{key}")
                       for end, key in zip(ends, ("minimum", "maximum"), strict=True))  # fmt: skip
    if (lowest is None) != (highest is None) or (lowest is not None and highest is not None and lowest > highest):
        _refuse(f"{where}.minimum", f"at most the maximum, {shown(highest)}", lowest)
    return ValueRecord(lowest, highest, *(_count(members[key], f"{where}.{key}") for key in ("nan", "inf")))


def _cast_record(value: Any, where: str) -> CastRecord:
    members = _members(value, where, ("source_dtype", "overflowed", "underflowed", "largest_relative_rounding"))
    rounding = _number(members["largest_relative_rounding"], f"{where}.largest_relative_rounding")
    if rounding < 0:
        _refuse(f"{where}.largest_relative_rounding", "0 or above", rounding)
    over, under = (_count(members[key], f"{where}.{key}") for key in ("overflowed", "underflowed"))
    return CastRecord(_dtype(members["source_dtype"], f"{where}.source_dtype"), over, under, rounding)


def _origin(value: Any, where: str) -> Origin:
    members = _members(value, where, ("files", "rule"))
    return Origin(_list(members["files"], f"{where}.files", text_of), text_of(members["rule"], f"{where}.rule"))


def _members(value: Any, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """An object that has these members and no others."""
    if not isinstance(value, dict):
        _refuse(where, f"an object of {', '.join(keys)}", value)
    if odd := [key for key in keys if key not in value] or sorted(value.keys() - {*keys, *optional}):
        problem = "no such member is known" if odd[0] in value else "a member is missing"
        raise FormatError(problem, where=f"{where}.{odd[0]}" if odd[0].isprintable() else where, found=shown(odd[0]))
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
        _refuse(where, "a whole number, 0 or above", value)
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or abs(value) > sys.float_info.max:
        _refuse(where, "a number", value)
    return float(value)


def _dtype(value: Any, where: str) -> str:
    if value not in WEIGHT_DTYPES or not isinstance(value, str):
        _refuse(where, f"one of {', '.join(WEIGHT_DTYPES)}", value)
    return value


def _list(value: Any, where: str, read: Callable[[Any, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        _refuse(where, "a list", value)
    return tuple(read(item, f"{where}[{number}]") for number, item in enumerate(value))


def _refuse(where: str, expected: str, found: object) -> NoReturn:
    raise FormatError("breaks its rule", where=where, expected=expected, found=shown(found))
