"""Traces compared tap by tap: where two part, by how much, and whether the error was born there or came in.

NumPy alone, some tokens at a time: what is held of two traces is a slice of each, the sizes of their tokens, and one
operation's other inputs (keys, values, a weight). The most exact trace is the base; each other is compared with it by
what the two have, and what the base lacks is compared among the others.

Each tap gets two judgements. Between two traces: is the difference within what rounding explains up to there
(`gptj.parity.bounds.accumulate`)? Of one trace alone: is the tap what its operation gives, computed again in float64
from the inputs that the trace itself recorded (`gptj.parity.operations`)? So an error is told from its consequences
without a reference, wherever an operation needs no weights or these are given.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import list_taps, split_tap
from gptj.config import GPTJConfig
from gptj.config.labels import IGNORED_LABEL
from gptj.config.schema import schema
from gptj.errors import InputError, shown
from gptj.parity.bounds import TokenSizes, accumulate
from gptj.parity.comparison import Comparison, Origin, PairDifferences, TapDifference, spell_tap
from gptj.parity.extra_differences import GradientDifference, compare_gradients, compare_with_exact
from gptj.parity.operations import Expected, Missing, OperationOf, ReadWeight
from gptj.parity.oracle import Oracle
from gptj.parity.oracle_gradients import loss_gradients
from gptj.parity.pairing import Pairing, pair_others, pair_up, rounding_of, unit_of
from gptj.parity.pattern import find_pattern
from gptj.parity.perturbed import Bounded
from gptj.parity.signatures import find_signature
from gptj.parity.spread import AXES
from gptj.parity.steps import StepDifference, compare_steps, compare_steps_with_exact
from gptj.parity.text_differences import TextDifference, bound_texts, compare_texts, logits_of_texts
from gptj.parity.trace import INPUTS, MEANINGS, Trace, rotary_sha256, slices_of

__all__ = ["Comparison", "Origin", "PairDifferences", "TapDifference", "compare_traces", "spell_tap"]

Array = NDArray[Any]

_MOST_EXACT = 2**27
"""Parameters of a model whose gradients are computed in float64: 1 GB of them."""

_FACTS = ("dtype", "path", "weights_sha256")


# ---- comparing


def compare_traces(
    traces: Sequence[Trace], weights: ReadWeight | None = None, *, config: GPTJConfig | None = None,
    between: bool = False,
) -> Comparison:  # fmt: skip
    """The judgement on two or more traces of one model on the same inputs, each against the most exact one.

    A pair is judged by what its two have, whatever a third lacks; and each value of each trace by its own inputs.

    Args:
        traces: opened.
        weights: reads a weight of the model by its name, rounded to a dtype; None leaves operations that have
            weights to the comparison between the traces.
        between: whether the taps of each two others than the most exact are compared too: `Comparison.between`.
        config: of the weights, by which each operation is computed again; None is the most exact trace's.

    Raises:
        InputError: fewer than two, of models or inputs that differ, or one with nothing in common with another.
        FormatError: a file changed while it was read.
    """
    traces = _named_apart(traces)
    _require_comparable(traces)
    judging = pair_up(traces)
    pairings = [*judging, *(pair_others(traces, judging) if between else ())]
    first = min(traces, key=unit_of)
    # By one epsilon and activation: a trace that says others computed something else.
    config = first.facts.config if config is None else config
    judged = [dataclasses.replace(trace, facts=dataclasses.replace(trace.facts, config=config)) for trace in traces]
    bases = {pairing.base.name: pairing.base for pairing in pairings}
    padding = _padding(*traces)
    sizes: dict[str, dict[str, TokenSizes]] = {name: {} for name in bases}
    found: list[dict[str, tuple[_Largest, _Largest]]] = [{} for _ in pairings]
    origins: dict[str, dict[str, Origin]] = {}
    tried: dict[str, set[str]] = {trace.name: set() for trace in traces}
    for tap in (tap for tap in list_taps(first.facts.config.n_layer) if any(tap in trace.places for trace in traces)):
        for name, base in bases.items():
            if tap not in base.places:
                continue
            having = [n for n, one in enumerate(pairings) if one.base is base and tap in one.shared]
            sizes[name][tap], differences = _differences(base, [pairings[n].other for n in having], tap, padding)
            for number, difference in zip(having, differences, strict=True):
                found[number][tap] = difference
        origins[tap] = {
            trace.name: _origin(trace, tap, weights, tried[trace.name]) for trace in judged if tap in trace.places
        }
    by_trace = {trace.name: [(tap, of_tap[trace.name]) for tap, of_tap in origins.items() if trace.name in of_tap]
                for trace in traces}  # fmt: skip
    pairs = tuple(
        _pair(one, sizes[one.base.name], differences, origins) for one, differences in zip(pairings, found, strict=True)
    )
    passes: dict[Any, Bounded] = {}
    texts = [text for one in judging if "generated" in one.shared
             for text in _texts(one, sizes[one.base.name], weights, passes)]  # fmt: skip
    return Comparison(
        pairs[: len(judging)],
        born={name: tuple(one.own for _, one in of_trace if one.verdict == "born there" and one.own is not None)
              for name, of_trace in by_trace.items()},
        facts=tuple(_facts(config, first, [trace for trace in traces if trace is not first])),
        looks_like={name: {tap: one.looks_like for tap, one in of_trace if one.looks_like is not None}
                    for name, of_trace in by_trace.items()},
        gradients=tuple(_gradients(traces, judging, weights)),
        texts=tuple(texts),
        untold={name: {tap: one.needs for tap, one in of_trace if one.needs is not None}
                for name, of_trace in by_trace.items()},
        steps=tuple(_steps(traces, judging, weights)),
        between=pairs[len(judging) :],
    )  # fmt: skip


def _gradients(
    traces: Sequence[Trace], pairings: Sequence[Pairing], weights: ReadWeight | None
) -> Iterator[GradientDifference]:
    """The gradients that two traces share; and each against the oracle's, of weights few enough to differentiate."""
    for one in pairings:
        names = [name for name in one.base.extras.gradients if f"grad.{name}" in one.shared]
        yield from compare_gradients(one.base, one.other, names, (rounding_of(one.base), rounding_of(one.other)))
    config = traces[0].facts.config
    if weights is None or sum(math.prod(row.shape) for row in schema(config)) > _MOST_EXACT:
        return
    exact: dict[str, dict[str, Array]] = {}
    inputs = {name: next((x for trace in traces if (x := trace.read_input(name)) is not None), None) for name in INPUTS}
    ids, labels = inputs["input_ids"], inputs["labels"]
    for trace in traces if ids is not None and labels is not None else ():
        if not trace.extras.gradients:
            continue
        assert ids is not None and labels is not None
        if trace.facts.dtype not in exact:
            oracle = Oracle(config, _rounded(weights, trace.facts.dtype))
            _, exact[trace.facts.dtype] = loss_gradients(
                oracle, ids, inputs["attention_mask"], inputs["position_ids"], labels=labels
            )
        yield from compare_with_exact(trace, rounding_of(trace), exact[trace.facts.dtype])


