"""Judging records: each backend against the oracle, then each against each other, by NumPy alone.

The oracle answers the same probe in float64 on the same rounded weights. Every difference is measured, whether it
is within its bound or not; a report says all of them, and where a backend is off its trace says which value was the
first to be (`gptj.parity.differences`). Nothing is raised for a disagreement: it is the answer, not an error
(`ParityReport.raise_if_failed` turns it into one).

How far an answer may lie from the oracle's is derived, a token at a time: from the dtype, the lengths of the sums and
what errors of that size do to the oracle's own answer (`gptj.parity.perturbed`). No number is chosen.

Chosen tokens are not compared with the oracle's own choice, which a tie within rounding may turn. Each token is
judged on the text that the backend itself had written so far: was it, within what rounding explains, the best one
(greedy), or the one at the drawn number (sampled)?
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.backends import BACKENDS
from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.errors import InputError, shown
from gptj.generation.sampling import uniforms
from gptj.parity.bounds import Rounding, shifted
from gptj.parity.comparison import Comparison, PairDifferences, spell_tap
from gptj.parity.oracle import Oracle, positions_of_mask, token_losses
from gptj.parity.perturbed import Bounded, PerturbedPass
from gptj.parity.probe import Probe
from gptj.parity.record import ANSWERS, Record
from gptj.parity.report import Divergence, ManifestCheck, Measure, ParityReport, TextMatch

__all__ = [
    "Expected",
    "compare_records",
    "expect",
]

Array = NDArray[Any]

ORACLE = "oracle"


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """The oracle's answers to a probe, float64. Names as in `gptj.parity.record.ANSWERS`."""

    logits: Bounded
    loss: Bounded
    token_losses: Bounded
    hidden_states: tuple[Bounded, ...]
    attentions: tuple[Bounded, ...]
    far_logits: Bounded
    plain_logits: Bounded


def expect(oracle: Oracle, probe: Probe, rounding: Rounding) -> Expected:
    """The oracle's answers to the probe, with the bounds of an arithmetic."""
    ids, mask, layers = probe.input_ids, probe.attention_mask, oracle.config.n_layer
    batch = PerturbedPass(oracle, rounding, ids, mask, probe.position_ids)
    losses, loss = batch.losses(probe.labels)
    states = ("embedding", *(f"h.{block}.sum" for block in range(layers - 1)), "ln_f")
    return Expected(
        logits=batch.of("logits"),
        loss=loss,
        token_losses=losses,
        hidden_states=tuple(map(batch.of, states)),
        attentions=tuple(map(batch.attention, range(layers))),
        far_logits=PerturbedPass(oracle, rounding, ids, mask, probe.far_position_ids).of("logits"),
        plain_logits=PerturbedPass(oracle, rounding, ids).of("logits"),
    )


def compare_records(
    records: Sequence[Record],
    oracle: Oracle,
    *,
    inside: Comparison | None = None,
    checkpoint: str | None = None,
    manifest: ManifestCheck = "skipped",
) -> ParityReport:
    """The judgement on some backends' records.

    Args:
        records: at least one; of one dtype, asked the same.
        oracle: on the checkpoint's weights, rounded to that dtype.
        inside: the comparison of the backends' traces, by their names, with the oracle's; None looks at answers alone.
        checkpoint: what the report calls them.
        manifest: what the report says of the check against the manifest.

    Raises:
        InputError: no record, or one of an unknown backend or without an answer; or records of different dtypes or
            probes, which prove nothing about each other.
    """
    probe, rounding = _common(records)
    expected = expect(oracle, probe, rounding)
    largest = float(np.abs(expected.logits.value).max())
    judged = _JudgedTexts(oracle, probe, rounding)
    measures = [m for record in records for m in _against_oracle(record, expected, judged)]
    for one, other in itertools.combinations(records, 2):
        measures += _against_each_other(one, other, expected)
    if inside is not None:
        measures += [_between(pair) for pair in inside.between]
    pairs = {} if inside is None else {pair.other: pair for pair in inside.pairs}
    for record in records:
        if inside is not None:
            measures.append(_inside(pairs[record.backend], inside))
            measures += _parted(record.backend, inside)
    return ParityReport(
        dtype=records[0].dtype,
        backends=tuple(record.backend for record in records),
        measures=tuple(measures),
        divergences=tuple(_divergence(pair) for pair in pairs.values() if pair.first is not None),
        texts=tuple(_texts(records)),
        largest_logit=largest,
        versions={record.backend: dict(record.facts.get("versions", {})) for record in records},
        checkpoint=checkpoint,
        manifest=manifest,
        inside=inside,
    )


