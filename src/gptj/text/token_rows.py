"""Rows of token ids made into one batch: pairs joined, rows cut and filled, lists or a framework's tensors.

Here is all of a tokenizer call but the encoding itself; it knows ids and lengths and no vocabulary. A framework
is imported where its tensors are asked for, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from gptj.errors import BackendError, InputError, install_line, shown
from gptj.text.tokenizer_data import Side

__all__ = [
    "SIDES", "BatchEncoding", "NamedText", "Offsets", "Row", "TensorKind", "Truncation", "as_tensors", "fill_row",
    "join_rows", "mask_rows", "one_of", "pad_rows", "padded_width", "tensors", "texts_and_pairs", "truncate",
    "truncate_pair", "truncate_rows", "whole_number",
]  # fmt: skip

SIDES = ("left", "right")
TensorKind = Literal["pt", "tf", "jax", "np"]
Truncation = Literal["longest_first", "only_first", "only_second"]
Offsets = list[tuple[int, int]]

_Item = TypeVar("_Item")


class BatchEncoding(dict[str, Any]):
    """The result of a tokenizer's call: a dict whose members are attributes too, to be passed as `model(**encoding)`.

    Members:
        input_ids: token ids: a list for one text, a list of lists for several, or the tensor asked for, (b, t).
        attention_mask: 1 for a text's tokens and 0 for padding, in the same form.
        offset_mapping: only with `return_offsets`: for each token (start, end) such that text[start:end] is what
            it spells, or, for a part of a character, the whole character. (0, 0) for padding. In a tensor (b, t, 2).
        sequence_ids: only with `return_offsets` and pairs: 0 for the first text, 1 for the second, -1 for padding.
    """

    is_fast: ClassVar[bool] = True

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        instead = f". Instead: {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}, only {', '.join(self)}{instead}")

    def __missing__(self, name: Any) -> Any:
        raise KeyError(f"no {name!r}, only {', '.join(map(str, self))}: a row is ['input_ids'][row]")

    @property
    def data(self) -> dict[str, Any]:
        """The members as a plain dict."""
        return dict(self)

    def convert_to_tensors(self, tensor_type: TensorKind | None = None) -> BatchEncoding:
        """The same with lists of one length as tensors: "pt", "tf", "jax" or "np"; None leaves them."""
        if tensor_type is None:
            return self
        _require_kind(tensor_type)
        return BatchEncoding(as_tensors({name: np.asarray(value) for name, value in self.items()}, tensor_type))

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """The same tensors on a PyTorch device.

        Raises:
            InputError: they are no PyTorch tensors.
        """
        for name, value in self.items():
            if not hasattr(value, "to"):
                hint = 'Pass return_tensors="pt"; arrays of the other frameworks are moved by the model'
                raise InputError("is on no device", where=f"{name}.to", found=type(value).__name__, hint=hint)
        return BatchEncoding({name: value.to(device, non_blocking=non_blocking) for name, value in self.items()})


_OFFSETS = "tokenizer.encode_with_offsets(text), or return_offsets=True"
_INSTEAD: dict[str, str] = {
    "tokens": "tokenizer.convert_ids_to_tokens(ids)",
    **dict.fromkeys(("encodings", "word_ids", "words", "char_to_token", "char_to_word", "token_to_chars"), _OFFSETS),
    **dict.fromkeys(("token_to_word", "word_to_tokens", "word_to_chars", "token_to_sequence"), _OFFSETS),
    "sequence_ids": "return_offsets=True, of pairs",
    "n_sequences": "1, or 2 of pairs",
}
"""Attributes of transformers' class that ask for more than the rows, and what to write."""


@dataclasses.dataclass
class Row:
    """One text or pair on its way into a batch: a token a position in each list.

    Attributes:
        ids: the token ids.
        offsets: each token's bounds in its text, or nothing where they were not asked for.
        sequences: 0 for the first text of a pair, 1 for the second; nothing for a single text.
        mask: 1 for tokens, 0 for padding; made by `fill_row`.
    """

    ids: list[int]
    offsets: Offsets
    sequences: list[int] = dataclasses.field(default_factory=list)
    mask: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class NamedText:
    """A text and how an error calls it: `text[3]`."""

    text: Any
    name: str


