"""Greedy texts of traces compared: the first token that differs, both margins, and whether rounding explains it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.errors import InputError, SchemaError
from gptj.parity.bounds import Rounding
from gptj.parity.oracle import Oracle, positions_of_mask
from gptj.parity.perturbed import Bounded, PerturbedPass
from gptj.parity.trace import Trace

__all__ = ["TextDifference", "bound_texts", "compare_texts", "logits_of_texts", "read_texts"]

Array = NDArray[Any]


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
    ours, theirs = read_texts(base), read_texts(other)
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


def read_texts(trace: Trace) -> dict[str, Array]:
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


def logits_of_texts(trace: Trace, oracle: Oracle, rounding: Rounding) -> Bounded:
    """The logits (p, n, v) of which a trace's tokens are the largest, and how far rounding may take them.

    Args:
        trace: with texts.
        oracle: on the weights.
        rounding: the arithmetic.
    """
    written = read_texts(trace)
    ids = np.concatenate([written["prompt_ids"], written["token_ids"]], 1)
    mask = np.concatenate([written["prompt_mask"], np.ones_like(written["token_ids"])], 1)
    found = PerturbedPass(oracle, rounding, ids, mask, positions_of_mask(mask)).of("logits")
    of_tokens = slice(written["prompt_ids"].shape[1] - 1, -1)
    return Bounded(found.value[:, of_tokens], found.bound[:, of_tokens])


def bound_texts(texts: Iterable[TextDifference], ours: Bounded, theirs: Bounded) -> Iterator[TextDifference]:
    """Texts with the bound of their own logits: at the first token that differs, else the largest of their tokens.

    Two traces' logits lie apart by as much as rounding takes each (`gptj.parity.perturbed`), and by what their weights'
    dtypes make of them.

    Args:
        texts: of two traces.
        ours, theirs: of `logits_of_texts`, both of the base's tokens, which are the other's up to the first that
            differs, each with one's weights and arithmetic.
    """
    bounds = ours.bound[..., 0] + theirs.bound[..., 0] + np.abs(ours.value - theirs.value).max(-1)
    for text in texts:
        of_text = bounds[text.prompt, : text.tokens]
        bound = float(of_text.max() if text.first is None else of_text[text.first])
        yield dataclasses.replace(text, bound=bound)
