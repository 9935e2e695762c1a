"""One HTML file that shows all of some findings: no script, no network, no other file.

It reads without colour (signs and numbers stand in every cell), in the dark, by the keyboard (whatever scrolls can be
reached), on 390 pixels and on paper. Its policy allows one thing, the style in it, by its hash; so nothing that a name
in the findings says could run or be fetched, were it ever written unescaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.parity.findings import Findings, MeasureFound, PairFound, TapFound, TextFound
from gptj.parity.reports.heat_map import heat_map
from gptj.parity.reports.line_chart import Line, line_chart
from gptj.parity.reports.markup import Markup, join, table, tag
from gptj.parity.reports.spelling import (
    grid_of_matrix,
    place_of,
    share_of,
    spell_born,
    spell_number,
    spell_percent,
    spell_sign,
    title_of_ladder,
)

__all__ = ["render_page"]

_KEY = (
    ("0", "0", "no difference"), ("1", "<1%", "under a hundredth of what rounding explains"),
    ("2", "7%", "under a tenth"), ("3", "85%", "within"), ("4", "✗ 3e2×", "beyond, as many times the bound"),
    ("5", "✗● 3e2×", "beyond, born there"), ("6", "?", "unknown"),
)  # fmt: skip
_CONFIG = ("n_layer", "n_embd", "n_head", "rotary_dim", "n_positions", "vocab_size", "activation_function",
           "layer_norm_epsilon")  # fmt: skip

_FEW = 12
"""Rows that stand open where all of them hold."""

_NUMBERS = ("off by", "bound", "limit", "on its inputs", "share of the bound", "prompt", "tokens", "a's margin",
            "b's margin", "rounding may turn")  # fmt: skip
"""Headings of columns that hold numbers."""


class _Section(NamedTuple):
    name: str
    title: str
    content: Markup


def render_page(*findings: Findings) -> str:
    """The page of one run or of several, one after the other."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    runs = [_run(found, f"r{number}-" if len(findings) > 1 else "") for number, found in enumerate(findings, 1)]
    names = ", ".join(dict.fromkeys(found.folder or "traces" for found in findings))
    sign = spell_sign(all(found.passed for found in findings))
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"), tag("title", f"{sign} Parity of {names}"),
        tag("style", Markup(style)),
    )  # fmt: skip
    skip = tag("a", "Skip to the findings", href="#findings", class_="skip")
    body = tag("body", skip, tag("main", *runs, id="findings"))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _run(found: Findings, prefix: str) -> Markup:
    """All of one run under its own heading."""
    sections = [section for section in _sections(found) if section.content]
    links = (tag("li", tag("a", one.title, href=f"#{prefix}{one.name}")) for one in sections)
    holds = "✓ holds" if found.passed else "✗ differs"
    title = f"Parity of {found.folder}" if found.folder else "Parity of traces"
    parts = [
        tag("header", tag("h1", title), tag("p", holds, class_=f"verdict {'holds' if found.passed else 'differs'}"),
            tag("p", found.headline, class_="headline"), _notes(found.notes)),
        tag("nav", tag("ul", *links), aria_label=f"Sections of {title}"),
        _facts(found),
    ]  # fmt: skip
    parts += [
        tag("section", tag("h2", one.title, id=f"{prefix}{one.name}"), one.content,
            aria_labelledby=f"{prefix}{one.name}")
        for one in sections
    ]  # fmt: skip
    return tag("article", *parts)


def _notes(notes: Sequence[str]) -> Markup:
    if len(notes) < 2:
        return join(tag("p", note) for note in notes)
    return tag("ul", *(tag("li", note) for note in notes), class_="notes")


def _facts(found: Findings) -> Markup:
    facts = [(who, ", ".join(f"{name} {version}" for name, version in libraries.items()))
             for who, libraries in found.versions.items()]  # fmt: skip
    config = ", ".join(f"{name} {found.config[name]}" for name in _CONFIG if name in found.config)
    facts += [("config", config)] if config else []
    return tag("dl", *(tag(kind, text) for fact in facts for kind, text in zip(("dt", "dd"), fact, strict=True)))


def _sections(found: Findings) -> Iterator[_Section]:
    wrong = [*found.wrong()]
    wrong = [] if wrong == [found.headline] else wrong
    yield _Section(
        "wrong", "What does not hold", tag("ul", *(tag("li", one) for one in wrong)) if wrong else Markup("")
    )
    key = (_key(),) if any(pair.taps for pair in found.pairs) else ()
    yield _Section("values", "Where computations part", join([*key, *_pairs(found)]))
    yield _Section("tokens", "Along generated tokens", _texts(found.texts))
    yield _Section("measures", "Measures", _measures(found))
    yield _Section("matrix", "Invariances", _matrix(found))
    yield _Section("ladder", title_of_ladder(found), _ladder(found))
    yield _Section("sensitivity", "Planted mistakes", join([_sensitivity(found), _smallest(found)]))


