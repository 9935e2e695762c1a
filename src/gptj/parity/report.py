"""A parity report: measures with their limits, the verdict, and how it is shown: JSON, a terminal, a notebook.

On a terminal the verdict comes first, then a line a backend, and the whole table when asked.

Nothing is wider than 60 columns that could not be wrapped, and no lines are drawn between columns, so that a narrow
terminal shows words below each other in place of broken boxes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptj.errors import ParityError
from gptj.errors.brief import html_table
from gptj.parity.comparison import Comparison
from gptj.parity.sensitivity import Sensitivity

__all__ = ["Divergence", "ManifestCheck", "Measure", "ParityReport", "TextMatch"]

ManifestCheck = Literal["checked", "missing", "of other weights", "skipped"]

_MOST_FAILURES = 6
_MANIFEST = {
    "checked": "weights checked against manifest.json",
    "missing": "weights not checked against a manifest: there is none",
    "of other weights": "weights not checked against a manifest: it is of others",
    "skipped": "weights not checked against a manifest",
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """One comparison.

    Attributes:
        backend, against: what was compared with what.
        what: of which answer.
        difference: the largest absolute difference; infinity where the shapes differ or a value is not finite.
        limit: the largest that is right.
        where: the place of the largest difference.
    """

    backend: str
    against: str
    what: str
    difference: float
    limit: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is within its limit; what is not finite never is, whatever the limit."""
        return math.isfinite(self.difference) and self.difference <= self.limit


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first value in which a backend differs from the oracle.

    Attributes:
        backend: whose.
        stage: the value, "block 3, rotated q".
        difference, limit: there; of the operation alone, on the inputs that it was given, where it was born there.
        where: the place of the largest difference.
        born: whether it was born there, and did not come in.
        looks_like: the known mistake that explains it; None where none does.
    """

    backend: str
    stage: str
    difference: float
    limit: float
    where: str
    born: bool = False
    looks_like: str | None = None

    @property
    def headline(self) -> str:
        """The divergence in a sentence."""
        start = f"{self.backend} first differs in {self.stage}: {'born there, ' if self.born else ''}"
        end = "" if self.looks_like is None else f"; looks like: {self.looks_like}"
        return f"{start}{self.difference:.1e} where rounding explains {self.limit:.0e}; {self.where}{end}"


@dataclasses.dataclass(frozen=True)
class TextMatch:
    """How much of their continuations two backends share. Not judged: rounding may turn a tie, and the text after it.

    Attributes:
        backend, against: whose.
        answer: "greedy" or "sampled".
        same: tokens before the first difference, over all rows.
        tokens: of how many.
    """

    backend: str
    against: str
    answer: str
    same: int
    tokens: int


@dataclasses.dataclass(frozen=True, repr=False)
class ParityReport:
    """The result of a parity run: every comparison, with its limit.

    Attributes:
        dtype: of the parameters.
        backends: who was asked.
        measures: all comparisons, those with the oracle first.
        divergences: where each backend that does first differs from the oracle.
        texts: how much of their continuations each two backends share.
        largest_logit: of the oracle, which the limits follow.
        versions: of each backend's process.
        checkpoint: the directory, where it is known.
        manifest: whether the weights were first checked against the directory's manifest.json, or there is none, or it
            is of other weights in the directory than those that were chosen.
        inside: every value between embedding and loss, compared with the oracle's.
        sensitivity: of each backend, where it was asked for: which mistakes would have been caught.
    """

    dtype: str
    backends: tuple[str, ...]
    measures: tuple[Measure, ...]
    divergences: tuple[Divergence, ...]
    texts: tuple[TextMatch, ...]
    largest_logit: float
    versions: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None
    manifest: ManifestCheck = "skipped"
    inside: Comparison | None = None
    sensitivity: tuple[Sensitivity, ...] = ()

    def __repr__(self) -> str:
        return f"ParityReport({', '.join(self.backends)} in {self.dtype}: {self.verdict})"

    def _repr_html_(self) -> str:
        """The measures, for a notebook."""
        rows = [
            (m.backend, m.against, m.what, f"{m.difference:.1e}", f"{m.limit:.1e}", "ok" if m.holds else "NO", m.where)
            for m in self.measures
        ]
        heading = ("backend", "against", "what", "difference", "limit", "", "largest at")
        return html_table(f"{', '.join(self.backends)} in {self.dtype}: {self.verdict}", rows, heading)

    @property
    def verdict(self) -> str:
        """In words: "all agree", or how many do not."""
        return _verdict(self)

    @property
    def passed(self) -> bool:
        """Whether every measure is within its limit."""
        return all(measure.holds for measure in self.measures)

    @property
    def failures(self) -> tuple[Measure, ...]:
        """The measures beyond their limits."""
        return tuple(measure for measure in self.measures if not measure.holds)

    def raise_if_failed(self) -> None:
        """Return quietly where all agree.

        Raises:
            ParityError: naming the first failure, how many there are, and where each backend first differs.
        """
        if self.passed:
            return
        first = self.failures[0]
        stages = ". ".join(d.headline for d in self.divergences)
        raise ParityError(
            f"{first.backend} and {first.against} disagree on {first.what}{first.where and ' at '}{first.where}"
            f" ({len(self.failures)} of {len(self.measures)} measures fail)",
            file=self.checkpoint,
            expected=f"a difference of at most {first.limit:.2g} in {self.dtype}",
            found=f"{first.difference:.2g}",
            hint=stages or None,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON. A difference that is not finite is text, since JSON has no such number."""

        def plain(found: Measure | Divergence) -> dict[str, Any]:
            facts = dataclasses.asdict(found)
            if not np.isfinite(found.difference):
                facts["difference"] = str(found.difference)
            return facts

        return {
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "manifest": self.manifest,
            "dtype": self.dtype,
            "backends": list(self.backends),
            "largest_logit": self.largest_logit,
            "measures": [plain(measure) | {"holds": measure.holds} for measure in self.measures],
            "divergences": [plain(found) | {"headline": found.headline} for found in self.divergences],
            "sensitivity": [row for found in self.sensitivity for row in found.as_dict()],
            "smallest_changes": [row for found in self.sensitivity for row in found.smallest_as_dict()],
            "texts": [dataclasses.asdict(text) for text in self.texts],
            "versions": {backend: dict(versions) for backend, versions in self.versions.items()},
        }

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def table(self) -> Table:
        """The measures as a table for the terminal."""
        return _table_of(self)

    def summary(self) -> Group:
        """The verdict for the terminal, with a line a backend."""
        return _summary_of(self)