def _divergence(pair: PairDifferences) -> Divergence:
    """The first value of a backend's trace that rounding does not explain: its own error where it was born there."""
    assert pair.first is not None
    own = next((origin.own for origin in pair.origins if origin.trace == pair.other and origin.own is not None), None)
    born = any(origin.verdict == "born there" and origin.trace == pair.other for origin in pair.origins)
    size = own if born and own is not None else pair.first
    return Divergence(pair.other, spell_tap(pair.first.tap), size.difference, size.bound, size.where, born=born,
                      looks_like=pair.looks_like)  # fmt: skip


def _inside(pair: PairDifferences, inside: Comparison) -> Measure:
    """The value between embedding and loss that is the largest share of what rounding explains."""
    worst = max(inside.born.get(pair.other) or pair.taps, key=lambda tap: _share(tap.difference, tap.bound))
    what = "every value between"
    return Measure(pair.other, ORACLE, what, worst.difference, worst.bound, f"{spell_tap(worst.tap)}, {worst.where}")


def _between(pair: PairDifferences) -> Measure:
    """The same between two backends: the value that is the largest share of what rounding explains of both."""
    worst = max(pair.taps, key=lambda tap: _share(tap.difference, tap.bound))
    where = f"{spell_tap(worst.tap)}, {worst.where}"
    return Measure(pair.other, pair.base, "every value between", worst.difference, worst.bound, where)


def _parted(backend: str, inside: Comparison) -> Iterator[Measure]:
    """The preference for each token at which a backend's own greedy text parts from the oracle's."""
    for text in (text for text in inside.texts if text.other == backend):
        if text.first is None and text.holds:
            continue
        known = [*(error for error in text.errors if error is not None), *(text.margins or (math.inf,))]
        size = max(text.margins or (math.inf,)) if all(map(math.isfinite, known)) else math.inf
        limit, step = 0.0 if text.bound is None else 2 * text.bound, text.first or 0
        yield Measure(backend, ORACLE, "where texts part", size, limit, f"prompt {text.prompt}, token {step}")


def _common(records: Sequence[Record]) -> tuple[Probe, Rounding]:
    """The probe and the arithmetic that all records share."""
    if not records:
        raise InputError("nothing to compare", where="records", expected="at least one record", found=0)
    for record in records:
        if record.backend not in BACKENDS:
            raise InputError(
                "no such backend", where="backend", expected=", ".join(BACKENDS), found=shown(record.backend)
            )
        if missing := sorted(ANSWERS.keys() - record.answers.keys()):
            raise InputError("has not answered", where=f"{record.backend}: {missing[0]}")
    first = records[0]
    for other in records[1:]:
        if other.dtype != first.dtype:
            raise InputError(
                "records of different dtypes", where=other.backend, expected=first.dtype, found=other.dtype
            )
        asked = other.probe.as_arrays()
        for name, value in first.probe.as_arrays().items():
            if not np.array_equal(value, asked[name]):
                raise InputError("answers another probe", where=f"{other.backend}: {name}")
    if first.dtype not in PARAMETER_DTYPES:
        raise InputError("no bounds", where="dtype", expected=" or ".join(PARAMETER_DTYPES), found=shown(first.dtype))
    return first.probe, Rounding.of(first.dtype)


# ---- against the oracle


def _against_oracle(record: Record, expected: Expected, judged: _JudgedTexts) -> Iterator[Measure]:
    """Every measure of one backend against the oracle."""
    answers, probe = record.answers, record.probe

    def measure(what: str, found: Array, wanted: Bounded, axes: str, *, masked: bool = True) -> Measure:
        mask = probe.attention_mask[:, -found.shape[1] :] if masked and found.ndim > 1 else None
        return Measure(record.backend, ORACLE, what, *_largest_difference(found, wanted, axes, mask))

    yield measure("logits", answers["logits"], expected.logits, "btv")
    yield measure("logits at far positions", answers["far_logits"], expected.far_logits, "btv")
    yield measure("logits without a mask", answers["plain_logits"], expected.plain_logits, "btv", masked=False)
    yield measure("logits over the cache", answers["cached_logits"], expected.logits, "btv")
    yield measure("loss", answers["loss"], expected.loss, "")
    if answers["logits"].shape == expected.logits.value.shape and answers["logits"].dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # a backend's infinite logit gives NaN, which no limit lets pass
            found = token_losses(answers["logits"][:, :-1].astype(np.float64), probe.labels[:, 1:])
        yield measure("loss of each token", found, expected.token_losses, "bt")
    yield _largest_of_layers(record, "hidden_states", expected.hidden_states, "btm")
    yield _largest_of_layers(record, "attentions", expected.attentions, "bhts")
    yield judged.judge(record, "greedy")
    yield judged.judge(record, "sampled")