def _pairs(found: Findings) -> Iterator[Markup]:
    """Each pair; one of two that stand against a third too is folded, since that one shows the same errors."""
    bases: dict[str, set[str]] = {}
    for pair in found.pairs:
        yield _pair(pair, folded=bool(bases.get(pair.a, set()) & bases.get(pair.b, set())))
        bases.setdefault(pair.b, set()).add(pair.a)


def _key() -> Markup:
    """The key to the maps' cells, in colour and in signs."""
    items = (
        tag("li", tag("svg", tag("g", tag("rect", width=18, height=14, rx=2), class_=f"l{level}"), width=18, height=14,
                      aria_hidden="true"), f"{sign}  {words}")
        for level, sign, words in _KEY
    )  # fmt: skip
    return tag("ul", *items, class_="key", aria_label="Key to the maps")


def _pair(pair: PairFound, *, folded: bool = False) -> Markup:
    """Heat map, depth and table of a pair; folded, they open where something is wrong."""
    dtype = f" in {pair.dtype}" if pair.dtype and pair.dtype not in pair.b else ""
    said = [tag("h3", f"{spell_sign(pair.right)} {pair.b}{dtype} against {pair.a}")]
    said += [tag("p", pair.headline)] if pair.headline else []
    if pair.looks_like and pair.looks_like not in pair.headline:
        said.append(tag("p", "Looks like: ", tag("strong", pair.looks_like)))
    rows = [_value_row(tap) for tap in pair.taps]
    heading = ("value", "share of the bound", "off by", "bound", "born there", "on its inputs", "bound", "largest at")
    values = table(f"Values of {pair.b} against {pair.a}", heading, rows, numbers=_NUMBERS) if rows else Markup("")
    wrong = sum(not tap.right for tap in pair.taps)
    told = tag("summary", f"All {len(pair.taps):,} values, {wrong:,} of them beyond their bounds")
    maps = [heat_map(pair), _depth(pair), tag("details", told, values) if rows else Markup("")]
    if folded:
        maps = [tag("details", tag("summary", "Map, depth and values"), *maps, open=not pair.right)]
    return tag("div", *said, *maps)


def _value_row(tap: TapFound) -> tuple[list[str | Markup], str | None]:
    numbers = [spell_number(n) for n in (tap.difference, tap.bound, tap.local, tap.local_bound)]
    cells: list[str | Markup] = [
        tap.tap,
        share_of(tap).text,
        numbers[0],
        numbers[1],
        spell_born(tap),
        numbers[2],
        numbers[3],
        tap.where,
    ]
    return cells, None if tap.right else "wrong"


def _depth(pair: PairFound) -> Markup:
    """The sums that leave the blocks, along the depth."""
    chosen = [tap for tap in pair.taps if place_of(tap.tap)[0] is None or place_of(tap.tap)[1] == "sum"]
    if len(chosen) < 2:
        return Markup("")
    places = [str(place_of(tap.tap)[0]) if place_of(tap.tap)[0] is not None else tap.tap for tap in chosen]
    lines = [Line("difference", [tap.difference for tap in chosen]),
             Line("bound", [tap.bound for tap in chosen], dashed=True)]  # fmt: skip
    first = next((number for number, tap in enumerate(chosen) if not tap.right), None)
    return line_chart(f"{pair.b} against {pair.a}, by what leaves each block", places, lines,
                      marks=() if first is None else (first,))  # fmt: skip


def _texts(texts: Sequence[TextFound]) -> Markup:
    if not texts:
        return Markup("")
    rows: list[tuple[list[str | Markup], str | None]] = []
    for t in texts:
        parted = "the same" if t.first_difference is None else f"token {t.first_difference}"
        why = "-" if t.first_difference is None or t.tie is None else "a tie" if t.tie else "no tie"
        numbers = [spell_number(number) for number in (t.margin_a, t.margin_b, t.bound)]
        rows.append(([f"{t.a}, {t.b}", f"{spell_sign(t.right)} {parted}", str(t.prompt), str(t.tokens), *numbers, why],
                     None if t.right else "wrong"))  # fmt: skip
    heading = ("of", "first difference", "prompt", "tokens", "a's margin", "b's margin", "rounding may turn",
               "explained by")  # fmt: skip
    alike: dict[tuple[str, int, str], list[TextFound]] = {}
    for t in texts:
        if sum(error is not None for error in t.errors) > 1:  # a line of one point shows nothing
            dtype = t.b.rpartition(" ")[2]  # whose errors are of one size
            alike.setdefault((t.a, t.prompt, dtype if dtype in PARAMETER_DTYPES else ""), []).append(t)
    charts = [_errors(some[start : start + 4]) for some in alike.values() for start in range(0, len(some), 4)]
    return join([table("What was written after each prompt", heading, rows, numbers=_NUMBERS), *charts])


