"""Findings of a comparison that break their schema, contradict themselves, or are no document at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptj.parity.findings import Findings, findings_schema
from malformed import Malformed

TITLE = "findings of a comparison"

NAME = "found.json"
SCHEMA = findings_schema()
Place = tuple[str | int, ...]


def document() -> dict[str, Any]:
    """One of everything."""
    tap = {"tap": "h.0.q", "difference": 0.5, "bound": 1.0, "born": False, "local": 0.1, "local_bound": 0.2,
           "where": "row 0", "holds": True}  # fmt: skip
    return {
        "findings": 1, "verdict": "holds", "headline": "all agree", "folder": "model", "config": {"n_layer": 1},
        "versions": {"pt": {"torch": "2.13.0"}}, "notes": ["checked"],
        "measures": [{"backend": "pt", "against": "oracle", "what": "logits", "difference": 0.5, "limit": 1.0,
                      "where": "row 0", "holds": True}],
        "pairs": [{"a": "oracle", "b": "pt", "dtype": "float32", "headline": "pt agrees", "looks_like": "nothing",
                   "taps": [tap]}],
        "texts": [{"a": "pt", "b": "tf", "prompt": 0, "tokens": 8, "first_difference": 3, "margin_a": 0.1,
                   "margin_b": 0.2, "bound": 0.3, "tie": True, "errors": [0.1]}],
        "matrix": [{"backend": "pt", "row": "cached against whole", "what": "logits", "difference": 0.1, "limit": 1.0,
                    "holds": True, "where": "row 0"}],
        "ladder": [{"backend": "pt", "rung": "float16", "error": 0.1, "kl": 0.1, "top1": 1.0, "greedy": 1.0,
                    "prompts": 8}],
        "sensitivity": [{"backend": "pt", "mutant": "rotary sign", "caught": True, "headline": "pt differs",
                         "expected": "q_rotated"}],
        "smallest": [{"backend": "pt", "dtype": "float32", "what": "one weight", "change": 0.1, "tap": "h.0.q",
                      "of": "q_proj"}],
    }  # fmt: skip


def changed(place: Place, value: Any) -> Callable[[Path], None]:
    """Makes a document in which one member is another value, or is missing where the value is `...`."""

    def make(folder: Path) -> None:
        whole = document()
        at: Any = whole
        for step in place[:-1]:
            at = at[step]
        if value is ...:
            del at[place[-1]]
        else:
            at[place[-1]] = value
        (folder / NAME).write_text(json.dumps(whole))

    return make


def door(folder: Path) -> object:
    return Findings.from_file(folder / NAME)


def spell(place: Place) -> str:
    """The place as an error names it."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")


def members(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every member of a document with its place; what is free within it is one."""
    for key, member in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*place, key), member
        if isinstance(member, dict | list) and (*place, key) != ("config",):
            yield from members(member, (*place, key))


def wrong_kinds(value: Any) -> tuple[Any, ...]:
    """Values of other kinds than a member's, and what only looks like it."""
    match value:
        case bool():
            return (1, "true")
        case str():
            return (7, ["x"])
        case int():
            return (1.5, "1")
        case float():
            return (True, "1.0", "Infinity")
        case dict():
            return ([], "x")
        case _:
            return ({}, "x")


KINDS = [
    Malformed(f"{spell(place)} is {json.dumps(wrong)}", changed(place, wrong), door, spell(place))
    for place, value in members(document())
    for wrong in wrong_kinds(value)
]  # fmt: skip

MISSING = [
    Malformed(f"without {spell((*place, name))}", changed((*place, name), ...), door, spell((*place, name)))
    for place, name in [
        *(((), name) for name in SCHEMA["required"]),
        *(((part, 0), name) for part, kind in (("measures", "measure"), ("pairs", "pair"), ("texts", "text"),
                                               ("matrix", "row"), ("ladder", "rung"), ("sensitivity", "planted"),
                                               ("smallest", "change"))
          for name in SCHEMA["$defs"][kind]["required"]),
        *((("pairs", 0, "taps", 0), name) for name in SCHEMA["$defs"]["tap"]["required"]),
    ]
]  # fmt: skip

NULLS = [
    Malformed(f"{spell(place)} is null", changed(place, None), door, spell(place))
    for place in [("verdict",), ("headline",), ("config",), ("measures",), ("measures", 0, "holds"),
                  ("texts", 0, "tokens"), ("pairs", 0, "a"), ("versions", "pt"), ("notes", 0),
                  ("sensitivity", 0, "caught")]
]  # fmt: skip

CONTRADICTIONS = [
    Malformed(f"holds, where {spell(place)} does not", changed(place, value), door, "verdict")
    for place, value in [(("measures", 0, "holds"), False), (("pairs", 0, "taps", 0, "holds"), False),
                         (("pairs", 0, "taps", 0, "born"), True), (("texts", 0, "tie"), False),
                         (("texts", 0, "tie"), None), (("matrix", 0, "holds"), False)]
]  # fmt: skip

RANGES = [
    Malformed(f"{spell(place)} is {value}", changed(place, value), door, spell(place))
    for place, value in [(("texts", 0, "prompt"), -1), (("texts", 0, "tokens"), -8), (("ladder", 0, "prompts"), -1),
                         (("texts", 0, "first_difference"), -1), (("findings",), 0), (("findings",), 2),
                         (("findings",), "1"), (("verdict",), "Holds"), (("verdict",), "")]
]  # fmt: skip


def written(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / NAME).write_bytes(data)


BYTES = [
    Malformed(what, written(data), door, NAME)
    for what, data in [
        ("no bytes", b""), ("half a document", json.dumps(document()).encode()[:200]), ("a list", b"[]"),
        ("a text", b'"holds"'), ("UTF-16", json.dumps(document()).encode("utf-16")),
        ("a byte of Latin-1", b'{"\xe9": 1}'),
        ("NaN", b'{"findings": 1, "verdict": "holds", "headline": "", "config": {"a": NaN}}'),
        ("a number of 400 digits", b'{"findings": 1' + b"0" * 400 + b"}"),
        ("a number too large", b'{"findings": 1e999}'),
        ("a key twice", b'{"findings": 1, "findings": 1, "verdict": "holds", "headline": ""}'),
        ("100,000 lists in each other", b'{"findings": ' + b"[" * 100_000),
    ]
]  # fmt: skip

TWICE = [
    Malformed("a tap twice in a pair", changed(("pairs", 0, "taps"), document()["pairs"][0]["taps"] * 2), door,
              "pairs[0].taps"),
]  # fmt: skip

PLACES = [
    Malformed("no file", lambda folder: None, door, NAME),
    Malformed("a folder", lambda folder: (folder / NAME).mkdir(), door, NAME),
    Malformed("a FIFO", lambda folder: os.mkfifo(folder / NAME), door, NAME),
]

UNKNOWN = [
    Malformed(f"{spell(place)}, which nobody knows", changed(place, 1), door, spell(place), "said")
    for place in [("colour",), ("measures", 0, "colour"), ("pairs", 0, "taps", 0, "colour"), ("ladder", 0, "ppl")]
]

CASES = [*KINDS, *MISSING, *NULLS, *CONTRADICTIONS, *RANGES, *BYTES, *PLACES, *TWICE, *UNKNOWN]
