"""Findings gathered from what the parts of parity found: a run of backends, or traces that were compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gptj.calls.taps import list_taps, split_tap
from gptj.config import GPTJConfig
from gptj.parity.findings import (
    PARTS,
    Findings,
    LadderRung,
    MeasureFound,
    PairFound,
    TapFound,
    TextFound,
    Verdict,
)
from gptj.paths.json_file import read_json_object

if TYPE_CHECKING:
    from gptj.parity.comparison import Comparison, PairDifferences, TapDifference
    from gptj.parity.extra_differences import GradientDifference
    from gptj.parity.report import ParityReport
    from gptj.parity.steps import StepDifference
    from gptj.parity.text_differences import TextDifference
    from gptj.parity.trace import Trace
    from gptj.parity.two_folders import FolderDifference

__all__ = [
    "compare_files",
    "findings_of_comparison",
    "findings_of_folders",
    "findings_of_report",
    "join_findings",
    "read_reference",
]

_MANIFEST = {
    "checked": "The weights were checked against manifest.json.",
    "missing": "The weights were not checked against a manifest: there is none.",
    "of other weights": "The weights were not checked against a manifest: it is of others.",
    "skipped": "The weights were not checked against a manifest.",
}


def findings_of_report(report: ParityReport, *, in_dtype: bool = False) -> Findings:
    """The findings of a run of backends, with the config.json of the checkpoint that the report names.

    Args:
        report: of `gptj.parity.run_parity`.
        in_dtype: whether a backend is named with its dtype, as where there are reports in several.

    Raises:
        FormatError: the config cannot be read any more.
    """

    def who(name: str) -> str:
        return f"{name} {report.dtype}" if in_dtype and name in report.backends else name

    config: Mapping[str, Any] = {}
    if report.checkpoint is not None:
        config = read_json_object(Path(report.checkpoint) / "config.json")
    measures = tuple(MeasureFound(who(m.backend), who(m.against), m.what, float(m.difference), float(m.limit), m.holds,
                                  m.where) for m in report.measures)  # fmt: skip
    notes = [_MANIFEST[report.manifest]]
    notes += _alike(report, who)
    inside = report.inside
    notes += [] if inside is None else [f"{note}." for note in inside.notes()]
    versions = {backend: dict(libraries) for backend, libraries in report.versions.items()}
    pairs = () if inside is None else tuple(_pair(pair, inside, report.dtype)
                                            for pair in (*inside.pairs, *inside.between))  # fmt: skip
    texts = () if inside is None else tuple(dataclasses.replace(_text(text), b=who(text.other))
                                            for text in inside.texts)  # fmt: skip
    right = report.passed and all(pair.right for pair in pairs) and all(text.right for text in texts)
    headline = _headline(report)
    if report.passed and not right:
        headline = next(pair.headline for pair in pairs if not pair.right)
    found = Findings(_verdict(right), headline, report.checkpoint, config, versions, tuple(notes), measures, pairs,
                     texts)  # fmt: skip
    planted = [(one, who(one.backend)) for one in report.sensitivity]
    return found.extended(sensitivity=[row | {"backend": name} for one, name in planted for row in one.as_dict()],
                          smallest=[row for one, _ in planted for row in one.smallest_as_dict()])  # fmt: skip


def _alike(report: ParityReport, who: Callable[[str], str]) -> Iterator[str]:
    """How much of their texts backends share: one sentence where all wrote the same, else one for each two."""
    for answer in dict.fromkeys(text.answer for text in report.texts):
        texts = [text for text in report.texts if text.answer == answer]
        if len(texts) > 1 and all(text.same == text.tokens for text in texts):
            names = list(dict.fromkeys(who(name) for text in texts for name in (text.backend, text.against)))
            yield f"{', '.join(names[:-1])} and {names[-1]} wrote the same {texts[0].tokens} {answer} tokens."
            continue
        yield from (f"{who(text.backend)} and {who(text.against)} wrote {text.same} of {text.tokens} {answer} tokens "
                    "alike." for text in texts)  # fmt: skip


def join_findings(*found: Findings) -> Findings:
    """Several findings on one model as one document, under the headline of the first that differs, or under all.

    Args:
        found: one at least, whose folder, config and versions the first has where it has any.
    """
    first, wrong = found[0], next((one for one in found if not one.passed), None)
    versions = {name: dict(libraries) for one in reversed(found) for name, libraries in one.versions.items()}
    parts = {name: tuple(row for one in found for row in getattr(one, name)) for name in PARTS}
    return Findings(
        "holds" if wrong is None else "differs",
        "; ".join(one.headline for one in found) if wrong is None else wrong.headline,
        first.folder, first.config, {name: versions[name] for one in found for name in one.versions},
        tuple(dict.fromkeys(note for one in found for note in one.notes)), **parts,
    )  # fmt: skip


def _headline(report: ParityReport) -> str:
    """The result of a run in a sentence."""
    backends = " and ".join(filter(None, [", ".join(report.backends[:-1]), report.backends[-1]]))
    if report.passed:
        who = f"{backends} agree" if len(report.backends) > 1 else f"{backends} agrees with the oracle"
        return f"{who} in {report.dtype}: all {len(report.measures)} measures within their limits"
    size = f"{len(report.failures)} of {len(report.measures)} measures fail"
    if report.divergences:
        return f"{report.divergences[0].headline}; {size} in {report.dtype}"
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
    agree = f"{len(pairs)} {'traces agree' if len(pairs) > 1 else 'trace agrees'} with {comparison.pairs[0].base}"
    headline = next(_sentences(comparison), pairs[0].headline if len(pairs) == 1 else agree)
    versions = {trace.name: dict(trace.facts.versions) for trace in traces if trace.facts.versions}
    return Findings(
        _verdict(comparison.passed), headline, None if folder is None else os.fspath(folder),
        traces[0].facts.config.to_dict(), versions, tuple(_notes(comparison)), pairs=pairs,
        texts=tuple(map(_text, comparison.texts)),
        matrix=(*map(_learnt, comparison.gradients), *map(_learnt, comparison.steps)),
    )  # fmt: skip


def findings_of_folders(found: Sequence[FolderDifference], first: str, second: str) -> Findings:
    """The findings on two folders' models: each backend's traces as a pair, its next tokens as a rung.

    Args:
        found: of `gptj.parity.two_folders.compare_folders`.
        first, second: the folders.
    """
    pairs, texts, rungs = [], [], []
    for one in found:
        [difference] = one.comparison.pairs
        pair = _pair(difference, one.comparison, None)
        a, b = f"{pair.a} in {one.backend}", f"{pair.b} in {one.backend}"
        pairs.append(dataclasses.replace(pair, a=a, b=b, headline=f"{one.backend}: {pair.headline}"))
        texts += [dataclasses.replace(_text(text), a=a, b=b) for text in one.comparison.texts]
        error = next((tap.difference for tap in pair.taps if tap.tap == "logits"), None)
        prompts = len(one.comparison.texts) or None
        rungs.append(LadderRung(one.backend, pair.b, error, one.divergence[0], one.agreement, one.greedy, prompts))
    equal = all(one.equal for one in found)
    wrong = (f"{one.backend}: {sentence}" for one in found for sentence in _sentences(one.comparison))
    same = f"{second} equals {first} within rounding, in {' and '.join(one.backend for one in found)}"
    notes = [f"What stands as precisions is {second} against {first}."]
    notes += [f"{one.backend}: {note}" for one in found for note in _notes(one.comparison)]
    return Findings(_verdict(equal), next(wrong, same), second, notes=tuple(notes), pairs=tuple(pairs),
                    texts=tuple(texts), ladder=tuple(rungs))  # fmt: skip


def _verdict(right: bool) -> Verdict:
    return "holds" if right else "differs"


def _sentences(comparison: Comparison) -> Iterator[str]:
    """Sentences, one for each thing that rounding does not explain."""
    yield from (pair.headline for pair in comparison.pairs if not pair.right)
    yield from (
        f"{trace}: {taps[0].tap} is not what its inputs give" for trace, taps in comparison.born.items() if taps
    )
    yield from (str(one) for one in comparison.gradients if not one.holds)
    yield from (str(one) for one in comparison.steps if not one.holds)
    yield from (str(text) for text in comparison.texts if not text.holds)


def _notes(comparison: Comparison) -> Iterator[str]:
    yield from comparison.facts
    yield from (f"{note}." for note in comparison.notes())


def _text(text: TextDifference) -> TextFound:
    a, b = text.margins or (None, None)
    tie = None if text.first is None else text.tie
    return TextFound(text.base, text.other, text.prompt, text.tokens, text.first, a, b, text.bound, tie, text.errors)


def _learnt(one: GradientDifference | StepDifference) -> MeasureFound:
    return MeasureFound(one.other, f"{one.what} against {one.base}", one.parameter, float(one.difference),
                     float(one.bound), one.holds, str(list(one.where)))  # fmt: skip


def read_reference(
    reference: str | os.PathLike[str], traces: Sequence[Trace], *, weights: str | None = None
) -> tuple[GPTJConfig, Callable[[str, str], NDArray[Any]]]:
    """The config and weights of the folder by which traces are judged.

    Args:
        reference: the folder.
        traces: opened.
        weights: which weights file, where the folder holds several sets.

    Raises:
        InputError: it is the folder of no trace: every field of the config in which it is another is named. One trace
            may be of another epsilon, activation or tie: its values then tell.
        GPTJError: the folder cannot be opened.
    """
    from gptj.parity.run import open_reference
    from gptj.parity.trace import MEANINGS, SHAPES

    config, read = open_reference(reference, weights=weights)
    fields = (*SHAPES, *MEANINGS)
    if not any(all(getattr(trace.facts.config, field) == getattr(config, field) for field in fields)
               for trace in traces):  # fmt: skip
        traces[0].require_model(config, file=Path(reference) / "config.json", fields=fields)
    return config, read


def compare_files(
    traces: Sequence[str | os.PathLike[str]],
    *,
    reference: str | os.PathLike[str] | None = None,
    names: Sequence[str | os.PathLike[str]] = (),
) -> Findings:
    """The findings of traces in files.

    Args:
        traces: the files, two or more.
        reference: the model's folder, whose weights tell of every operation whether an error was born there.
        names: TOML files, or shipped ones' names, that map other programs' names onto ours.

    Raises:
        InputError: fewer than two, or of models or inputs that differ.
        GPTJError: a file is not what it should be.
    """
    from gptj.parity.differences import compare_traces
    from gptj.parity.tap_names import TapNames
    from gptj.parity.trace import open_trace

    mapping = TapNames.find(*names)
    opened = [open_trace(path, mapping) for path in traces]
    config, read = (None, None) if reference is None or not opened else read_reference(reference, opened)
    return findings_of_comparison(compare_traces(opened, read, config=config), opened, folder=reference)


def _pair(pair: PairDifferences, comparison: Comparison, dtype: str | None) -> PairFound:
    """A pair with what was born in either of its traces, and in what one of the two has alone."""
    born: dict[str, list[tuple[str, TapDifference]]] = {}
    for name in (pair.other, pair.base):
        for wrong in comparison.born.get(name, ()):
            born.setdefault(wrong.tap, []).append((name, wrong))
    taps = []
    for tap in pair.taps:
        known = born.get(tap.tap, [])
        own: TapDifference | None = known[0][1] if known else None
        needs = dict.fromkeys(needed for name in (pair.base, pair.other)
                              if (needed := comparison.untold.get(name, {}).get(tap.tap)) is not None)  # fmt: skip
        answer = True if known else None if needs else False
        where = f"{tap.where}, at padding alone" if tap.padding else tap.where
        where = where if own is None else f"{where}; on its inputs in {known[0][0]}: {own.where}"
        taps.append(TapFound(tap.tap, float(tap.difference), float(tap.bound), tap.holds, answer,
                             None if own is None else float(own.difference),
                             None if own is None else float(own.bound), where, ", ".join(needs) or None))  # fmt: skip
    for name, known in born.items():
        if name in pair.left_out:
            trace, own = known[0]
            taps.append(TapFound(name, None, None, True, True, float(own.difference), float(own.bound),
                                 f"on its inputs in {trace}, which alone has it: {own.where}"))  # fmt: skip
    if pair.alone is not None:
        order = [*list_taps(1 + max((split_tap(tap.tap)[0] or 0 for tap in taps), default=0))]
        taps.sort(key=lambda tap: order.index(tap.tap))
    return PairFound(pair.base, pair.other, tuple(taps), dtype, pair.headline, pair.looks_like)