def _errors(texts: Sequence[TextFound]) -> Markup:
    """The differences of logits along the texts of some computations after one prompt, against one's."""
    first, tokens = texts[0], max(len(text.errors) for text in texts)
    lines = [Line(text.b, [*text.errors, *[None] * (tokens - len(text.errors))]) for text in texts]
    bounds = {text.bound for text in texts if text.bound is not None}
    if bounds:
        lines.append(Line("that rounding may turn, at most", [max(bounds)] * tokens, dashed=True))
    told = f"Against {first.a} after prompt {first.prompt}: the logits' largest difference at each new token"
    return line_chart(told, [str(number) for number in range(tokens)], lines,
                      marks=[text.first_difference for text in texts if text.first_difference is not None])  # fmt: skip


def _measures(found: Findings) -> Markup:
    rows: list[tuple[list[str | Markup], str | None]] = [
        ([f"{m.backend} against {m.against}", f"{spell_sign(m.holds)} {m.what}", spell_number(m.difference),
          spell_number(m.limit), m.where], None if m.holds else "wrong")
        for m in found.measures
    ]  # fmt: skip
    heading = ("of", "what", "off by", "limit", "largest at")
    if not rows:
        return Markup("")
    shown = table("Answers against the oracle's and each other's", heading, rows, numbers=_NUMBERS)
    wrong = sum(not m.holds for m in found.measures)
    told = tag("summary", f"All {len(rows):,} measures, {wrong:,} of them beyond their limits")
    return tag("details", told, shown, open=wrong > 0 or len(rows) <= _FEW)


def _matrix(found: Findings) -> Markup:
    """A row an invariance, a column a backend."""
    backends, grid = grid_of_matrix(found)
    rows: list[tuple[list[str | Markup], str | None]] = []
    for name, what, by_backend in grid:
        cells = (join(_matrix_cell(row, what) for row in by_backend.get(backend, ())) or "-" for backend in backends)
        broken = any(not row.holds for some in by_backend.values() for row in some)
        rows.append(([name, what, *cells], "part" if broken else None))
    told = "Two ways to one answer: the difference, of what is allowed"
    return table(told, ("two ways", "of", *backends), rows) if rows else Markup("")


def _matrix_cell(row: MeasureFound, what: str) -> Markup:
    size = f"{spell_sign(row.holds)} {spell_number(row.difference)} of {spell_number(row.limit)}"
    own = [] if row.what == what else [row.what]
    own += [] if row.holds or not row.where else [f"at {row.where}"]
    more = tag("div", " ".join(own), class_="soft") if own else Markup("")
    return tag("div", size, more, class_=None if row.holds else "differs")


def _ladder(found: Findings) -> Markup:
    rows: list[tuple[list[str | Markup], str | None]] = [
        ([f"{r.backend}, {r.rung}" if r.right else f"✗ {r.backend}, {r.rung}", spell_number(r.error),
          spell_number(r.kl), spell_percent(r.top1), spell_percent(r.greedy),
          "-" if r.prompts is None else str(r.prompts)], None if r.right else "wrong")
        for r in found.ladder
    ]  # fmt: skip
    heading = ("of", "largest error", "KL, nats", "top-1 the same", "greedy the same", "prompts")
    told = "The logits, the next token's distribution, and the tokens chosen"
    return table(told, heading, rows, numbers=heading[1:]) if rows else Markup("")


def _smallest(found: Findings) -> Markup:
    rows: list[tuple[list[str | Markup], str | None]] = [
        ([f"{s.backend}, {s.dtype}", s.what, spell_number(s.change), s.tap or "-", s.of or "-"], None)
        for s in found.smallest
    ]
    heading = ("of", "a change of", "relative", "shown by", "the number")
    told = "The smallest change that would have been noticed"
    return table(told, heading, rows, numbers=("relative",)) if rows else Markup("")


def _sensitivity(found: Findings) -> Markup:
    """A row a mistake, a column a backend: caught or not, and what was said."""
    backends = list(dict.fromkeys(planted.backend for planted in found.sensitivity))
    cells: dict[str, dict[str, Markup]] = {}
    expected: dict[str, str] = {}
    missed: set[str] = set()
    for planted in found.sensitivity:
        told = tag("span", f" {planted.headline}", class_="soft") if planted.headline else Markup("")
        of_row = cells.setdefault(planted.mutant, {})
        sign = tag("strong", "✓ caught" if planted.caught else "✗ missed")
        of_row[planted.backend] = join([*filter(None, [of_row.get(planted.backend)]), tag("div", sign, told)])
        expected.setdefault(planted.mutant, planted.expected or "-")
        if not planted.caught:
            missed.add(planted.mutant)
    caught = sum(planted.caught for planted in found.sensitivity)
    rows: list[tuple[list[str | Markup], str | None]] = [
        ([mutant, expected[mutant], *(of_row.get(backend, "-") for backend in backends)],
         "wrong" if mutant in missed else None)
        for mutant, of_row in cells.items()
    ]  # fmt: skip
    summary = f"{caught:,} of {len(found.sensitivity):,} mistakes that were put in on purpose were noticed"
    return table(summary, ("mistake", "changes", *backends), rows) if rows else Markup("")
