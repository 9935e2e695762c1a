"""Parts of both configs' rules: plain numbers, and a value spelt for a message.

A value may come from a Python caller: a NumPy scalar, an integer of 5,000 digits (which Python refuses to print, and
which no float can hold), a dict whose keys are tuples. None of them may turn a refusal into an error of Python's own.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from gptj.errors import shown

__all__ = ["is_number", "is_text", "is_whole", "plain", "spelt"]

_LONGEST_SHOWN = 200


def plain(value: Any) -> Any:
    """A NumPy scalar, or an array of no axes, as Python's own number; anything else as it came."""
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if single else value


def is_whole(value: object, lowest: int, highest: int) -> bool:
    """Whether `value` is an integer, and no bool, of that range."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def is_number(value: object) -> bool:
    """Whether `value` is a number that a float64 holds, and neither a bool nor infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_text(value: str) -> bool:
    """Whether it has characters, and no lone surrogate among them, which JSON can spell and UTF-8 cannot."""
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def spelt(value: object) -> str:
    """`value` as JSON, else as Python spells it, cut to what a line can hold."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        return shown(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"
