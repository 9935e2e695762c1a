"""The pairs of traces that are compared, by what they share, and the arithmetic of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from gptj.errors import InputError
from gptj.parity.bounds import Rounding
from gptj.parity.trace import Trace

__all__ = ["Pairing", "pair_others", "pair_up", "rounding_of", "unit_of"]


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Two traces that are compared.

    Attributes:
        base, other: the more exact one, and the other.
        shared: the names of what both have: taps, `grad.` or `step.` and a parameter, "generated".
        left_out: of what one of the two lacks.
    """

    base: Trace
    other: Trace
    shared: frozenset[str]
    left_out: tuple[str, ...]


def pair_up(traces: Sequence[Trace]) -> list[Pairing]:
    """Each trace with the most exact one; what that one lacks is compared among the others, in the same way.

    Raises:
        InputError: a trace has nothing in common with any other.
    """
    pairings: list[Pairing] = []
    among, done = [*traces], frozenset[str]()
    while len(among) > 1:
        base = min(among, key=unit_of)
        among = [trace for trace in among if trace is not base]
        ours = _contents(base)
        for other in among:
            theirs = _contents(other)
            shared = (ours.keys() & theirs.keys()) - done
            lacking = tuple(name for name in ours | theirs if name not in done and (name in ours) != (name in theirs))
            if shared:
                pairings.append(Pairing(base, other, frozenset(shared), lacking))
        done |= ours.keys()
    paired = {id(trace) for one in pairings for trace in (one.base, one.other)}
    if lone := [trace for trace in traces if id(trace) not in paired]:
        raise InputError("no tap in common", where=_names(lone), expected="what another trace has too")
    return pairings


def pair_others(traces: Sequence[Trace], paired: Sequence[Pairing]) -> Iterator[Pairing]:
    """Each two traces that were not paired, by the taps that both have."""
    known = {(id(one.base), id(one.other)) for one in paired}
    for pair in itertools.combinations(traces, 2):
        base, other = sorted(pair, key=unit_of)
        shared = base.places.keys() & other.places.keys()
        if shared and (id(base), id(other)) not in known:
            yield Pairing(base, other, frozenset(shared), ())


def _contents(trace: Trace) -> dict[str, None]:
    """The names of all that a trace holds, in the order of the computation."""
    extras = trace.extras
    learnt = (*(f"grad.{name}" for name in extras.gradients), *(f"step.{name}" for name in extras.steps))
    return dict.fromkeys((*trace.places, *learnt, *(["generated"] if extras.generated else [])))


def unit_of(trace: Trace) -> float:
    """The unit roundoff of what a trace computed in."""
    return rounding_of(trace).unit


def _names(traces: Sequence[Trace]) -> str:
    return ", ".join(trace.name for trace in traces)


def rounding_of(trace: Trace) -> Rounding:
    """The arithmetic of a trace, with that of its storage."""
    stored = {place.tensor.dtype for place in trace.places.values()} - {"bool"}
    rounding = Rounding.of(trace.facts.dtype, *sorted(stored))
    return rounding.quantized() if trace.facts.path == "int8" else rounding