def _largest_of_layers(record: Record, answer: str, wanted: Sequence[Bounded], axes: str) -> Measure:
    """The layer's difference that is the largest share of its limit."""
    found, mask = record.answers[answer], record.probe.attention_mask
    measures = []
    for layer, values in enumerate(wanted):
        of_layer = found[layer] if layer < len(found) else np.empty(0)
        difference, limit, where = _largest_difference(of_layer, values, axes, mask)
        what = answer.replace("_", " ")
        measures.append(Measure(record.backend, ORACLE, what, difference, limit, f"layer {layer}, {where}"))
    return max(measures, key=lambda measure: _share(measure.difference, measure.limit))


def _share(difference: float, limit: float) -> float:
    """A difference as a share of its limit, infinite where it is beyond a limit that is zero or not finite."""
    if not (np.isfinite(difference) and difference <= limit):
        return difference / limit if 0 < limit < np.inf and np.isfinite(difference) else np.inf
    return difference / limit if limit else 0.0


_AXES = {"b": "row", "t": "token", "v": "vocabulary", "m": "channel", "h": "head", "s": "key"}


def _largest_difference(found: Array, wanted: Bounded, axes: str, mask: Array | None) -> tuple[float, float, str]:
    """The absolute difference that is the largest share of its bound, that bound, and its place in words.

    Infinity where the shapes differ or a value is not finite. A place in the padding is called that.
    """
    if found.shape != wanted.value.shape:
        return np.inf, float(wanted.bound.max()), f"shape {found.shape}, expected {wanted.value.shape}"
    if found.dtype.kind != "f":
        return np.inf, float(wanted.bound.max()), f"dtype {found.dtype}, expected a floating-point one"
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.abs(found.astype(np.float64) - wanted.value)
        bound = np.broadcast_to(wanted.bound, difference.shape)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        share = np.where(difference > 0, difference / bound, 0)  # beyond a bound of 0: infinity
    share = np.where(np.isnan(share), np.inf, share)
    place = np.unravel_index(int(share.argmax()), difference.shape)
    words = [f"{_AXES[axis]} {int(index)}" for axis, index in zip(axes, place, strict=True)]
    if mask is not None and "t" in axes and not mask[place[0], place[axes.index("t")]]:
        words.append("(padding)")
    return float(difference[place]), float(bound[place]), ", ".join(words).replace(", (", " (")


# ---- chosen tokens


