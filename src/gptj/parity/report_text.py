"""What a parity report says on a terminal: the verdict first, a line a backend, and the whole table when asked.

Nothing is wider than 60 columns that could not be wrapped, and no lines are drawn between columns, so that a narrow
terminal shows words below each other in place of broken boxes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gptj.parity.compare import Measure, ParityReport

__all__ = ["summary_of", "table_of"]

_MOST_FAILURES = 6
_MANIFEST = {
    "checked": "weights checked against manifest.json",
    "missing": "weights not checked against a manifest: there is none",
    "skipped": "weights not checked against a manifest",
}


def verdict(report: ParityReport) -> str:
    """The verdict in two words, or how many measures are beyond their limits."""
    return "all agree" if report.passed else f"{len(report.failures)} of {len(report.measures)} disagree"


def summary_of(report: ParityReport) -> Group:
    """The verdict, whether the weights were checked, a line a backend, and what is wrong where something is."""
    asked = f"{', '.join(report.backends)} in {report.dtype}"
    parts: list[RenderableType] = [
        Text.assemble((verdict(report), "green" if report.passed else "bold red"), f": {asked}"),
        Text(_MANIFEST[report.manifest]),
        Text(""),
        _lines(report),
    ]
    wrong = [
        f"{d.backend} first leaves the oracle at {d.stage}: {d.difference:.1e}, of {d.limit:.1e} allowed, at {d.where}"
        for d in report.divergences
    ]
    wrong += [_fact(measure) for measure in report.failures[:_MOST_FAILURES]]
    if (more := len(report.failures) - _MOST_FAILURES) > 0:
        wrong.append(f"and {more} more, which --verbose and --json show")
    if wrong:
        parts.append(Text(""))
    return Group(*parts, *(Padding(Text(line), (0, 0, 0, 2)) for line in wrong))


def table_of(report: ParityReport) -> Table:
    """Every measure, under the pair that it is of; and how much of their text each two backends share."""
    table = Table(
        title=f"{', '.join(report.backends)} in {report.dtype}: {verdict(report)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )
    for heading in ("what", "off by", "limit", "", "largest at"):
        table.add_column(heading, justify="right" if heading in ("off by", "limit") else "left")
    for (backend, against), measures in itertools.groupby(report.measures, key=lambda m: (m.backend, m.against)):
        table.add_section()
        table.add_row(Text(f"{backend} against {against}", "bold"))
        for m in measures:
            sign = Text("ok", "green") if m.holds else Text("NO", "bold red")
            table.add_row(m.what, f"{m.difference:.1e}", f"{m.limit:.1e}", sign, m.where)
        for text in report.texts:
            if (text.backend, text.against) == (backend, against):
                table.add_row(f"{text.answer} text", "", "", "", f"{text.same} of {text.tokens} tokens the same")
    for d in report.divergences:
        table.add_section()
        table.add_row(Text(f"{d.backend} first off at {d.stage}", "bold"), f"{d.difference:.1e}", f"{d.limit:.1e}", "",
                      d.where)  # fmt: skip
    return table


def _lines(report: ParityReport) -> Table:
    """A line a backend: its logits' largest differences, and how many of all its measures are within their limits."""
    table = Table(box=None, pad_edge=True, padding=(0, 2, 0, 0))
    for heading in ("logits off by, from", "oracle", "others", "limit", "within"):
        table.add_column(heading, justify="left" if heading.startswith("logits") else "right")
    for name in report.backends:
        of_it = [m for m in report.measures if name in (m.backend, m.against)]
        logits = [m for m in of_it if m.what.startswith("logits")]
        table.add_row(
            name,
            _largest([m for m in logits if m.against == "oracle"]),
            _largest([m for m in logits if m.against != "oracle"]),
            f"{max((m.limit for m in logits), default=0.0):.1e}",
            Text(f"{sum(m.holds for m in of_it)} of {len(of_it)}", "" if all(m.holds for m in of_it) else "bold red"),
        )
    return table


def _largest(measures: list[Measure]) -> str:
    return f"{max(m.difference for m in measures):.1e}" if measures else "-"


def _fact(m: Measure) -> str:
    place = f", at {m.where}" if m.where else ""
    return f"{m.backend} and {m.against} disagree on {m.what}: {m.difference:.1e}, of {m.limit:.1e} allowed{place}"
