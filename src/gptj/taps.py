"""Names of a forward pass' intermediate values, in the order in which they are computed: one list for all.

The wings, the float64 oracle and traces of other programs use these names. A block's stand behind `h.<number>.`, as its
parameters' names do: `h.3.q_rotated`. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["AFTER_BLOCKS", "BEFORE_BLOCKS", "IN_BLOCK", "Tap", "list_taps", "split_tap"]


class Tap(NamedTuple):
    """One intermediate value.

    Attributes:
        name: within the block where it is in one.
        axes: one letter an axis.
        meaning: in words.
    """

    name: str
    axes: str
    meaning: str


BEFORE_BLOCKS = (Tap("embedding", "btm", "the tokens' embeddings, which enter the first block"),)

IN_BLOCK = (
    Tap("ln_1", "btm", "the block's input after its layer norm"),
    Tap("q", "bhtd", "queries, before the rotation"),
    Tap("k", "bhtd", "keys of the new tokens, before the rotation"),
    Tap("v", "bhtd", "values of the new tokens"),
    Tap("q_rotated", "bhtd", "queries after the rotation"),
    Tap("k_rotated", "bhtd", "keys of the new tokens after the rotation"),
    Tap("scores", "bhts", "products of queries and keys over the square root of the head's width, before the mask"),
    Tap("visible", "b1ts", "whether a query may see a key: causal and padding"),
    Tap("weights", "bhts", "the softmax of the visible scores"),
    Tap("mixed", "btm", "the values mixed by the weights, heads side by side"),
    Tap("out_proj", "btm", "the attention's contribution to the sum"),
    Tap("fc_in", "btf", "the feed-forward's first product, with its bias"),
    Tap("activation", "btf", "after the activation function"),
    Tap("fc_out", "btm", "the feed-forward's contribution to the sum"),
    Tap("sum", "btm", "attention + feed-forward + the block's input: what leaves the block"),
)

AFTER_BLOCKS = (
    Tap("ln_f", "btm", "after the last layer norm"),
    Tap("logits", "btv", "the head's product, float32 at least"),
    Tap("loss", "", "where labels are given"),
)


def list_taps(layers: int) -> Iterator[str]:
    """Every tap's name of a model of so many blocks, in the order of the computation.

    >>> [name for name in list_taps(1)][:3]
    ['embedding', 'h.0.ln_1', 'h.0.q']
    """
    yield from (tap.name for tap in BEFORE_BLOCKS)
    for block in range(layers):
        yield from (f"h.{block}.{tap.name}" for tap in IN_BLOCK)
    yield from (tap.name for tap in AFTER_BLOCKS)


def split_tap(name: str) -> tuple[int | None, str]:
    """A tap's block, None outside of the blocks, and its name there.

    >>> split_tap("h.3.q_rotated"), split_tap("ln_f")
    ((3, 'q_rotated'), (None, 'ln_f'))
    """
    prefix, _, rest = name.partition(".")
    if prefix == "h" and "." in rest:
        number, _, inner = rest.partition(".")
        if number.isdecimal():
            return int(number), inner
    return None, name
