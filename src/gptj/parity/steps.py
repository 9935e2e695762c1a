"""Steps of SGD and AdamW in float64, how far roundings may take a framework's from them, and traces' steps compared.

One step of SGD, from the gradient g. Two of AdamW, from g and from g / 4 (`SHARES`): the first step of AdamW is
g / |g|, whatever its betas, since the correction of zero moments takes them out again; the second step shows them.

AdamW's step is almost the sign of a gradient, so a gradient near zero that is off by little makes another step. Each
step is therefore judged from the gradient that the same trace holds: a wrong gradient is no wrong step. Two traces
differ in what is left when each is freed of the step that its own gradient makes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.parity.bounds import Rounding
from gptj.parity.extra_differences import ParameterDifference
from gptj.parity.trace import Trace

__all__ = [
    "BETAS",
    "DECAY",
    "EPSILON",
    "KINDS",
    "RATE",
    "SHARES",
    "StepDifference",
    "apply_steps",
    "compare_steps",
    "compare_steps_with_exact",
    "step_limit",
]

Array = NDArray[Any]

KINDS = {"sgd": "SGD", "adamw": "AdamW"}
"""The optimizers, as a trace names them and as people do."""

SHARES = {"sgd": (1.0,), "adamw": (1.0, 0.25)}
"""Of the gradient, for each step that is taken."""

RATE, BETAS, EPSILON, DECAY = 2**-10, (0.875, 0.96875), 2**-20, 2**-7
"""Of the steps. Powers of two and their sums, which every dtype here holds exactly: Keras keeps its rate in float32.
Keras adds epsilon before it corrects the second moment, so it is given epsilon times each step's correction's root."""

_ROWS = 2**20
"""Elements of a parameter that are read at a time."""


def apply_steps(parameter: Array, slope: Array, kind: str) -> Array:
    """A parameter after the steps in float64: of SGD, or of AdamW (arXiv:1711.05101, algorithm 2) from no moments."""
    parameter, slope = np.asarray(parameter, np.float64), np.asarray(slope, np.float64)
    if kind == "sgd":
        return parameter - RATE * slope
    for update in _updates(slope):
        parameter = parameter - RATE * (update + DECAY * parameter)
    return parameter


def _updates(slope: Array) -> Iterator[Array]:
    """The quotient of each step of AdamW, which the rate is the factor of."""
    first, second = np.zeros_like(slope), np.zeros_like(slope)
    for number, share in enumerate(SHARES["adamw"], 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * share * slope
        second = BETAS[1] * second + (1 - BETAS[1]) * (share * slope) ** 2
        root = np.sqrt(second / (1 - BETAS[1] ** number))
        yield first / (1 - BETAS[0] ** number) / (root + EPSILON)


def step_limit(parameter: Array, slope: Array, kind: str, rounding: Rounding) -> Array:
    """How far roundings may take a parameter after the steps.

    At each step the parameter is rounded thrice, by its decay's rate, its decay and the update; the update of SGD once.
    AdamW's is made of two moments, three roundings each and the square's, two corrections, a root, a sum, a quotient
    and the rate: 16 at most. A square that underflows leaves a root of up to the smallest number's, beside epsilon.
    """
    parameter, slope = np.abs(np.asarray(parameter, np.float64)), np.asarray(slope, np.float64)
    if kind == "sgd":
        limit: Array = rounding.unit * (3 * parameter + 12 * RATE * np.abs(slope)) + rounding.smallest
        return limit
    updates = np.sum([np.abs(update) for update in _updates(slope)], 0)
    lost = math.sqrt(rounding.smallest) / EPSILON
    counted = 3 * len(SHARES[kind]) * parameter + 16 * RATE * updates
    limit = rounding.unit * counted + RATE * updates * lost + rounding.smallest
    return limit


@dataclasses.dataclass(frozen=True)
class StepDifference(ParameterDifference):
    """One parameter after an optimizer's steps; the difference is absolute, where it is the largest share of its bound.

    Attributes:
        kind: of `KINDS`.
    """

    kind: str

    @property
    def what(self) -> str:
        """Of what it is a difference."""
        return f"step of {KINDS[self.kind]}"

    def __str__(self) -> str:
        return (
            f"{self.other}: {self.parameter} after a step of {KINDS[self.kind]} differs from {self.base}'s by "
            f"{self.difference:.1e}, of its own gradient, where rounding explains {self.bound:.0e}; {list(self.where)}"
        )


def compare_steps(
    base: Trace, other: Trace, names: Sequence[str], roundings: tuple[Rounding, Rounding]
) -> Iterator[StepDifference]:
    """The parameters after steps that both traces have, each without what its own gradient does to it.

    Args:
        base, other: opened traces, of one model.
        names: "sgd." or "adamw.", and the parameter.
        roundings: of each.
    """
    for name in names:
        kind, _, parameter = name.partition(".")

        def left(rows: slice, name: str = name, kind: str = kind, parameter: str = parameter) -> tuple[Array, Array]:
            values, limits = [], np.zeros(())
            for trace, rounding in zip((base, other), roundings, strict=True):
                after, slope = _read(trace, name, rows), _gradient(trace, parameter, rows)
                moved = apply_steps(np.zeros_like(slope), slope, kind)
                values.append(after - moved)
                limits = limits + step_limit(np.abs(after) + np.abs(moved), slope, kind, rounding)
            return values[1] - values[0], limits

        yield _worst((base.name, other.name), kind, parameter, base.extras.steps[name].shape, left)


def compare_steps_with_exact(
    trace: Trace, rounding: Rounding, weights: Callable[[str], Array]
) -> Iterator[StepDifference]:
    """The parameters after steps of a trace, against the definition, from the trace's own gradient.

    Args:
        trace: opened.
        rounding: its arithmetic.
        weights: reads a parameter as the trace's program had it.
    """
    read: Mapping[str, Array] = {}
    for name, tensor in trace.extras.steps.items():
        kind, _, parameter = name.partition(".")
        if parameter not in read:
            read = {parameter: weights(parameter)}

        def off(rows: slice, name: str = name, kind: str = kind, before: Array = read[parameter]) -> Any:
            slope = _gradient(trace, name.partition(".")[2], rows)
            wanted = apply_steps(before[rows], slope, kind)
            return _read(trace, name, rows) - wanted, step_limit(before[rows], slope, kind, rounding)

        yield _worst(("oracle", trace.name), kind, parameter, tensor.shape, off)


def _read(trace: Trace, name: str, rows: slice) -> Array:
    return trace.file.read_slice(trace.extras.steps[name], 0, rows.start, rows.stop).astype(np.float64)


def _gradient(trace: Trace, parameter: str, rows: slice) -> Array:
    return trace.file.read_slice(trace.extras.gradients[parameter], 0, rows.start, rows.stop).astype(np.float64)


def _worst(
    names: tuple[str, str], kind: str, parameter: str, shape: tuple[int, ...],
    off: Callable[[slice], tuple[Array, Array]],
) -> StepDifference:  # fmt: skip
    """The difference that is the largest share of its own element's bound, some rows at a time."""
    worst, found = -1.0, StepDifference(*names, parameter, 0.0, 0.0, (0,) * len(shape), kind)
    step = max(1, _ROWS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            difference, bound = off(slice(start, min(start + step, shape[0])))
            difference = np.where(np.isfinite(difference), np.abs(difference), np.inf)
            share = np.where(difference > 0, difference / bound, 0.0)
        share = np.where(np.isnan(share), np.inf, share)
        at = np.unravel_index(int(share.argmax()), share.shape)
        if share[at] > worst:
            worst, place = float(share[at]), (start + int(at[0]), *(int(n) for n in at[1:]))
            found = StepDifference(*names, parameter, float(difference[at]), float(bound[at]), place, kind)
    return found