def texts_and_pairs(text: Any, text_pair: Any) -> tuple[list[NamedText], list[NamedText] | None]:
    """The first texts, and the second ones or None. That each is a text is for the encoder to check.

    Raises:
        InputError: something else than a text, a list of texts or a list of pairs, or too few second texts.
    """
    if isinstance(text, str):
        if text_pair is not None and not isinstance(text_pair, str):
            raise InputError("text is one text", where="text_pair", expected="str", found=type(text_pair).__name__)
        return [NamedText(text, "text")], None if text_pair is None else [NamedText(text_pair, "text_pair")]
    if not isinstance(text, list | tuple | np.ndarray):
        found = type(text).__name__
        raise InputError("not text", where="text", expected="str, or a list of str or of pairs", found=found)
    if any(isinstance(one, list | tuple) for one in text):
        for n, one in enumerate(text):
            if text_pair is not None or not isinstance(one, list | tuple) or len(one) != 2:
                found = shown(one, longest=80)
                raise InputError("not a pair of texts", where=f"text[{n}]", expected="two texts in each", found=found)
        return (
            [NamedText(first, f"text[{n}][0]") for n, (first, _) in enumerate(text)],
            [NamedText(second, f"text[{n}][1]") for n, (_, second) in enumerate(text)],
        )
    firsts = [NamedText(one, f"text[{n}]") for n, one in enumerate(text)]
    if text_pair is None:
        return firsts, None
    if not isinstance(text_pair, list | tuple | np.ndarray) or len(text_pair) != len(firsts):
        found = str(len(text_pair)) if isinstance(text_pair, list | tuple | np.ndarray) else type(text_pair).__name__
        raise InputError("not one for each text", where="text_pair", expected=f"{len(firsts)} texts", found=found)
    return firsts, [NamedText(one, f"text_pair[{n}]") for n, one in enumerate(text_pair)]


def truncate(row: Row, limit: int, side: Side) -> None:
    """The row keeps at most `limit` tokens: the last ones where `side` is left."""
    over = len(row.ids) - limit
    if over > 0:
        kept = slice(over, None) if side == "left" else slice(None, limit)
        row.ids, row.offsets = row.ids[kept], row.offsets[kept]


def truncate_pair(row: Row, other: Row, limit: int, side: Side, truncation: bool | Truncation, *, where: str) -> None:
    """The two rows keep at most `limit` tokens together, cut as `truncation` says.

    Raises:
        InputError: the one text that may be cut is shorter than what has to go.
    """
    first, second = len(row.ids), len(other.ids)
    over = first + second - limit
    if over <= 0:
        return
    if truncation == "only_first":
        first -= over
    elif truncation == "only_second":
        second -= over
    else:
        # What taking a token at a time from the longer one comes to: 7 and 3 into 6 is 3 and 3.
        short, long = min(first, second), max(first, second)
        long = max(short, limit - short)
        if short + long > limit:
            short, long = limit // 2, limit - limit // 2
        first, second = (short, long) if first <= second else (long, short)
    if first < 0 or second < 0:
        cut = "first" if truncation == "only_first" else "second"
        raise InputError(f"the {cut} text is too short to lose {over} tokens", where=where, hint="Pass truncation=True")
    truncate(row, first, side)
    truncate(other, second, side)


def truncate_rows(
    rows: list[Row], others: list[Row] | None, *, limit: int | None, how: bool | Truncation, side: Side
) -> None:
    """Cut each row, or each row and its other together, to at most `limit` tokens.

    Raises:
        InputError: no such side, no second text to cut, or a pair of which no text can be cut far enough.
    """
    assert limit is not None  # whoever truncates has seen to it
    one_of(side, SIDES, where="truncation_side")
    if others is None:
        if how == "only_second":
            raise InputError("there is no second text to cut", where="truncation", found=how)
        for row in rows:
            truncate(row, limit, side)
        return
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        truncate_pair(row, other, limit, side, how, where=f"pair {number}")


def join_rows(row: Row, other: Row) -> None:
    """The second text's tokens follow the first's in `row`."""
    row.sequences = [0] * len(row.ids) + [1] * len(other.ids)
    row.ids = row.ids + other.ids
    row.offsets = row.offsets + other.offsets