def _steps(
    traces: Sequence[Trace], pairings: Sequence[Pairing], weights: ReadWeight | None
) -> Iterator[StepDifference]:
    """The steps of optimizers that two traces share; and each against the definition, from its own gradient."""
    for one in pairings:
        names = [name for name in one.base.extras.steps if f"step.{name}" in one.shared]
        yield from compare_steps(one.base, one.other, names, (rounding_of(one.base), rounding_of(one.other)))
    for trace in traces if weights is not None else ():
        assert weights is not None
        yield from compare_steps_with_exact(trace, rounding_of(trace), _rounded(weights, trace.facts.dtype))


def _rounded(weights: ReadWeight, dtype: str) -> Callable[[str], Array]:
    return lambda name: weights(name, dtype)


def _texts(
    pairing: Pairing, sizes: dict[str, TokenSizes], weights: ReadWeight | None, passes: dict[Any, Bounded]
) -> Iterator[TextDifference]:
    """The texts of two traces, each with the bound of its own logits where the weights are given.

    Without them, and on a grid of 8 bits, it is an estimate from the sizes of the batch's logits, or none where the
    base has no logits. `passes` are those that were made for other pairs.
    """
    pair, config, estimate = (pairing.base, pairing.other), pairing.base.facts.config, None
    if "logits" in sizes:
        keys = pairing.base.sizes["s"]
        estimate = sum(
            float(accumulate(sizes, config, rounding_of(trace), keys=keys)["logits"].max()) for trace in pair
        )
    texts = [*compare_texts(*pair, estimate)]
    if weights is None or any(trace.facts.path == "int8" for trace in pair):
        return iter(texts)
    found = []
    for dtype, rounding in ((trace.facts.dtype, rounding_of(trace)) for trace in pair):
        key = pairing.base.name, dtype, rounding
        if key not in passes:
            passes[key] = logits_of_texts(pairing.base, Oracle(config, _rounded(weights, dtype)), rounding)
        found.append(passes[key])
    return bound_texts(texts, *found)


