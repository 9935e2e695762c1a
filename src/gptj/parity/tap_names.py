"""Other programs' names of taps, mapped onto ours by a small TOML file.

    ignore = ["transformer.drop", "transformer.h.{block}.attn.attn_dropout"]

    [[tap]]
    from = "transformer.h.{block}.attn.q_proj"
    to = "h.{block}.q"
    axes = "b t (h d)"

`{block}` stands for a block's number; `axes`, which may be left out, says how the array is stored where that is not
the tap's own way (see `gptj.parity.layout`). What no line names and no tap is called is an error, and never skipped.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gptj.calls.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, Tap, split_tap
from gptj.errors import FormatError, InputError, did_you_mean, shown
from gptj.parity.layout import Layout
from gptj.paths.json_file import read_small_file
from gptj.reading.safetensors_file import LONGEST_NAME

__all__ = ["Rule", "TapNames", "find_tap", "shipped_names"]

_BLOCK = "{block}"
_SHIPPED = Path(__file__).parent / "names"


def shipped_names() -> tuple[str, ...]:
    """The names of the mappings that this package ships."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.toml")))


def find_tap(name: str) -> Tap | None:
    """The tap of this full name, None where it is none.

    >>> find_tap("h.3.q").axes, find_tap("h.3.embedding"), find_tap("q")
    ('bhtd', None, None)
    """
    if len(name) > LONGEST_NAME:  # Python makes no number of thousands of digits
        return None
    block, inner = split_tap(name)
    if block is not None and name != f"h.{block}.{inner}":  # h.03.q and h.3.q would be one
        return None
    among = IN_BLOCK if block is not None else (*BEFORE_BLOCKS, *AFTER_BLOCKS)
    return next((tap for tap in among if tap.name == inner), None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a mapping.

    Attributes:
        pattern: the other program's name, with `{block}` where a block's number stands.
        to: the tap's name, likewise; None where the array is left out.
        layout: how the array is stored; None is the tap's own way.
    """

    pattern: str
    to: str | None
    layout: Layout | None = None

    def apply(self, name: str) -> tuple[str | None] | None:
        """The tap of a name that this line means (None in a tuple: left out), or None where it means another."""
        before, block, after = self.pattern.partition(_BLOCK)
        found = re.fullmatch(f"{re.escape(before)}{'(0|[1-9][0-9]*)' if block else ''}{re.escape(after)}", name)
        if found is None:
            return None
        return (self.to.replace(_BLOCK, found[1]) if self.to is not None and block else self.to,)


@dataclasses.dataclass(frozen=True)
class TapNames:
    """A mapping; the empty one knows our names alone."""

    rules: tuple[Rule, ...] = ()
    file: str | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TapNames:
        """The mapping in the TOML file at `path`.

        Raises:
            MissingFileError, LimitError: see `gptj.paths.json_file.read_small_file`.
            FormatError: it is no TOML, or no mapping; the line's number says where.
        """
        data = read_small_file(path)

        def refuse(problem: str, **facts: Any) -> NoReturn:
            raise FormatError(problem, **{**facts, "file": path}) from None

        try:
            members = tomllib.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            refuse("not UTF-8")
        except tomllib.TOMLDecodeError as error:
            refuse(f"not TOML: {error}")
        except RecursionError:
            refuse("nested too deeply for TOML")
        except ValueError:  # of Python's own, at integers of more digits than it makes a number of
            refuse("a number too large for TOML")
        if unknown := members.keys() - {"tap", "ignore"}:
            refuse("unknown key", where=shown(min(unknown)), expected="[[tap]] and ignore")
        taps, ignored = members.get("tap", []), members.get("ignore", [])
        if not isinstance(taps, list) or not all(isinstance(entry, dict) for entry in taps):
            refuse("breaks its rule", where="tap", expected="tables, each under [[tap]]", found=shown(taps))
        if not isinstance(ignored, list) or not all(_is_pattern(pattern) for pattern in ignored):
            refuse("breaks its rule", where="ignore", expected="a list of names", found=shown(ignored))
        rules = [Rule(pattern, None) for pattern in ignored]
        for number, entry in enumerate(taps, 1):
            try:
                rules.append(_rule(entry))
            except InputError as error:
                refuse(error.problem, **error.facts(where=f"tap {number}: {error.where}"))
        patterns = [rule.pattern for rule in rules]
        if twice := next((pattern for pattern in patterns if patterns.count(pattern) > 1), None):
            refuse("mapped twice", where=shown(twice))
        return cls(tuple(rules), os.fspath(path))

    @classmethod
    def find(cls, *names: str | os.PathLike[str]) -> TapNames:
        """The mappings of these files, or of a shipped one's name, `transformers-pt`, as one.

        Raises:
            InputError: two of them mean different taps by one name.
            GPTJError: see `from_file`.
        """
        rules: dict[str, Rule] = {}
        for name in names:
            shipped = os.fspath(name) in shipped_names()
            if not shipped and not Path(name).suffix and not Path(name).exists():
                known = shipped_names()
                raise InputError("no such map", where="names", expected=f"a TOML file, or {', '.join(known)}",
                                 found=shown(name), hint=did_you_mean(os.fspath(name), list(known)))  # fmt: skip
            for rule in cls.from_file(_SHIPPED / f"{os.fspath(name)}.toml" if shipped else name).rules:
                if rules.setdefault(rule.pattern, rule) != rule:
                    raise InputError("mapped differently by two files", where=shown(rule.pattern), found=shown(name))
        return cls(tuple(rules.values()), ", ".join(os.fspath(name) for name in names))

    def resolve(self, name: str) -> tuple[str, Layout] | None:
        """The tap of a stored name and how it is stored, None where the mapping leaves it out.

        Raises:
            InputError: neither is it a tap nor does the mapping know it, or two lines mean it.
        """
        meant = [(rule, found[0]) for rule in self.rules if (found := rule.apply(name)) is not None]
        if len(meant) > 1:
            patterns = " and ".join(shown(rule.pattern) for rule, _ in meant[:2])
            raise InputError("two lines of the mapping mean it", where=shown(name), found=patterns)
        if meant:
            rule, to = meant[0]
            if to is None:
                return None
            tap = find_tap(to)
            assert tap is not None  # the pattern was checked with a number in it
            return to, rule.layout or Layout(tuple(tap.axes))
        tap = find_tap(name)
        if tap is None:
            inner = split_tap(name)[1]
            known = [one.name for one in (*BEFORE_BLOCKS, *IN_BLOCK, *AFTER_BLOCKS)]
            hint = did_you_mean(inner, known) or "Map it with a TOML file (docs/traces.md), or ignore it there"
            raise InputError("no tap's name", where=shown(name), hint=hint)
        return name, Layout(tuple(tap.axes))


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.count(_BLOCK) <= 1


def _rule(entry: Mapping[str, Any]) -> Rule:
    """The line that a table spells.

    Raises:
        InputError: naming the key.
    """
    if unknown := entry.keys() - {"from", "to", "axes"}:
        raise InputError("unknown key", where=shown(min(unknown)), expected="from, to and axes")
    for key in ("from", "to"):
        if key not in entry:
            raise InputError("is missing", where=key)
        if not _is_pattern(entry[key]):
            expected = f"a name, with {_BLOCK} at most once"
            raise InputError("breaks its rule", where=key, expected=expected, found=shown(entry[key]))
    pattern, to = entry["from"], entry["to"]
    if (_BLOCK in pattern) < (_BLOCK in to):
        raise InputError("lacks the block's number", where="from", expected=f"{_BLOCK} in it", found=shown(pattern))
    if _BLOCK in pattern and _BLOCK not in to:
        raise InputError("names the same tap for every block", where="to", expected=f"{_BLOCK} in it", found=shown(to))
    tap = find_tap(to.replace(_BLOCK, "0"))
    if tap is None:
        raise InputError("no tap's name", where="to", found=shown(to), hint="docs/traces.md has the names")
    return Rule(pattern, to, Layout.parse(entry["axes"], of=tap.axes) if "axes" in entry else None)
