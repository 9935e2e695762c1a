"""A known mistake that explains a wrong tap, tried on the trace's own inputs; named where it does, never guessed.

A mistake explains a tap where, computed again as if it had been made, every value is within what rounding does to that
computation; and where the right computation is off by several times as much somewhere, so that the two can be told
apart. Mistakes without a number of their own come first (`gptj.parity.mutants`); only where none explains the tap are
those tried whose number is fitted to it (`gptj.parity.fitted`): a factor, an epsilon, positions, a bias. What none of
them explains, and is wrong in one row, token, head, channel or key alone, is called that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gptj.calls.taps import split_tap
from gptj.parity.explanation import Array, Slices, WrongTap
from gptj.parity.fitted import FITS, spell_place
from gptj.parity.mutants import mistakes_at
from gptj.parity.operations import ReadWeight
from gptj.parity.trace import Trace, slices_of

__all__ = ["find_signature"]

_MOST = 3
"""Mistakes that are named where several explain the tap alike."""


def find_signature(trace: Trace, tap: str, weights: ReadWeight | None, slices: Slices = slices_of) -> str | None:
    """The mistakes that explain a tap, "rotary sign" or "scale left at 1 or no norm"; None where none does.

    Args:
        trace: which holds the tap, and its operation's inputs.
        tap: that is not what its operation gives.
        weights: reads the model's; None leaves operations that need them unexplained.
        slices: of the tokens, some at a time.
    """
    inner = split_tap(tap)[1]
    every = WrongTap(trace, tap, weights, slices)
    among = [dataclasses.replace(every, among=tokens) for tokens in _padding_or_all(trace)]
    for wrong in among:
        known = [mistake.name for mistake in mistakes_at(inner) if wrong.explains(mistake.expect)]
        if known:
            return " or ".join(known[:_MOST]) + (" or others" if len(known) > _MOST else "")
        for fit in FITS:
            name = fit(wrong, inner)
            if name is not None:
                return name
    return next((name for wrong in among if (name := spell_place(wrong, inner)) is not None), None)


def _padding_or_all(trace: Trace) -> Iterator[Array | None]:
    """All tokens, and then those that are not padding, which may hold anything: (b, t) or None for all."""
    yield None
    mask = trace.read_input("attention_mask")
    if mask is not None and mask.shape[1] == trace.sizes["t"] and (mask == 0).any() and (mask == 1).any():
        yield mask == 1