def _named_apart(traces: Sequence[Trace]) -> list[Trace]:
    """Traces under their files' names, and under whole paths where these are the same."""
    names = [trace.name for trace in traces]
    return [
        trace if names.count(trace.name) == 1 else dataclasses.replace(trace, name=str(trace.file.path))
        for trace in traces
    ]


def _require_comparable(traces: Sequence[Trace]) -> None:
    """Make sure that traces are of one model's shape, asked the same."""
    if len(traces) < 2:
        raise InputError("nothing to compare", where="traces", expected="at least two", found=len(traces))
    names = [trace.name for trace in traces]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise InputError("the same file twice", where=twice[0])
    for first, other in itertools.combinations(traces, 2):
        first.require_model(other.facts.config, file=other.file.path)
        for letter in "bts":
            if first.sizes.get(letter) != other.sizes.get(letter):
                raise InputError("of inputs that differ", file=other.file.path, where={"b": "rows", "t": "tokens"}.get(
                    letter, "keys"), expected=first.sizes.get(letter), found=other.sizes.get(letter))  # fmt: skip
        for name in INPUTS:
            wanted, found = first.read_input(name), other.read_input(name)
            if wanted is not None and found is not None and not (wanted == found).all():
                raise InputError("recorded with another value", file=other.file.path, where=name,
                                 expected=f"that of {first.name}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Largest:
    """The largest differences: of each token (b, t), or () where there are none, with their places.

    Attributes:
        sizes: the absolute differences, infinite where a value is not finite.
        places: (..., axes of the tap), where each is.
        axes: of the tap.
    """

    sizes: Array
    places: Array
    axes: str

    @classmethod
    def of(cls, found: Array, wanted: Array, axes: str, start: int) -> _Largest:
        """Those of some tokens, of which the first is number `start`."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(found - wanted)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        return cls._each(difference, difference, axes, start)

    @classmethod
    def _each(cls, ranked: Array, difference: Array, axes: str, start: int) -> _Largest:
        kept = [axes.index(letter) for letter in "bt" if letter in axes]
        moved = np.moveaxis(ranked, kept, range(len(kept)))
        flat = moved.reshape(*moved.shape[: len(kept)], -1)
        best = flat.argmax(-1)
        inner = np.unravel_index(best, moved.shape[len(kept) :])
        grid = np.indices(best.shape)
        order = kept + [axis for axis in range(len(axes)) if axis not in kept]
        places = np.empty((*best.shape, len(axes)), np.int64)
        for axis, numbers in zip(order, [*grid, *inner], strict=True):
            places[..., axis] = numbers
        chosen = difference[tuple(np.moveaxis(places, -1, 0))] if axes else difference
        if "t" in axes:
            places[..., axes.index("t")] += start
        return cls(np.asarray(chosen), places, axes)

    @classmethod
    def join(cls, parts: list[_Largest]) -> _Largest:
        """Parts that follow each other along the tokens."""
        if len(parts) == 1:
            return parts[0]
        places = np.concatenate([part.places for part in parts], parts[0].sizes.ndim - 1)
        return cls(np.concatenate([part.sizes for part in parts], -1), places, parts[0].axes)

    def judge(self, tap: str, bounds: Array) -> TapDifference:
        """The difference that is the largest share of its bound, which a token has one of."""
        bounds = np.broadcast_to(bounds, self.sizes.shape)
        worst = np.unravel_index(int(_shares(self.sizes, bounds).argmax()), self.sizes.shape)
        place = _spell(self.places[worst], self.axes)
        return TapDifference(tap, float(self.sizes[worst]), float(bounds[worst]), place)


def _shares(difference: Array, bounds: Array) -> Array:
    """Differences as shares of their bounds; infinite where they are beyond one that is 0 or no number."""
    beyond = ~(difference <= bounds)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(bounds > 0, difference / bounds, 0)
    # A difference that is not finite is worse than any; beyond a bound of 0, the larger is the worse.
    share = np.where(beyond & ~(bounds > 0), 1e300 * np.minimum(1, difference), share)
    return np.where(np.isnan(share) | np.isinf(difference), np.inf, share)


def _spell(place: Array, axes: str) -> str:
    words = [f"{AXES[axis]} {int(index)}" for axis, index in zip(axes, place, strict=True) if axis != "1"]
    return ", ".join(words) or "the value"


def _float64(values: Array) -> Array:
    return np.asarray(values, np.float64)


def _differences(
    base: Trace, others: Sequence[Trace], tap: str, padding: Array | None
) -> tuple[TokenSizes, list[tuple[_Largest, _Largest]]]:
    """The sizes of the base's tokens, and each other trace's differences from it: of all, and of all but padding."""
    axes = base.places[tap].axes
    sizes: list[TokenSizes] = []
    found: list[tuple[list[_Largest], list[_Largest]]] = [([], []) for _ in others]
    for tokens in slices_of(base, tap):
        wanted = _float64(base.read(tap, tokens))
        sizes.append(TokenSizes.of(wanted, axes))
        out = _at_padding(padding, tap, axes, tokens, wanted.shape)
        for (every, but), other in zip(found, others, strict=True):
            values, same = np.broadcast_arrays(_float64(other.read(tap, tokens)), wanted)
            every.append(_Largest.of(values, same, axes, tokens.start))
            if out is None:
                but.append(every[-1])
            else:
                but.append(_Largest.of(np.where(out, 0, values), np.where(out, 0, same), axes, tokens.start))
    return TokenSizes.join(sizes), [(_Largest.join(every), _Largest.join(but)) for every, but in found]


def _at_padding(padding: Array | None, tap: str, axes: str, tokens: slice, shape: tuple[int, ...]) -> Array | None:
    """The elements of some tokens of a tap that reach no token of the text: padding's, and scores of its keys."""
    if padding is None or "t" not in axes:
        return None
    rows = padding[:, tokens]
    out = rows.reshape([*rows.shape[:1], *(rows.shape[1] if axis == "t" else 1 for axis in axes[1:])])
    if tap.endswith(".scores"):
        out = out | padding[:, None, None, :]
    return np.broadcast_to(out[: shape[0]] if shape[0] == 1 else out, shape)


def _origin(trace: Trace, tap: str, weights: ReadWeight | None, tried: set[str]) -> Origin:
    """Whether a tap is what its operation gives on the recorded inputs, and which known mistake explains it if not.

    Args:
        trace: its trace.
        tap: its name.
        weights: reads the model's.
        tried: operations for whose error in an earlier block an explanation was tried; this one is added.
    """
    operation = OperationOf(trace, tap, weights)
    axes, padding = trace.places[tap].axes, _padding(trace)
    parts: list[tuple[float, TapDifference]] = []
    try:
        for tokens in slices_of(trace, tap):
            expected, found = operation.expect(tokens), _float64(trace.read(tap, tokens))
            out = _at_padding(padding, tap, axes, tokens, found.shape)
            parts.extend(_judge_part(tap, found, expected, axes, tokens.start, out))
    except Missing as missing:
        return Origin(trace.name, "cannot be told", needs=str(missing))
    # What is wrong at padding alone is said where all else is right.
    _, worst = max(parts, key=lambda part: (not part[1].holds and not part[1].padding, part[0]))
    if worst.holds:
        return Origin(trace.name, "came in", worst)
    inner = split_tap(tap)[1]
    like = None if inner in tried else find_signature(trace, tap, weights)
    if not worst.padding:  # a real error of this kind in a later block is still to be explained
        tried.add(inner)
    return Origin(trace.name, "born there", worst, looks_like=like)


def _judge_part(
    tap: str, found: Array, expected: Expected, axes: str, start: int, padding: Array | None
) -> Iterator[tuple[float, TapDifference]]:
    """The difference that is the largest share of its own element's bound, and the share: of tokens, and of padding.

    Args:
        tap: its name.
        found: as recorded.
        expected: as its operation gives it.
        axes: of the tap.
        start: the first token.
        padding: the elements that reach no token of the text; None is none.
    """
    found, value, bound = np.broadcast_arrays(found, _float64(expected.value), expected.bound)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found - value)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    # What is not finite in both came in with the inputs.
    difference = np.where(~np.isfinite(found) & ~np.isfinite(value), 0, difference)
    bound = np.where(np.isnan(bound), np.inf, bound)
    share = _shares(difference, bound)
    if padding is None:
        wheres = [(False, np.ones(share.shape, bool))]
    else:
        out = np.broadcast_to(padding, share.shape)
        wheres = [(False, ~out), (True, out)]
    for alone, among in wheres:
        if not among.any():
            continue
        of_these = np.where(among, share, -1)
        place = np.array(np.unravel_index(int(of_these.argmax()), share.shape), np.int64)
        at = tuple(place)
        own, limit, worst = float(difference[at]), float(bound[at]), float(share[at])
        if "t" in axes:
            place[axes.index("t")] += start
        yield worst, TapDifference(tap, own, limit, _spell(place, axes), alone and worst > 1)