def padded_width(rows: list[Row], *, limit: int | None, multiple: int | None) -> int:
    """The length of every row: the longest one, or `limit`, rounded up to a multiple of `multiple`.

    Raises:
        InputError: a row is longer than the limit.
    """
    longest = max(range(len(rows)), key=lambda n: len(rows[n].ids), default=None)
    width = 0 if longest is None else len(rows[longest].ids)
    if limit is not None:
        if width > limit:
            raise InputError(
                "longer than max_length",
                where=f"text {longest}",
                expected=f"at most {limit} tokens",
                found=width,
                hint="Pass truncation=True",
            )
        width = limit
    if multiple is not None:
        multiple = whole_number(multiple, where="pad_to_multiple_of", least=1)
        width = -(-width // multiple) * multiple
    return width


def pad_rows(rows: list[Row], *, limit: int | None, multiple: int | None, pad_id: int | None, side: Side) -> None:
    """Fill each row, and its mask, to the width of the longest one or to `limit`, rounded up to a `multiple`.

    Raises:
        InputError: there is no token to pad with, no such side, or a row that is longer than the width.
    """
    if pad_id is None:
        hint = "Set tokenizer.pad_token to a token of the vocabulary"
        raise InputError("no token to pad with", where="padding", hint=hint)
    one_of(side, SIDES, where="padding_side")
    width = padded_width(rows, limit=limit, multiple=multiple)
    for row in rows:
        fill_row(row, width, pad=pad_id, side=side)


def mask_rows(rows: list[Row], **options: object) -> None:
    """Give each row a mask without padding, and refuse the options that only padding reads.

    Raises:
        InputError: one of `options` is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise InputError("has no effect without padding", where=name, hint="Pass padding=True")
    for row in rows:
        row.mask = [1] * len(row.ids)


def fill_row(row: Row, width: int, *, pad: int, side: Side) -> None:
    """The row has `width` tokens, of which the new ones are `pad` and not in the mask."""
    missing = width - len(row.ids)
    row.mask = _fill([1] * len(row.ids), 0, missing, side)
    row.ids = _fill(row.ids, pad, missing, side)
    row.offsets = _fill(row.offsets, (0, 0), missing, side)
    row.sequences = _fill(row.sequences, -1, missing, side)


def _fill(items: list[_Item], filling: _Item, missing: int, side: Side) -> list[_Item]:
    return [filling] * missing + items if side == "left" else items + [filling] * missing


def one_of(value: _Item, allowed: tuple[object, ...], *, where: str) -> _Item:
    """`value`, if it is one of the allowed ones."""
    if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
        raise InputError("no such choice", where=where, expected=" or ".join(map(repr, allowed)), found=shown(value))
    return value


def whole_number(value: Any, *, where: str, least: int) -> int:
    """`value` as an int of at least `least`; a bool or a float is refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(
            "not such a number", where=where, expected=f"a whole number of at least {least}", found=shown(value)
        )
    return number


def tensors(members: dict[str, list[Any]], kind: str) -> dict[str, Any]:
    """The members as tensors (b, t) of one framework."""
    _require_kind(kind)
    rows = members["input_ids"]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        if not rows:
            raise InputError("no texts", where="text", expected="at least one, for a tensor")
        raise InputError(
            "rows of different lengths",
            where="return_tensors",
            found=f"{min(lengths)} to {max(lengths)} tokens",
            hint="Pass padding=True",
        )
    shapes = {"offset_mapping": (len(rows), -1, 2), "length": (len(rows),)}
    arrays = {
        name: np.asarray(value, dtype=np.int64).reshape(shapes.get(name, (len(rows), -1)))
        for name, value in members.items()
    }
    return as_tensors(arrays, kind)


_MODULES = {"pt": "torch", "tf": "tensorflow", "jax": "jax.numpy", "np": "numpy"}


def _require_kind(kind: str) -> None:
    if kind not in _MODULES:
        raise InputError(
            "no such tensors", where="return_tensors", expected="one of " + ", ".join(_MODULES), found=shown(kind)
        )


def as_tensors(arrays: dict[str, Any], kind: str) -> dict[str, Any]:
    """NumPy arrays as one framework's, which is imported here and nowhere else; whole numbers int32 but in PyTorch."""
    _require_kind(kind)
    try:
        framework = importlib.import_module(_MODULES[kind])
    except ImportError as problem:
        raise BackendError(
            f"{_MODULES[kind].partition('.')[0]} cannot be imported: {problem}",
            where=f'return_tensors="{kind}"',
            hint=f'{install_line("flax" if kind == "jax" else kind)}, or return_tensors="np"',
        ) from None
    tensors: dict[str, Any] = {}
    for name, array in arrays.items():
        narrow = array.astype(np.int32) if array.dtype.kind == "i" else array
        if kind == "pt":
            tensors[name] = framework.from_numpy(array)
        elif kind == "tf":
            tensors[name] = framework.constant(narrow)
        elif kind == "jax":
            tensors[name] = framework.asarray(narrow)
        else:
            tensors[name] = array
    return tensors
