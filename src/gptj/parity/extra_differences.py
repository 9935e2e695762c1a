"""Gradients of traces compared: with each other, and with the oracle's where given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX
from gptj.parity.bounds import Rounding
from gptj.parity.trace import Trace

__all__ = [
    "GradientDifference",
    "backward_rank",
    "compare_gradients",
    "compare_with_exact",
    "gradient_share",
]

Array = NDArray[Any]

GRADIENT_SAFETY = 2.0
"""Times the estimated error of a gradient. Of 54 random models in three wings, one to eight blocks deep, in float32,
bfloat16 and float16, no parameter's took more than 0.34 of the estimate."""

MOST_OF_A_GRADIENT = 0.125
"""The largest share of a gradient that is ever put down to rounding: in wide and deep 16-bit models the estimate would
reach the gradient itself."""

_ROWS = 2**20
"""Elements of a gradient that are read at a time, of each."""


@dataclasses.dataclass(frozen=True)
class ParameterDifference:
    """A value that belongs to one parameter, in two traces.

    Attributes:
        base, other: whose: traces' names, or "oracle".
        parameter: its name.
        difference: the largest; infinity where a value is not finite.
        bound: how much of it rounding explains.
        where: the index.
    """

    base: str
    other: str
    parameter: str
    difference: float
    bound: float
    where: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Whether rounding explains it."""
        return math.isfinite(self.difference) and self.difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        found = self.difference if math.isfinite(self.difference) else None
        return {**dataclasses.asdict(self), "difference": found, "where": list(self.where), "holds": self.holds}


@dataclasses.dataclass(frozen=True)
class GradientDifference(ParameterDifference):
    """One parameter's gradient; the difference is a share of the largest gradient of the base.

    Attributes:
        looks_like: what explains all of a wrong one: "no gradient" or "a factor of 45"; None where neither does.
    """

    looks_like: str | None = None

    @property
    def what(self) -> str:
        """The quantity that differs, in a word."""
        return "gradient"

    def __str__(self) -> str:
        seems = "" if self.looks_like is None else f"; looks like: {self.looks_like}"
        return (
            f"{self.other}: the gradient of {self.parameter} differs from {self.base}'s by {self.difference:.1e} "
            f"of its largest, where rounding explains {self.bound:.0e}; {list(self.where)}{seems}"
        )


_BACKWARD = ("fc_out", "fc_in", "out_proj", "v_proj", "k_proj", "q_proj", "ln_1")


def backward_rank(parameter: str) -> tuple[int, int, int, str]:
    """The place of a parameter in the order in which gradients are computed: the head, the blocks from the last, wte.

    >>> sorted(["wte.weight", "h.0.ln_1.bias", "h.1.ln_1.bias", "lm_head.bias"], key=backward_rank)
    ['lm_head.bias', 'h.1.ln_1.bias', 'h.0.ln_1.bias', 'wte.weight']
    """
    name = parameter.removeprefix(BASE_PREFIX)
    if name.startswith("h."):
        _, block, *_, operation, _ = name.split(".")
        return 2, -int(block), _BACKWARD.index(operation), name
    outer = {"ln_f": 1, "wte": 3}.get(name.partition(".")[0], 0)
    return outer, 0, 0, name


def gradient_share(config: GPTJConfig, rounding: Rounding) -> float:
    """How much of a parameter's largest gradient rounding explains, estimated.

    Eight operations a block each way, and four at the ends, each off by its sum's share and three roundings; their
    errors are independent, so that they add up as squares do.
    """
    operations, longest = 4 + 16 * config.n_layer, max(config.n_embd, config.inner_width)
    share = GRADIENT_SAFETY * math.sqrt(operations) * (math.sqrt(longest) * rounding.summing + 3 * rounding.unit)
    return min(share, MOST_OF_A_GRADIENT)


def compare_gradients(
    base: Trace, other: Trace, names: Sequence[str], roundings: tuple[Rounding, Rounding]
) -> Iterator[GradientDifference]:
    """The gradients of some parameters that both traces have.

    Args:
        base, other: opened traces.
        names: of the parameters.
        roundings: of each.
    """
    share = sum(gradient_share(base.facts.config, rounding) for rounding in roundings)
    for name in names:
        reads = (_reader(base, name), _reader(other, name))
        yield _compare((base.name, other.name), name, base.extras.gradients[name].shape, reads, share)


def compare_with_exact(trace: Trace, rounding: Rounding, exact: Mapping[str, Array]) -> Iterator[GradientDifference]:
    """The gradients of a trace against the oracle's, which are float64, by parameter."""
    share = gradient_share(trace.facts.config, rounding)
    for name, tensor in trace.extras.gradients.items():
        reads = (exact[name].__getitem__, _reader(trace, name))
        yield _compare(("oracle", trace.name), name, tensor.shape, reads, share)


def _reader(trace: Trace, name: str) -> Callable[[slice], Array]:
    tensor = trace.extras.gradients[name]
    return lambda rows: trace.file.read_slice(tensor, 0, rows.start, rows.stop).astype(np.float64)


def _compare(
    names: tuple[str, str], parameter: str, shape: tuple[int, ...], reads: tuple[Any, Any], share: float
) -> GradientDifference:
    """Two gradients, some rows at a time."""
    largest, worst, place = 0.0, -1.0, (0,) * len(shape)
    for rows in _rows(shape):
        start = rows.start
        wanted, got = (read(rows) for read in reads)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(got - wanted)
        difference = np.where(np.isfinite(difference), difference, np.inf)
        largest = max(largest, float(np.abs(wanted).max()))
        at = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[at] > worst:
            worst, place = float(difference[at]), (start + int(at[0]), *(int(n) for n in at[1:]))
    relative = 0.0 if worst == 0 else worst / largest if largest > 0 and math.isfinite(largest) else math.inf
    like = None if relative <= share else _factor_of(shape, reads, share * largest)
    return GradientDifference(*names, parameter, relative, share, place, like)


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """All rows of a gradient, some at a time."""
    step = max(1, _ROWS // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _factor_of(shape: tuple[int, ...], reads: tuple[Any, Any], bound: float) -> str | None:
    """The multiple of the wanted gradient that explains the found one everywhere; None where none does.

    Args:
        shape, reads: of the wanted and the found one.
        bound: of the absolute difference that rounding explains.
    """
    both, own = 0.0, 0.0
    for rows in _rows(shape):
        wanted, got = (read(rows) for read in reads)
        both, own = both + float((wanted * got).sum()), own + float((wanted * wanted).sum())
    factor = both / own if own > 0 else math.nan
    if not math.isfinite(factor):
        return None
    allowed = bound * max(1.0, abs(factor))
    for rows in _rows(shape):
        wanted, got = (read(rows) for read in reads)
        if not (np.abs(got - factor * wanted) <= (allowed if factor else 0)).all():
            return None
    return "no gradient" if factor == 0 else f"a factor of {factor:.4g}"
