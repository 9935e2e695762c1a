"""Findings gathered from what the parts of parity found: a run of backends, or traces that were compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj.json_file import read_json_object
from gptj.parity.findings import Findings, MeasureFound, PairFound, TapFound

if TYPE_CHECKING:
    from gptj.parity.differences import Comparison, PairDifferences, TapDifference
    from gptj.parity.report import ParityReport
    from gptj.parity.trace import Trace

__all__ = ["compare_files", "findings_of_comparison", "findings_of_report"]

_MANIFEST = {
    "checked": "The weights were checked against manifest.json.",
    "missing": "The weights were not checked against a manifest: there is none.",
    "of other weights": "The weights were not checked against a manifest: it is of others.",
    "skipped": "The weights were not checked against a manifest.",
}


def findings_of_report(report: ParityReport) -> Findings:
    """The findings of a run of backends, with the config.json of the checkpoint that the report names.

    Args:
        report: of `gptj.parity.run_parity`.

    Raises:
        FormatError: the config cannot be read any more.
    """
    config: Mapping[str, Any] = {}
    if report.checkpoint is not None:
        config = read_json_object(Path(report.checkpoint) / "config.json")
    measures = tuple(MeasureFound(m.backend, m.against, m.what, float(m.difference), float(m.limit), m.holds, m.where)
                     for m in report.measures)  # fmt: skip
    notes = [_MANIFEST[report.manifest]]
    notes += [f"{text.backend} and {text.against} wrote {text.same} of {text.tokens} {text.answer} tokens alike."
              for text in report.texts]  # fmt: skip
    verdict = "holds" if report.passed else "differs"
    versions = {backend: dict(libraries) for backend, libraries in report.versions.items()}
    return Findings(verdict, _headline(report), report.checkpoint, config, versions, tuple(notes), measures)  # type: ignore[arg-type]


def _headline(report: ParityReport) -> str:
    """The result of a run in a sentence."""
    backends = " and ".join(filter(None, [", ".join(report.backends[:-1]), report.backends[-1]]))
    if report.passed:
        who = f"{backends} agree" if len(report.backends) > 1 else f"{backends} agrees with the oracle"
        return f"{who} in {report.dtype}: all {len(report.measures)} measures within their limits"
    size = f"{len(report.failures)} of {len(report.measures)} measures fail"
    if report.divergences:
        d = report.divergences[0]
        return (f"{d.backend} first leaves the oracle at {d.stage}: {d.difference:.1e}, of {d.limit:.1e} allowed, "
                f"at {d.where}; {size} in {report.dtype}")  # fmt: skip
    m = report.failures[0]
    return (f"{m.backend} and {m.against} disagree on {m.what}: {m.difference:.1e}, of {m.limit:.1e} allowed"
            f"{m.where and ', at '}{m.where}; {size} in {report.dtype}")  # fmt: skip


def findings_of_comparison(
    comparison: Comparison, traces: Sequence[Trace], *, folder: str | os.PathLike[str] | None = None
) -> Findings:
    """The findings of traces that were compared.

    Args:
        comparison: of `gptj.parity.compare_traces`.
        traces: that were given to it.
        folder: of the model, where it was the reference.
    """
    dtypes = {trace.name: trace.facts.dtype for trace in traces}
    dtypes |= {str(trace.file.path): trace.facts.dtype for trace in traces}  # names that occur twice are paths
    pairs = tuple(_pair(pair, comparison, dtypes.get(pair.other)) for pair in comparison.pairs)
    notes = list(comparison.facts)
    if comparison.left_out:
        some = ", ".join(comparison.left_out[:8])
        more = f" and {len(comparison.left_out) - 8} more" if len(comparison.left_out) > 8 else ""
        notes.append(f"Not in every trace, and not compared: {some}{more}.")
    wrong = [pair.headline for pair in pairs if not pair.right]
    born = [f"{trace}: {taps[0].tap} is not what its inputs give" for trace, taps in comparison.born.items() if taps]
    agree = f"{len(pairs)} {'traces agree' if len(pairs) > 1 else 'trace agrees'} with {comparison.pairs[0].base}"
    headline = next(iter(wrong or born), pairs[0].headline if len(pairs) == 1 else agree)
    versions = {trace.name: dict(trace.facts.versions) for trace in traces if trace.facts.versions}
    return Findings(
        "holds" if comparison.passed else "differs", headline, None if folder is None else os.fspath(folder),
        traces[0].facts.config.to_dict(), versions, tuple(notes), pairs=pairs,
    )  # fmt: skip


def compare_files(
    traces: Sequence[str | os.PathLike[str]],
    *,
    reference: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
) -> Findings:
    """The findings of traces in files.

    Args:
        traces: the files, two or more.
        reference: the model's folder, whose weights tell of every operation whether an error was born there.
        names: a TOML file that maps other programs' names onto ours.

    Raises:
        InputError: fewer than two, or of models or inputs that differ.
        GPTJError: a file is not what it should be.
    """
    from gptj.parity.differences import compare_traces
    from gptj.parity.run import open_reference
    from gptj.parity.tap_names import TapNames
    from gptj.parity.trace import open_trace

    mapping = None if names is None else TapNames.from_file(names)
    opened = [open_trace(path, mapping) for path in traces]
    read = None
    if reference is not None and opened:
        config, read = open_reference(reference)
        opened[0].require_model(config, file=reference)
    return findings_of_comparison(compare_traces(opened, read), opened, folder=reference)


def _pair(pair: PairDifferences, comparison: Comparison, dtype: str | None) -> PairFound:
    """A pair with what was born in either of its traces."""
    born: dict[str, list[tuple[str, TapDifference]]] = {}
    for name in (pair.other, pair.base):
        for wrong in comparison.born.get(name, ()):
            born.setdefault(wrong.tap, []).append((name, wrong))
    told = {} if pair.first is None else {pair.first.tap: any(origin.own is not None for origin in pair.origins)}
    taps = []
    for tap in pair.taps:
        known = born.get(tap.tap, [])
        own: TapDifference | None = known[0][1] if known else None
        answer = True if known else False if told.get(tap.tap) else None
        where = tap.where if own is None else f"{tap.where}; on its inputs in {known[0][0]}: {own.where}"
        taps.append(TapFound(tap.tap, float(tap.difference), float(tap.bound), tap.holds, answer,
                             None if own is None else float(own.difference),
                             None if own is None else float(own.bound), where))  # fmt: skip
    first = next((tap for tap in taps if not tap.right), None)
    headline = pair.headline
    if pair.first is None and first is not None:
        headline = f"{pair.other} and {pair.base} agree within rounding, but {first.tap} is not what its inputs give"
    return PairFound(pair.base, pair.other, tuple(taps), dtype, headline)
