"""Markdown of findings for a job's summary, as GitHub and GitLab show it, cut to the size that GitHub takes.

Names and sentences are written so that nothing in them is markup, a mention or a link.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from gptj.parity.findings import Findings, MeasureFound, PairFound
from gptj.parity.reports.heat_map import operations_of
from gptj.parity.reports.spelling import (
    legible,
    place_of,
    share_of,
    spell_born,
    spell_number,
    spell_percent,
    spell_sign,
    title_of_ladder,
)

__all__ = ["SUMMARY_BYTES", "render_markdown"]

SUMMARY_BYTES = 1024 * 1024
"""A job's step may write so much into its summary: docs.github.com, "Workflow commands", job summaries."""

_SPECIAL = frozenset("\\`*_{}[]()<>#+-!|~&@$:\"'.=^%")
_MOST_FAILING = 200


@dataclasses.dataclass(frozen=True)
class _Section:
    """A heading with sentences, and a table's rows, of which the last are left out where room is short."""

    heading: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()

    def lines(self, most: int | None) -> Iterator[str]:
        yield from (self.heading, "")
        for sentence in self.sentences:
            yield from (sentence, "")
        rows = self.rows if most is None else self.rows[:most]
        if rows:
            yield _row(self.columns)
            yield _row(["---"] * len(self.columns))
            yield from map(_row, rows)
            yield ""
        if left := len(self.rows) - len(rows):
            yield from (f"{left:,} of {len(self.rows):,} rows are left out here: the summary would be too long.", "")


