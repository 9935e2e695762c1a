"""Gradients and greedy texts of traces compared: with each other, and gradients with the oracle's where given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import BASE_PREFIX
from gptj.errors import InputError, SchemaError
from gptj.parity.bounds import Rounding
from gptj.parity.trace import Trace

__all__ = [
    "GradientDifference",
    "TextDifference",
    "backward_rank",
    "compare_gradients",
    "compare_texts",
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
        """Of what it is a difference."""
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


# ---- texts


@dataclasses.dataclass(frozen=True)
class TextDifference:
    """One prompt's greedy continuation in two traces.

    Attributes:
        base, other: traces' names.
        prompt: its number.
        tokens: how many were added in both.
        first: the first new token that differs, None where all are the same.
        chosen: the two tokens there.
        margins: how far each one's largest logit is above its second there.
        bound: how far rounding may move a logit; None where a trace has no logits to tell it from.
        errors: how far the base's two largest logits lie from the other's for the same tokens, step by step, as
            long as the texts are the same; None at a step whose two tokens are others.
    """

    base: str
    other: str
    prompt: int
    tokens: int
    first: int | None
    chosen: tuple[int, int] | None
    margins: tuple[float, float] | None
    bound: float | None
    errors: tuple[float | None, ...]

    @property
    def tie(self) -> bool:
        """Whether rounding explains the first difference: both margins are within what it may move two logits."""
        if self.margins is None or self.bound is None:
            return False
        return all(margin <= 2 * self.bound for margin in self.margins)  # NaN is no tie

    @property
    def holds(self) -> bool:
        """Whether the texts are the same, or part where rounding may; no logit may be other than finite."""
        known = [*(error for error in self.errors if error is not None), *(self.margins or ())]
        return all(map(math.isfinite, known)) and (self.first is None or self.tie)

    def to_json(self) -> dict[str, Any]:
        """The shape of a finding."""
        a, b = self.margins or (None, None)
        return {"a": self.base, "b": self.other, "prompt": self.prompt, "tokens": self.tokens,
                "first_difference": self.first, "margin_a": a, "margin_b": b, "bound": self.bound, "tie": self.tie,
                "errors": list(self.errors)}  # fmt: skip

    def __str__(self) -> str:
        names = f"{self.other} and {self.base}"
        if self.first is None:
            return f"{names} write the same {self.tokens} tokens after prompt {self.prompt}"
        assert self.chosen is not None and self.margins is not None
        there = (f"{names} part at new token {self.first} of prompt {self.prompt}: {self.chosen[1]} (ahead by "
                 f"{self.margins[1]:.1e}) and {self.chosen[0]} (ahead by {self.margins[0]:.1e})")  # fmt: skip
        if self.bound is None:
            return f"{there}; whether that is a tie needs logits"
        tie = "a tie, which rounding explains" if self.tie else "no tie"
        return f"{there}: {tie}, where it moves a logit by up to {self.bound:.0e}"


def compare_texts(base: Trace, other: Trace, bound: float | None) -> Iterator[TextDifference]:
    """The greedy texts of two traces, prompt by prompt; nothing where one has none.

    Args:
        base, other: opened traces.
        bound: how far rounding may move a logit, of the two together.

    Raises:
        InputError: they continued other prompts.
    """
    if not base.extras.generated or not other.extras.generated:
        return
    ours, theirs = _texts(base), _texts(other)
    for name in ("prompt_ids", "prompt_mask"):
        if not np.array_equal(ours[name], theirs[name]):
            raise InputError("recorded with another value", file=other.file.path, where=f"generated.{name}",
                             expected=f"that of {base.name}")  # fmt: skip
    tokens = min(ours["token_ids"].shape[1], theirs["token_ids"].shape[1])
    for prompt in range(len(ours["token_ids"])):
        a, b = (texts["token_ids"][prompt, :tokens] for texts in (ours, theirs))
        apart = np.flatnonzero(a != b)
        first = int(apart[0]) if apart.size else None
        same = tokens if first is None else first + 1
        errors = tuple(_error(ours, theirs, prompt, step) for step in range(same))
        chosen, margins = None, None
        if first is not None:
            chosen = int(a[first]), int(b[first])
            margins = _margin(ours, prompt, first), _margin(theirs, prompt, first)
        yield TextDifference(base.name, other.name, prompt, tokens, first, chosen, margins, bound, errors)


def _texts(trace: Trace) -> dict[str, Array]:
    """The tensors of a trace's texts, without `generated.`.

    Raises:
        SchemaError: a value is none that a text has.
    """
    texts = {name: trace.file.read(tensor) for name, tensor in trace.extras.generated.items()}
    vocabulary = trace.facts.config.vocab_size - 1
    for name, most in {
        "prompt_ids": vocabulary,
        "prompt_mask": 1,
        "token_ids": vocabulary,
        "top_ids": vocabulary,
    }.items():
        texts[name] = values = texts[name].astype(np.int64)
        wrong = (values < 0) | (values > most)
        if wrong.any():
            raise SchemaError("a value that no text has", file=trace.file.path, where=f"generated.{name}",
                              expected=f"0 to {most}", found=int(values[wrong][0]))  # fmt: skip
    top = texts["top_logits"].astype(np.float64)
    if (top[..., 0] < top[..., 1]).any():
        raise SchemaError("not in their order", file=trace.file.path, where="generated.top_logits",
                          expected="the larger first")  # fmt: skip
    return texts


def _margin(texts: Mapping[str, Array], prompt: int, step: int) -> float:
    larger, smaller = texts["top_logits"][prompt, step].astype(np.float64)
    return float(larger - smaller)


def _error(ours: Mapping[str, Array], theirs: Mapping[str, Array], prompt: int, step: int) -> float | None:
    """The largest difference of the logits of the tokens that are among both's two largest."""
    logits = [dict(zip(texts["top_ids"][prompt, step].tolist(), texts["top_logits"][prompt, step].tolist(),
                       strict=True)) for texts in (ours, theirs)]  # fmt: skip
    both = logits[0].keys() & logits[1].keys()
    return max((abs(logits[0][token] - logits[1][token]) for token in both), default=None)