def _pair(
    pairing: Pairing, sizes: dict[str, TokenSizes], found: dict[str, tuple[_Largest, _Largest]],
    origins: dict[str, dict[str, Origin]],
) -> PairDifferences:  # fmt: skip
    """The judgement on one trace against its base."""
    base, other = pairing.base, pairing.other
    config, keys = base.facts.config, base.sizes.get("s", 1)
    ours, theirs = (accumulate(sizes, config, rounding_of(trace), keys=keys) for trace in (base, other))
    taps = tuple(_judge(tap, ours[tap] + theirs[tap], *largest) for tap, largest in found.items())

    def of_pair(tap: str) -> tuple[Origin, ...]:
        return tuple(origins[tap][name] for name in (base.name, other.name) if name in origins[tap])

    def born(tap: str) -> list[TapDifference]:
        return [origin.own for origin in of_pair(tap) if origin.verdict == "born there" and origin.own is not None]

    beyond = [tap for tap in taps if not tap.holds or born(tap.tap)]
    first = min(beyond, key=lambda tap: all(own.padding for own in born(tap.tap)) and (tap.holds or tap.padding),
                default=None)  # fmt: skip
    order = [*origins]
    alone = next((origin for tap in pairing.left_out if tap in origins and born(tap) for origin in of_pair(tap)
                  if first is None or order.index(tap) < order.index(first.tap)), None)  # fmt: skip
    shown = () if first is None else of_pair(first.tap)
    pattern = None
    if first is not None and not any(origin.own is not None for origin in shown):
        pattern = find_pattern(base, other, first.tap, ours[first.tap] + theirs[first.tap])
    return PairDifferences(base.name, other.name, taps, first, shown, pairing.left_out, alone, pattern)


