"""Regular expressions of an adapter's config: those that cannot take longer than a name is worth.

An adapter_config.json is a file that strangers write, and Python's matcher goes back over a name for every way in
which it could have been cut: `(a+)+!` takes twice as long a letter. So a pattern is looked at before it is used: what
repeats may hold nothing that varies, and only a few parts may vary at all. PEFT's own and its examples are far below.
"""

from __future__ import annotations

import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from gptj.errors import ConfigError, LimitError, shown

__all__ = ["MOST_PATTERNS", "require_pattern"]

MOST_PATTERNS = 1000
"""Entries of rank_pattern or alpha_pattern: more than a model has matrices that may differ."""

_MOST_LENGTH = 10_000
_MOST_REPEATS = 4
_MOST_OPTIONAL = 6
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def require_pattern(pattern: str, field: str) -> None:
    """Refuse what is no regular expression, or one that may take ages.

    Raises:
        ConfigError: no regular expression.
        LimitError: it may take ages.
    """
    if len(pattern) > _MOST_LENGTH:
        raise LimitError(
            "a regular expression too long",
            where=field,
            expected=f"at most {_MOST_LENGTH:,} characters",
            found=len(pattern),
        )
    try:
        re.compile(pattern)
        long, optional, nested = _count(_parser.parse(pattern), within=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"not a regular expression: {error}", where=field, found=shown(pattern)) from None
    if nested or long > _MOST_REPEATS or optional > _MOST_OPTIONAL:
        raise LimitError(
            "a regular expression that may take ages to find no match",
            where=field,
            expected=f"at most {_MOST_REPEATS} repeats and {_MOST_OPTIONAL} optional parts, and none inside a repeat",
            found=shown(pattern),
            hint="Name the matrices in a list",
        )


def _count(part: Any, *, within: bool) -> tuple[int, int, int]:
    """How many repeats, optional parts, and choices or varying parts inside a repeat lie on the longest way through."""
    long = optional = nested = 0
    for operation, argument in part:
        ways: list[Any] = []
        inside = within
        if operation in _REPEATS:
            least, most, inner = argument
            if least != most:
                long, optional, nested = long + (most > 1), optional + (most == 1), nested + within
            ways, inside = [inner], within or most > 1
        elif operation is _constants.BRANCH:
            ways, nested = list(argument[1]), nested + within
        elif operation is _constants.SUBPATTERN:
            ways = [argument[-1]]
        elif operation in (_constants.ASSERT, _constants.ASSERT_NOT):
            ways = [argument[1]]
        elif operation is _constants.ATOMIC_GROUP:
            ways = [argument]
        elif operation is _constants.GROUPREF_EXISTS:
            ways = [way or () for way in argument[1:]]
        counts = [_count(way, within=inside) for way in ways] or [(0, 0, 0)]
        long, optional, nested = (n + max(count[i] for count in counts) for i, n in enumerate((long, optional, nested)))
    return long, optional, nested
