"""Values in a few words: an array by its dtype and shape, a number by its value. Large objects show themselves so.

An output holds thousands of numbers; printed whole, they say less than "float32 (1, 3, 50400)".
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["brief", "brief_fields", "html_table"]

_LONGEST = 80


def brief(value: Any) -> str:
    """`value` in a few words. Nothing is computed, but for a single number that is not traced.

    >>> import numpy as np
    >>> brief(np.zeros((2, 3), np.float32)), brief(np.float32(0.5)), brief((np.zeros(3), np.zeros(3)))
    ('float32 (2, 3)', '0.5', '2 × float64 (3,)')
    """
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return _number(value) if len(shape) == 0 else f"{_dtype(value)} {_shape(shape)}"
    if isinstance(value, tuple | list):
        return _several(value)
    if isinstance(value, Mapping):
        return f"{len(value)} keys" if len(value) > 3 else _cut(repr(dict(value)))
    return _cut(repr(value))


def _dtype(array: Any) -> str:
    """Its name, without the framework's."""
    return str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")


def _shape(shape: Any) -> str:
    """A shape as Python writes one; an axis of an unknown length is None."""
    try:
        return repr(tuple(None if size is None else int(size) for size in shape))
    except (TypeError, ValueError):  # a traced axis, or TensorFlow's shape of unknown rank
        return str(shape)


def _number(value: Any) -> str:
    """A scalar's value, or its dtype where it has none yet (it is traced, or on no device)."""
    try:
        return f"{float(value):.6g}"
    except Exception:  # each framework has an error of its own for this
        return f"{_dtype(value)} ()"


def _several(values: Sequence[Any]) -> str:
    if not values:
        return "()"
    if len(values) > 3 or any(hasattr(value, "shape") or isinstance(value, tuple | list) for value in values):
        shown = [brief(value) for value in values]
        return f"{len(shown)} × {shown[0]}" if len({*shown}) == 1 else f"{len(shown)}: {shown[0]}, ..., {shown[-1]}"
    return _cut(repr(values))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def brief_fields(value: object, names: Iterable[str]) -> str:
    """The class's name with some attributes, each in a few words."""
    inside = ", ".join(f"{name}={brief(getattr(value, name))}" for name in names)
    return f"{type(value).__name__}({inside})"


def html_table(title: str, rows: Iterable[Sequence[str]], heading: Sequence[str]) -> str:
    """A table for a notebook; everything in it is escaped."""

    def row(cells: Sequence[str], kind: str) -> str:
        style = "text-align:left;white-space:nowrap"
        return "<tr>" + "".join(f'<{kind} style="{style}">{html.escape(c)}</{kind}>' for c in cells) + "</tr>"

    head = f"<thead>{row(heading, 'th')}</thead>" if heading else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><caption>{html.escape(title)}</caption>{head}<tbody>{body}</tbody></table>"