def _judge(tap: str, bounds: Array, every: _Largest, but_padding: _Largest) -> TapDifference:
    """The judgement on a tap, at a token that counts if one leaves its bound, at padding else."""
    found = but_padding.judge(tap, bounds)
    largest = every.judge(tap, bounds)
    return found if largest.holds or not found.holds else dataclasses.replace(largest, padding=True)


def _padding(*traces: Trace) -> Array | None:
    """The tokens (b, t) whose values reach neither another token nor the loss; None where no trace says.

    A mask leaves them out, and what follows them has no label that counts. A call with a cache has none.
    """
    mask, labels = (
        next((values for trace in traces if (values := trace.read_input(name)) is not None), None)
        for name in ("attention_mask", "labels")
    )
    if mask is None or mask.shape[1] != traces[0].sizes["t"]:
        return None
    padding: Array = mask == 0
    if labels is not None:
        padding[:, :-1] &= labels[:, 1:] == IGNORED_LABEL
    return padding


def _facts(config: GPTJConfig, base: Trace, others: Sequence[Trace]) -> Iterator[str]:
    """Facts that the traces do not share, a rotary table that is not its config's, a config that is not the judge's."""
    for trace in (base, *others):
        said, own = trace.facts.rotary_sha256, trace.facts.config
        if said is not None and said not in {rotary_sha256(own, dtype) for dtype in ("float32", "float64")}:
            yield f"{trace.name}: its rotary table is neither the float32 nor the float64 one of its config"
    for other in others:
        for name in _FACTS:
            ours, theirs = getattr(base.facts, name), getattr(other.facts, name)
            if ours is not None and theirs is not None and ours != theirs:
                yield f"{name} differs: {shown(ours)} in {base.name}, {shown(theirs)} in {other.name}"
    for trace in (base, *others):
        for name in MEANINGS:
            ours, theirs = getattr(config, name), getattr(trace.facts.config, name)
            if ours != theirs:
                yield f"config's {name} differs: {shown(theirs)} in {trace.name}, judged by {shown(ours)}"
