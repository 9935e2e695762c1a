"""`gptj parity DIR`: a model's frameworks compared in each dtype, and with --matrix and --ladder all on one page."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptj.backends import choose_backend, installed_backends
from gptj.command.invariance import find_ladder, find_matrix
from gptj.command.printing import open_console
from gptj.command.reports import Destinations
from gptj.command.waiting import waiting

if TYPE_CHECKING:
    from gptj.parity.findings import Findings
    from gptj.parity.report import ParityReport

__all__ = ["OneFolder"]


@dataclasses.dataclass(frozen=True)
class OneFolder:
    """A model, and what is asked of it.

    Attributes:
        directory: its folder.
        backends: that were named; None is all that are installed.
        seed: of what is drawn; None is 0.
        dtypes: to compare in.
    """

    directory: Path
    backends: tuple[str, ...] | None
    seed: int | None
    dtypes: tuple[str, ...]

    def compare(self, **options: Any) -> list[ParityReport]:
        """A report in each dtype.

        Args:
            options: of `gptj.parity.run_parity`.

        Raises:
            GPTJError: see there.
        """
        from gptj.parity import run_parity

        names = installed_backends() if self.backends is None else tuple(map(choose_backend, self.backends))
        reports: list[ParityReport] = []
        for dtype in self.dtypes:
            start = f"comparing in {dtype}" if len(self.dtypes) > 1 else "comparing"
            with waiting(f"{start} {', '.join(names)}") as say:

                def tell(words: str, start: str = start, say: Callable[[str], None] = say) -> None:
                    say(f"{start}: {words}")

                if reports:  # the weights are the same in every dtype, and are checked once
                    options["check_manifest"] = False
                report = run_parity(self.directory, names, dtype=dtype, seed=self.seed or 0, progress=tell, **options)
            reports.append(dataclasses.replace(report, manifest=reports[0].manifest) if reports else report)
        return reports

    def find(self, what: str) -> Findings:
        """The "matrix", or the "ladder".

        Raises:
            GPTJError: see `gptj.parity.matrix.run_matrix` and `gptj.parity.ladder.run_ladder`.
        """
        if what == "ladder":
            return find_ladder(self.directory, self.backends, seed=self.seed)
        dtype = next((dtype for dtype in self.dtypes if dtype in ("float32", "float64")), "float32")
        return find_matrix(self.directory, self.backends, dtype=dtype, seed=self.seed or 0)

    def finish(
        self, reports: Sequence[ParityReport], others: Sequence[Findings], *, verbose: bool, destinations: Destinations
    ) -> None:
        """Print and write all that was found; exit with 1 where anything differs."""
        from gptj.parity.gather import findings_of_report, join_findings

        passed = all(report.passed for report in reports) and all(found.passed for found in others)

        def gather() -> Findings:
            several = len(reports) > 1
            return join_findings(*(findings_of_report(report, in_dtype=several) for report in reports), *others)

        def document() -> dict[str, Any]:
            more = {part: found.as_dict()[part] for found in others for part in ("matrix", "ladder")
                    if getattr(found, part)}  # fmt: skip
            if len(reports) == 1:
                return reports[0].as_dict() | more | {"passed": passed}
            return {"passed": passed, "reports": [report.as_dict() for report in reports], **more}

        destinations.finish(gather, document, lambda: _show(reports, others, verbose=verbose))
        if not passed:
            sys.exit(1)


def _show(reports: Sequence[ParityReport], others: Sequence[Findings], *, verbose: bool) -> None:
    """Print the reports, and what else was found."""
    from gptj.parity.reports.text import render_text

    console = open_console()
    for number, report in enumerate(reports):
        if number:
            console.print("")
        console.print(report.summary(), soft_wrap=False)
        if verbose:
            console.print("", report.table(), sep="\n", soft_wrap=False)
            for found in report.sensitivity:
                console.print("", *found.lines(every=True), sep="\n", soft_wrap=False)
    for one in others:
        click.echo("\n" + render_text(one, width=shutil.get_terminal_size().columns), nl=False)