class _JudgedTexts:
    """The chosen tokens, each judged on the text before it.

    Greedy: by how much the oracle's best logit is above the chosen one's, which rounding may do to two logits. Sampled:
    by how much probability the number drawn lies outside the chosen token's part of the distribution, as wide as
    rounding may make it: two logits within twice their bound may stand in either order, and a probability moves as
    `gptj.parity.bounds.shifted` says. What lies outside of that is no more than the sums' own rounding.

    Args:
        oracle: that judges.
        probe: what was asked.
        rounding: the backends' arithmetic.
    """

    def __init__(self, oracle: Oracle, probe: Probe, rounding: Rounding) -> None:
        self._oracle, self._probe, self._rounding = oracle, probe, rounding
        self._passes: dict[bytes, Bounded] = {}  # backends mostly write the same

    def judge(self, record: Record, answer: str) -> Measure:
        """How wrong the token is that is wrong by the largest share of its limit."""
        probe, ids = self._probe, record.answers[answer]

        def measure(difference: float, limit: float, where: str) -> Measure:
            return Measure(record.backend, ORACLE, f"{answer} tokens", difference, limit, where)

        problem = self._problem(ids)
        if problem is not None:
            return measure(np.inf, 0.0, problem)
        rows, start = probe.prompt_ids.shape
        stop = start + probe.new_tokens
        found = self._pass(ids)
        worst: tuple[float, float, str] = (0.0, 0.0, "")
        for row in range(rows):
            for column in range(start, stop):
                if column >= ids.shape[1]:
                    return measure(np.inf, 0.0, f"row {row} stops after {column - start} tokens")
                step, token = column - start, int(ids[row, column])
                logits, off = found.value[row, column - 1], float(found.bound[row, column - 1, 0])
                if answer == "greedy":
                    wrong, limit = float(logits.max() - logits[token]), 2 * off
                else:
                    limit = self._rounding.sum_of(len(logits)) + 8 * self._rounding.summing
                    wrong = _outside(logits, token, float(uniforms(probe.seed, step, row)[0]), off)
                wrong = wrong if np.isfinite(wrong) else np.inf  # the oracle's own are not finite: nothing is proven
                if not worst[2] or _share(wrong, limit) > _share(worst[0], worst[1]):
                    worst = wrong, limit, f"row {row}, step {step}"
                if token in self._oracle.config.eos_token_ids:
                    break
        return measure(*worst)

    def _problem(self, ids: Array) -> str | None:
        """The rule that texts break; None where there is none."""
        rows, start = self._probe.prompt_ids.shape
        stop = start + self._probe.new_tokens
        if ids.dtype.kind not in "iu":
            return f"dtype {ids.dtype}, expected whole numbers"
        if ids.ndim != 2 or len(ids) != rows or not start < ids.shape[1] <= stop:
            return f"shape {ids.shape}, expected {(rows, stop)}"
        if not np.array_equal(ids[:, :start], self._probe.prompt_ids):
            return "does not begin with the prompt"
        if ((ids < 0) | (ids >= self._oracle.config.vocab_size)).any():
            return "a token that the vocabulary does not have"
        return None

    def _pass(self, ids: Array) -> Bounded:
        """The oracle's logits of some texts."""
        key = ids.astype(np.int64).tobytes()
        if key not in self._passes:
            mask = self._probe.prompt_mask
            mask = np.concatenate([mask, np.ones((len(ids), ids.shape[1] - mask.shape[1]), np.int64)], 1)
            found = PerturbedPass(self._oracle, self._rounding, ids, mask, positions_of_mask(mask))
            self._passes[key] = found.of("logits")
        return self._passes[key]


def _outside(logits: Array, token: int, uniform: float, off: float) -> float:
    """How far `uniform` lies outside the part of the distribution, in descending order, that `token` can have.

    Args:
        logits: (v,), float64.
        token: that was chosen.
        uniform: the number that was drawn.
        off: how far rounding may move each logit.
    """
    weights = np.exp(logits - logits.max())
    before = weights[logits > logits[token] + 2 * off].sum() / weights.sum()
    up_to = weights[logits >= logits[token] - 2 * off].sum() / weights.sum()
    low, high = float(shifted(before, off)[0]), float(shifted(up_to, off)[1])
    return max(low - uniform, uniform - high, 0.0)


# ---- against each other


def _against_each_other(one: Record, other: Record, expected: Expected) -> Iterator[Measure]:
    """The measures between two backends, each of which may lie as far from the oracle as rounding takes it."""
    mask = one.probe.attention_mask
    for what, answer, bounds in (
        ("logits", "logits", expected.logits),
        ("logits at far positions", "far_logits", expected.far_logits),
        ("logits without a mask", "plain_logits", expected.plain_logits),
        ("logits over the cache", "cached_logits", expected.logits),
    ):
        found, wanted = one.answers[answer], Bounded(other.answers[answer].astype(np.float64), 2 * bounds.bound)
        masked = None if answer == "plain_logits" else mask
        yield Measure(one.backend, other.backend, what, *_largest_difference(found, wanted, "btv", masked))


def _texts(records: Sequence[Record]) -> Iterator[TextMatch]:
    """How many chosen tokens each two backends have in common before they part."""
    for one, other in itertools.combinations(records, 2):
        for answer in ("greedy", "sampled"):
            (rows, start), pair = one.probe.prompt_ids.shape, (one.answers[answer], other.answers[answer])
            if any(ids.ndim != 2 or len(ids) != rows for ids in pair):
                continue  # which is a failure against the oracle
            mine, theirs = (ids[:, start:] for ids in pair)
            width = min(mine.shape[1], theirs.shape[1])
            same = np.logical_and.accumulate(mine[:, :width] == theirs[:, :width], axis=1).sum()
            yield TextMatch(one.backend, other.backend, answer, int(same), max(mine.size, theirs.size))