def _verdict(report: ParityReport) -> str:
    """The verdict in two words, or how many measures are beyond their limits."""
    return "all agree" if report.passed else f"{len(report.failures)} of {len(report.measures)} disagree"


def _summary_of(report: ParityReport) -> Group:
    """The verdict, whether the weights were checked, a line a backend, and what is wrong where something is."""
    asked = f"{', '.join(report.backends)} in {report.dtype}"
    parts: list[RenderableType] = [
        Text.assemble((_verdict(report), "green" if report.passed else "bold red"), f": {asked}"),
        Text(_MANIFEST[report.manifest]),
        Text(""),
        _lines(report),
    ]
    wrong = [d.headline for d in report.divergences]
    wrong += [_fact(measure) for measure in report.failures[:_MOST_FAILURES]]
    if (more := len(report.failures) - _MOST_FAILURES) > 0:
        wrong.append(f"and {more} more, which --verbose and --json show")
    wrong += [line for found in report.sensitivity for line in found.lines()]
    if wrong:
        parts.append(Text(""))
    return Group(*parts, *(Padding(Text(line), (0, 0, 0, 2)) for line in wrong))


def _table_of(report: ParityReport) -> Table:
    """Every measure, under the pair that it is of; and how much of their text each two backends share."""
    table = Table(
        title=f"{', '.join(report.backends)} in {report.dtype}: {_verdict(report)}",
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
