"""The look of a difference between two traces, where no inputs tell in which it was born: from the pair alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.parity.explanation import APART
from gptj.parity.spread import Spread
from gptj.parity.trace import Trace, slices_of

__all__ = ["find_pattern"]

Array = NDArray[Any]


def find_pattern(base: Trace, other: Trace, tap: str, bounds: Array) -> str | None:
    """Keys of a cache that moved by a slot; or the row, token, head, channel or key that is wrong alone, in words.

    Args:
        base, other: two traces, which differ in the tap and in none before it.
        tap: its name.
        bounds: of the difference at each token, (b, t) or ().
    """
    axes, t = base.places[tap].axes, base.sizes.get("t", 1)
    keys = base.sizes["s"] - t if axes.endswith("s") else 0
    moved = dict.fromkeys(("cached keys one slot late", "cached keys one slot early"), keys > 2)
    spread, far = Spread(axes, np.broadcast_shapes(base.shape(tap), other.shape(tap))), 0.0
    for tokens in slices_of(base, tap):
        wanted, found = np.broadcast_arrays(*(np.asarray(x.read(tap, tokens), np.float64) for x in (base, other)))
        bound = _at(bounds, axes, tokens, wanted.shape)
        with np.errstate(invalid="ignore"):
            off = np.abs(found - wanted)
            spread.add(~(off <= bound), tokens.indices(t)[0])
            far = max(far, float(np.nan_to_num(off / np.maximum(bound, np.finfo(np.float64).tiny)).max()))
            for name, ours, theirs in zip(moved, (slice(0, -1), slice(1, None)), (slice(1, None), slice(0, -1)),
                                          strict=True):  # fmt: skip
                a, b, room = wanted[..., :keys][..., ours], found[..., :keys][..., theirs], bound[..., :keys][..., 1:]
                same = np.abs(a - b) <= room
                moved[name] = moved[name] and bool(same.all())
    if far < APART:
        return None
    mask = base.read_input("attention_mask")
    return next((name for name, holds in moved.items() if holds), spread.spell(mask))


def _at(bounds: Array, axes: str, tokens: slice, shape: tuple[int, ...]) -> Array:
    """The bounds of some tokens, of the tap's shape."""
    if bounds.ndim == 0:
        return np.broadcast_to(bounds, shape)
    of_rows = iter(bounds[:, tokens].shape)
    sizes = [next(of_rows) if axis in "bt" else 1 for axis in axes]
    return np.broadcast_to(bounds[:, tokens].reshape(sizes), shape)
