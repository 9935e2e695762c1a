"""The findings of a comparison of traces: each tap's difference, where it was born, and the words for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from gptj.calls.taps import split_tap
from gptj.parity.extra_differences import GradientDifference, backward_rank
from gptj.parity.steps import StepDifference
from gptj.parity.text_differences import TextDifference

__all__ = ["Comparison", "Origin", "PairDifferences", "TapDifference", "spell_tap", "spell_taps"]

Verdict = Literal["born there", "came in", "cannot be told"]


@dataclasses.dataclass(frozen=True)
class TapDifference:
    """One tap's difference, at the place where it is the largest share of its bound.

    Attributes:
        tap: the full name.
        difference: absolute; infinity where a value is not finite.
        bound: how much of it rounding explains.
        where: row, head, token, channel, as far as the tap has them.
        padding: whether it holds at every token but those of padding, whose values reach no other token.
    """

    tap: str
    difference: float
    bound: float
    where: str
    padding: bool = False

    @property
    def holds(self) -> bool:
        """Whether rounding explains it; what is not finite it never does, whatever the bound."""
        return math.isfinite(self.difference) and self.difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them; what is not finite is null."""
        numbers = {"difference": _finite(self.difference), "bound": _finite(self.bound)}
        return {"tap": self.tap, **numbers, "where": self.where, "padding": self.padding, "holds": self.holds}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whether a tap of one trace is what its operation gives on the recorded inputs.

    Attributes:
        trace: its name.
        verdict: "born there" where it is not, "came in" where it is.
        own: the tap's difference from its operation in float64; None where that cannot be told.
        needs: the input that the trace does not hold, where it cannot be told.
        looks_like: the known mistakes that explain it, where it was born there; None where none does.
    """

    trace: str
    verdict: Verdict
    own: TapDifference | None = None
    needs: str | None = None
    looks_like: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        own = None if self.own is None else self.own.as_dict()
        return {
            "trace": self.trace, "verdict": self.verdict, "own": own, "needs": self.needs,
            "looks_like": self.looks_like,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PairDifferences:
    """One trace against the base.

    Attributes:
        base, other: the traces' names.
        taps: that both have, in the order of the computation.
        first: that leaves its bound, or is not what its operation gives in one of the two; None where there is none.
            One that does so at padding alone is only where no other does.
        origins: of `first`, in the base and in the other.
        left_out: what one of the two has and the other lacks: taps, gradients (`grad.` and the parameter), "generated".
        alone: a tap before `first` that one of the two has alone, and that is not what its operation gives.
        pattern: what the difference in `first` looks like, where it cannot be told in which of the two it was born.
    """

    base: str
    other: str
    taps: tuple[TapDifference, ...]
    first: TapDifference | None
    origins: tuple[Origin, ...]
    left_out: tuple[str, ...] = ()
    alone: Origin | None = None
    pattern: str | None = None

    @property
    def headline(self) -> str:
        """The result in a sentence."""
        if self.alone is not None:
            return self._headline_of_alone(self.alone)
        if not self.taps:
            return f"{self.other} and {self.base} have no tap in common, and are held together by gradients or texts"
        if self.first is None:
            return f"{self.other} agrees with {self.base}: all {len(self.taps)} taps within what rounding explains"
        first, born = self.first, [origin for origin in self.origins if origin.verdict == "born there"]
        start = f"{self.other} first differs from {self.base} in {spell_tap(first.tap)}"
        size = f"{first.difference:.1e} where rounding explains {first.bound:.0e}; {first.where}"
        if first.padding:
            size = f"{size}, at padding alone"
        if [origin.trace for origin in born] == [self.other]:
            return f"{start}: born there, {_own(born[0])}"
        if born:
            return f"{start}: born there, {' and '.join(f'in {origin.trace}, {_own(origin)}' for origin in born)}"
        if all(origin.verdict == "came in" for origin in self.origins):
            return f"{start}: it came in with that operation's inputs; {size}"
        seems = "" if self.pattern is None else f"; looks like: {self.pattern}"
        needs = ", ".join(sorted({origin.needs for origin in self.origins if origin.needs is not None}))
        if needs == "weights":  # no tap before it differs, its inputs' neither
            return f"{start}: born there, in one of the two, whose inputs agree; {size}. The weights tell which{seems}"
        return f"{start}: {size}. Whether it was born there needs {needs}{seems}"

    def _headline_of_alone(self, alone: Origin) -> str:
        """The same where what is wrong first stands in one of the two alone."""
        assert alone.own is not None
        lacking = self.base if alone.trace == self.other else self.other
        said = f"{spell_tap(alone.own.tap)}, which {lacking} does not hold: born there, {_own(alone)}"
        if self.first is None:
            return f"{alone.trace} agrees with {lacking} in all {len(self.taps)} taps that both hold, but not in {said}"
        return f"{alone.trace} is wrong in {said}; first seen in {spell_tap(self.first.tap)}, {_size(self.first)}"

    @property
    def right(self) -> bool:
        """Whether rounding explains every difference, and what each computed of its own inputs."""
        return self.first is None and self.alone is None

    @property
    def looks_like(self) -> str | None:
        """The known mistakes that explain what is wrong first; None where none does, or it was not born there."""
        if self.alone is not None:
            return self.alone.looks_like
        return next((origin.looks_like for origin in self.origins if origin.looks_like is not None), self.pattern)

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        return {
            "base": self.base,
            "other": self.other,
            "headline": self.headline,
            "looks_like": self.looks_like,
            "first": None if self.first is None else self.first.as_dict(),
            "origins": [origin.as_dict() for origin in self.origins],
            "alone": None if self.alone is None else self.alone.as_dict(),
            "left_out": list(self.left_out),
            "taps": [tap.as_dict() for tap in self.taps],
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Some traces compared.

    Attributes:
        pairs: each trace but the most exact against that one; and by what that one lacks, the others likewise.
        born: of each trace, by name, every tap that is not what its operation gives.
        facts: what differs between the traces' facts, in words.
        looks_like: of each trace, by name, the known mistakes that explain a tap: of each operation the first block's
            that is wrong.
        gradients: of every parameter that two traces have, and against the oracle's where the weights are given.
        steps: of every parameter, after an optimizer's steps, in the same way.
        between: each two of the other traces, where these were asked for.
        texts: each prompt's greedy continuation, of each trace but the base against the base.
        untold: of each trace, by name, every tap that could not be computed again, and the input that was not there.
    """

    pairs: tuple[PairDifferences, ...]
    born: dict[str, tuple[TapDifference, ...]]
    facts: tuple[str, ...]
    looks_like: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    gradients: tuple[GradientDifference, ...] = ()
    texts: tuple[TextDifference, ...] = ()
    untold: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    steps: tuple[StepDifference, ...] = ()
    between: tuple[PairDifferences, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """The taps that some pair did not compare, since one of its two lacks them."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name in pair.left_out))

    @property
    def passed(self) -> bool:
        """Whether rounding explains every difference, and every tap that was computed again."""
        learnt = all(one.holds for one in self.gradients) and all(one.holds for one in self.steps)
        extras = learnt and all(one.holds for one in self.texts)
        return extras and all(pair.right for pair in (*self.pairs, *self.between)) and not any(self.born.values())

    def lines(self, *, every: bool = False) -> Iterator[str]:
        """The report: headlines, errors that were born, what was left out; with `every`, each tap."""
        for pair in self.pairs:
            yield pair.headline
        for trace, taps in self.born.items():
            for own in taps if every else taps[:3]:
                like = self.looks_like.get(trace, {}).get(own.tap)
                seems = "" if like is None else f"; looks like: {like}"
                yield f"{trace}: {spell_tap(own.tap)} is not what its inputs give: {_size(own)}{seems}"
            if len(taps) > 3 and not every:
                yield f"{trace}: and {len(taps) - 3} taps more"
        yield from self._lines_of_extras(every=every)
        yield from self.facts
        yield from self.notes()
        if every:
            for pair in self.pairs:
                yield from (f"{pair.other}  {tap.tap}  {_size(tap)}" for tap in pair.taps)

    def notes(self) -> Iterator[str]:
        """The taps not compared, and those not computed again, by name and with the reason."""
        for pair in self.pairs:
            if pair.left_out:
                yield f"{pair.base} and {pair.other}: not in both, and not compared: {spell_taps(pair.left_out)}"
        for trace, taps in self.untold.items():
            for needs in dict.fromkeys(taps.values()):
                names = spell_taps([tap for tap in taps if taps[tap] == needs])
                yield f"{trace}: not computed again, for want of {needs}: {names}"

    def _lines_of_extras(self, *, every: bool) -> Iterator[str]:
        """The gradients, the wrong ones as they are computed, from the head back, and the texts."""
        worst = sorted(self.gradients, key=lambda one: -one.difference / one.bound)
        beyond = sorted((one for one in self.gradients if not one.holds), key=lambda one: backward_rank(one.parameter))
        yield from map(str, worst if every else beyond[:3])
        if len(beyond) > 3 and not every:
            yield f"and {len(beyond) - 3} gradients more"
        if self.gradients and not beyond:
            yield f"all {len(self.gradients)} gradients within what rounding explains"
        wrong = [one for one in self.steps if not one.holds]
        yield from map(str, self.steps if every else wrong[:3])
        if len(wrong) > 3 and not every:
            yield f"and {len(wrong) - 3} steps more"
        if self.steps and not wrong:
            yield f"all {len(self.steps)} steps of optimizers within what rounding explains"
        yield from (str(text) for text in self.texts if every or text.first is not None)
        if self.texts and all(text.first is None for text in self.texts):
            yield f"all {len(self.texts)} greedy texts the same"

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        return {
            "passed": self.passed,
            "pairs": [pair.as_dict() for pair in (*self.pairs, *self.between)],
            "born": {trace: [tap.as_dict() for tap in taps] for trace, taps in self.born.items()},
            "looks_like": self.looks_like,
            "left_out": list(self.left_out),
            "untold": self.untold,
            "facts": list(self.facts),
            "gradients": [one.as_dict() for one in self.gradients],
            "steps": [one.as_dict() for one in self.steps],
            "texts": [one.to_json() for one in self.texts],
        }


def spell_tap(tap: str) -> str:
    """A tap in words.

    >>> spell_tap("h.3.q_rotated"), spell_tap("ln_f")
    ('block 3, rotated q', 'ln_f')
    """
    block, inner = split_tap(tap)
    name = f"rotated {inner[0]}" if inner in ("q_rotated", "k_rotated") else inner
    return name if block is None else f"block {block}, {name}"


def spell_taps(taps: Iterable[str]) -> str:
    """Names of taps, those of blocks that follow each other as a range; of gradients and texts as they are.

    >>> spell_taps(["embedding", "h.0.q", "h.0.k", "h.1.q", "h.2.q"])
    'embedding, h.0.q to h.2.q, h.0.k'
    """
    spelt: list[str] = []
    runs: dict[str, list[int]] = {}  # by inner name, the first and last block of the run, and where it is spelt
    for tap in taps:
        block, inner = (None, tap) if tap.startswith(("grad.", "step.", "generated")) else split_tap(tap)
        run = runs.get(inner)
        if block is not None and run is not None and block == run[1] + 1:
            run[1] = block
            spelt[run[2]] = f"h.{run[0]}.{inner} to {tap}"
            continue
        if block is not None:
            runs[inner] = [block, block, len(spelt)]
        spelt.append(tap)
    return ", ".join(spelt)


def _size(tap: TapDifference) -> str:
    return f"{tap.difference:.1e} where rounding explains {tap.bound:.0e}; {tap.where}"


def _own(origin: Origin) -> str:
    assert origin.own is not None
    return _size(origin.own) + ("" if origin.looks_like is None else f"; looks like: {origin.looks_like}")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
