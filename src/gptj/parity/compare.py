"""Judging records: each backend against the oracle, then each against each other, by NumPy alone.

The oracle answers the same probe in float64 on the same rounded weights. Every difference is measured, whether it
is within its bound or not; a report says all of them, and where a backend is off its trace says which value was the
first to be (`gptj.parity.differences`). Nothing is raised for a disagreement: it is the answer, not an error
(`ParityReport.raise_if_failed` turns it into one).

Chosen tokens are not compared with the oracle's own choice, which a tie within rounding may turn. Each token is
judged on the text that the backend itself had written so far: was it, within the tolerance, the best one (greedy),
or the one at the drawn number (sampled)?
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.backends import BACKENDS
from gptj.errors import InputError, shown
from gptj.generation.sampling import uniforms
from gptj.parity.comparison import Comparison, PairDifferences, spell_tap
from gptj.parity.oracle import Oracle, causal_lm_loss, positions_of_mask, token_losses
from gptj.parity.probe import Probe
from gptj.parity.record import ANSWERS, Record
from gptj.parity.report import Divergence, ManifestCheck, Measure, ParityReport, TextMatch
from gptj.parity.tolerance import Tolerance, tolerance_of

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

    logits: Array
    loss: float
    hidden_states: tuple[Array, ...]
    attentions: tuple[Array, ...]
    far_logits: Array
    plain_logits: Array


def expect(oracle: Oracle, probe: Probe) -> Expected:
    """The oracle's answers to the probe."""
    batch = oracle.forward(probe.input_ids, probe.attention_mask, probe.position_ids, attentions=True)
    return Expected(
        logits=_logits(batch.logits),
        loss=causal_lm_loss(_logits(batch.logits), probe.labels),
        hidden_states=batch.hidden_states,
        attentions=batch.attentions,
        far_logits=_logits(oracle.forward(probe.input_ids, probe.attention_mask, probe.far_position_ids).logits),
        plain_logits=_logits(oracle.forward(probe.input_ids).logits),
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
    probe, bounds = _common(records)
    expected = expect(oracle, probe)
    largest = float(np.abs(expected.logits).max())
    measures = [m for record in records for m in _against_oracle(record, expected, oracle, bounds, largest)]
    for one, other in itertools.combinations(records, 2):
        measures += _against_each_other(one, other, bounds.of_logits(largest))
    pairs = {} if inside is None else {pair.other: pair for pair in inside.pairs}
    for record in records:
        if inside is not None:
            measures.append(_inside(pairs[record.backend], inside))
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


def _common(records: Sequence[Record]) -> tuple[Probe, Tolerance]:
    """The probe and the tolerance that all records share."""
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
                raise InputError("was asked something else", where=f"{other.backend}: {name}")
    return first.probe, tolerance_of(first.dtype)


def _logits(logits: Array | None) -> Array:
    assert logits is not None  # forward was not told to leave them out
    return logits


# ---- against the oracle


def _against_oracle(
    record: Record, expected: Expected, oracle: Oracle, bounds: Tolerance, largest: float
) -> Iterator[Measure]:
    """Every measure of one backend against the oracle."""
    answers, probe, limit = record.answers, record.probe, bounds.of_logits(largest)

    def measure(
        what: str, found: Array, wanted: Array, axes: str, *, limit: float = limit, masked: bool = True
    ) -> Measure:
        mask = probe.attention_mask[:, -found.shape[1] :] if masked and found.ndim > 1 else None
        return Measure(record.backend, ORACLE, what, *_largest_difference(found, wanted, axes, mask, limit))

    yield measure("logits", answers["logits"], expected.logits, "btv")
    yield measure("logits at far positions", answers["far_logits"], expected.far_logits, "btv")
    yield measure("logits without a mask", answers["plain_logits"], expected.plain_logits, "btv", masked=False)
    yield measure("logits over the cache", answers["cached_logits"], expected.logits, "btv")
    yield measure("loss", answers["loss"], np.asarray(expected.loss), "", limit=bounds.of_loss(largest))
    if answers["logits"].shape == expected.logits.shape and answers["logits"].dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # a backend's infinite logit gives NaN, which no limit lets pass
            found, wanted = (token_losses(x[:, :-1], probe.labels[:, 1:]) for x in (answers["logits"], expected.logits))
        yield measure("loss of each token", found, wanted, "bt", limit=bounds.of_loss(largest))
    yield _largest_of_layers(record, "hidden_states", expected.hidden_states, "btm", bounds.of_hidden)
    yield _largest_of_layers(record, "attentions", expected.attentions, "bhts", lambda _: limit)
    yield _judged_tokens(record, oracle, "greedy", 2 * limit)
    yield _judged_tokens(record, oracle, "sampled", 2 * limit)


def _largest_of_layers(
    record: Record, answer: str, wanted: Sequence[Array], axes: str, limit_of: Callable[[float], float]
) -> Measure:
    """The layer's difference that is the largest share of its limit."""
    found, mask = record.answers[answer], record.probe.attention_mask
    measures = []
    for layer, values in enumerate(wanted):
        limit = limit_of(float(np.abs(values).max()))
        of_layer = found[layer] if layer < len(found) else np.empty(0)
        difference, limit, where = _largest_difference(of_layer, values, axes, mask, limit)
        what = answer.replace("_", " ")
        measures.append(Measure(record.backend, ORACLE, what, difference, limit, f"layer {layer}, {where}"))
    return max(measures, key=lambda measure: _share(measure.difference, measure.limit))


def _share(difference: float, limit: float) -> float:
    """A difference as a share of its limit, infinite where it is beyond a limit that is zero or not finite."""
    if not (np.isfinite(difference) and difference <= limit):
        return difference / limit if 0 < limit < np.inf and np.isfinite(difference) else np.inf
    return difference / limit if limit else 0.0


_AXES = {"b": "row", "t": "token", "v": "vocabulary", "m": "channel", "h": "head", "s": "key"}


def _largest_difference(
    found: Array, wanted: Array, axes: str, mask: Array | None, limit: float
) -> tuple[float, float, str]:
    """The largest absolute difference, the limit as given, and the difference's place in words.

    Infinity where the shapes differ or a value is not finite. A place in the padding is called that.
    """
    if found.shape != wanted.shape:
        return np.inf, limit, f"shape {found.shape}, expected {wanted.shape}"
    if found.dtype.kind != "f":
        return np.inf, limit, f"dtype {found.dtype}, expected a floating-point one"
    difference = np.abs(found.astype(np.float64) - wanted)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    words = [f"{_AXES[axis]} {int(index)}" for axis, index in zip(axes, place, strict=True)]
    if mask is not None and "t" in axes and not mask[place[0], place[axes.index("t")]]:
        words.append("(padding)")
    return float(difference[place]), limit, ", ".join(words).replace(", (", " (")


# ---- chosen tokens


def _judged_tokens(record: Record, oracle: Oracle, answer: str, tie: float) -> Measure:
    """How wrong the most wrong chosen token is, given the text before it.

    Greedy: by how much the oracle's best logit is above the chosen one's. Sampled: by how much probability the
    number drawn lies outside the chosen token's part of the distribution. Two logits within `tie` may stand in
    either order, which makes that part wider; a probability moves by less than `tie`.
    """
    probe, ids = record.probe, record.answers[answer]
    what = f"{answer} tokens"

    def broken(problem: str) -> Measure:
        return Measure(record.backend, ORACLE, what, np.inf, tie, problem)

    rows, start = probe.prompt_ids.shape
    stop = start + probe.new_tokens
    if ids.dtype.kind not in "iu":
        return broken(f"dtype {ids.dtype}, expected whole numbers")
    if ids.ndim != 2 or len(ids) != rows or not start < ids.shape[1] <= stop:
        return broken(f"shape {ids.shape}, expected {(rows, stop)}")
    if not np.array_equal(ids[:, :start], probe.prompt_ids):
        return broken("does not begin with the prompt")
    if ((ids < 0) | (ids >= oracle.config.vocab_size)).any():
        return broken("a token that the vocabulary does not have")
    mask = np.concatenate([probe.prompt_mask, np.ones((rows, ids.shape[1] - start), np.int64)], 1)
    logits = _logits(oracle.forward(ids, mask, positions_of_mask(mask)).logits)

    worst, where = 0.0, ""
    for row in range(rows):
        for column in range(start, stop):
            if column >= ids.shape[1]:
                return broken(f"row {row} stops after {column - start} tokens")
            step, token = column - start, int(ids[row, column])
            if answer == "greedy":
                wrong = float(logits[row, column - 1].max() - logits[row, column - 1, token])
            else:
                uniform = float(uniforms(probe.seed, step, row)[0])
                wrong = _outside(logits[row, column - 1], token, uniform, tie)
            wrong = wrong if np.isfinite(wrong) else np.inf  # the oracle's own logits are not finite: nothing is proven
            if wrong > worst:
                worst, where = wrong, f"row {row}, step {step}"
            if token in oracle.config.eos_token_ids:
                break
    return Measure(record.backend, ORACLE, what, worst, tie, where)


def _outside(logits: Array, token: int, uniform: float, tie: float) -> float:
    """How far `uniform` lies outside the part of the distribution, in descending order, that `token` can have."""
    weights = np.exp(logits - logits.max())
    before = weights[logits > logits[token] + tie].sum() / weights.sum()
    up_to = weights[logits >= logits[token] - tie].sum() / weights.sum()
    return float(max(before - uniform, uniform - up_to, 0.0))


# ---- against each other


def _against_each_other(one: Record, other: Record, limit: float) -> Iterator[Measure]:
    """The measures between two backends, under the limit that each has with the oracle."""
    mask = one.probe.attention_mask
    for what, answer in (
        ("logits", "logits"),
        ("logits at far positions", "far_logits"),
        ("logits without a mask", "plain_logits"),
        ("logits over the cache", "cached_logits"),
    ):
        found, wanted = one.answers[answer], other.answers[answer]
        masked = None if answer == "plain_logits" else mask
        yield Measure(one.backend, other.backend, what, *_largest_difference(found, wanted, "btv", masked, limit))


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