def render_markdown(*findings: Findings, limit_bytes: int = SUMMARY_BYTES) -> str:
    """The text, of fewer bytes than `limit_bytes`; where rows had to be left out, a sentence says how many.

    Args:
        findings: one or several.
        limit_bytes: of the whole.
    """
    sections = [section for found in findings for section in _sections(found)]
    longest = max((len(section.rows) for section in sections), default=0)
    most: int | None = None
    while True:
        text = "\n".join(line for section in sections for line in section.lines(most))
        if len(text.encode("utf-8")) < limit_bytes:
            return text
        if most == 0:
            break
        most = (longest if most is None else most) // 2
    headlines = "\n\n".join(section.heading for section in sections if section.heading.startswith("## "))
    said = "All else is left out here: the summary would be too long."
    room = max(0, limit_bytes - len(said.encode()) - 4)
    return f"{headlines.encode('utf-8')[:room].decode('utf-8', 'ignore')}\n\n{said}\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """A text in which nothing is markup: letters, digits and spaces stay, the rest is written by its number."""
    text = " ".join(legible(text, longest=500).split())
    return "".join(f"&#{ord(c)};" if c in _SPECIAL else c for c in text)


def _size(difference: float | None, limit: float | None) -> tuple[str, str]:
    return spell_number(difference), spell_number(limit)


def _measures(title: str, of: tuple[str, str], found: Iterable[MeasureFound]) -> Iterator[_Section]:
    rows = [[spell_sign(m.holds), _plain(m.backend), _plain(m.against), _plain(m.what),
             *_size(m.difference, m.limit), _plain(m.where)] for m in found]  # fmt: skip
    if rows:
        yield _Section(title, (), ("", "backend", *of, "off by", "limit", "largest at"), rows)


def _sections(found: Findings) -> Iterator[_Section]:
    """Everything, the most important first."""
    name = f" of {_plain(found.folder)}" if found.folder else ""
    sentences = [f"**{_plain(found.headline)}**", *map(_plain, found.notes)]
    versions = "; ".join(f"{who}: " + ", ".join(f"{name} {number}" for name, number in libraries.items())
                         for who, libraries in found.versions.items())  # fmt: skip
    sentences += [_plain(versions)] if versions else []
    holds = "✓ holds" if found.passed else "✗ differs"
    yield _Section(f"## {holds}: parity{name}", tuple(sentences))
    wrong = [*found.wrong()]
    if wrong and wrong != [found.headline]:
        rows = [[str(number), _plain(one)] for number, one in enumerate(wrong, 1)]
        yield _Section("### What does not hold", (), ("", "what"), rows)
    for pair in found.pairs:
        yield from _pair(pair)
    yield from _measures("### Measures", ("against", "what"), found.measures)
    yield from _measures("### Invariances", ("two ways", "of"), found.matrix)
    if found.texts:
        rows = [[spell_sign(t.right), _plain(t.a), _plain(t.b), str(t.prompt), str(t.tokens),
                 "none" if t.first_difference is None else str(t.first_difference), spell_number(t.margin_a),
                 spell_number(t.margin_b), spell_number(t.bound)] for t in found.texts]  # fmt: skip
        heading = ("", "a", "b", "prompt", "tokens", "first difference", "a's margin", "b's margin", "may turn")
        yield _Section("### Texts", (), heading, rows)
    if found.ladder:
        rows = [[_plain(r.backend), _plain(r.rung), spell_number(r.error), spell_number(r.kl), spell_percent(r.top1),
                 spell_percent(r.greedy), "-" if r.prompts is None else str(r.prompts)]
                for r in found.ladder]  # fmt: skip
        columns = ("backend", "precision", "error", "KL, nats", "top-1 the same", "greedy the same", "prompts")
        yield _Section(f"### {title_of_ladder(found)}", (), columns, rows)
    if found.sensitivity:
        rows = [["✓ caught" if p.caught else "✗ missed", _plain(p.backend), _plain(p.mutant), _plain(p.expected or "-"),
                 _plain(p.headline)] for p in found.sensitivity]  # fmt: skip
        yield _Section("### Planted mistakes", (), ("", "backend", "mistake", "changes", "what was said"), rows)
    if found.smallest:
        rows = [[_plain(s.backend), _plain(s.dtype), _plain(s.what), spell_number(s.change), _plain(s.tap or "-"),
                 _plain(s.of or "-")] for s in found.smallest]  # fmt: skip
        small = ("backend", "precision", "a change of", "relative", "shown by", "the number")
        yield _Section("### The smallest changes that would have been noticed", (), small, rows)


def _pair(pair: PairFound) -> Iterator[_Section]:
    """The map of a pair as a table, and the values that are wrong."""
    sentences = [_plain(pair.headline)] if pair.headline else []
    told = pair.looks_like is None or pair.looks_like in pair.headline
    sentences += [] if told else [f"Looks like: {_plain(str(pair.looks_like))}"]
    columns, blocks = operations_of(pair)
    blocks.pop(None, None)
    rows = [[f"block {block}",
             *(share_of(blocks[block][name]).text if name in blocks[block] else "" for name in columns)]
            for block in sorted(blocks, key=lambda number: -1 if number is None else number)]  # fmt: skip
    dtype = f" in {_plain(pair.dtype)}" if pair.dtype and pair.dtype not in pair.b else ""
    key = "Percent of what rounding explains; ✗ beyond it, ● born there."
    yield _Section(f"### {spell_sign(pair.right)} {_plain(pair.b)}{dtype} against {_plain(pair.a)}",
                   (*sentences, key), ("", *map(_plain, columns)), rows)  # fmt: skip
    shown = [tap for tap in pair.taps if not tap.right or place_of(tap.tap)[0] is None]
    values = [[spell_sign(tap.right), _plain(tap.tap), *_size(tap.difference, tap.bound),
               _plain(spell_born(tap)), *_size(tap.local, tap.local_bound),
               _plain(tap.where)] for tap in shown[:_MOST_FAILING]]  # fmt: skip
    more = len(shown) - len(values)
    left = (f"And {more:,} values more, which the page and the JSON have.",) if more else ()
    heading = ("", "value", "off by", "bound", "born there", "on its inputs", "bound", "largest at")
    yield _Section("#### Values beyond their bounds, and those outside of the blocks", left, heading, values)
