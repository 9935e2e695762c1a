"""Names of a forward pass' intermediate values, in the order in which they are computed: one list for all.

The wings, the float64 oracle and traces of other programs use these names. A block's stand behind `h.<number>.`, as its
parameters' names do: `h.3.q_rotated`. Axes: b batch, t query time, s key time, h head, d head width, m model width, f
feed-forward, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gptj.errors import InputError, did_you_mean, shown

__all__ = [
    "AFTER_BLOCKS",
    "BEFORE_BLOCKS",
    "HEAD_TAPS",
    "IN_BLOCK",
    "OVER_KEYS",
    "Tap",
    "TapCollector",
    "choose_taps",
    "list_taps",
    "split_tap",
]


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

OVER_KEYS = frozenset(tap.name for tap in IN_BLOCK if tap.axes.endswith("s"))
"""Those whose last axis is the keys."""

HEAD_TAPS = frozenset({"logits", "loss"})
"""Those of the language model's head, which a bare model and the other heads do not have."""


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


def choose_taps(names: str | Iterable[str] | None, layers: int, *, absent: Iterable[str] = ()) -> tuple[str, ...]:
    """The taps that `names` ask for, in the order of the computation.

    Args:
        names: names and patterns (`h.3.*`, `h.*.q_rotated`; * is anything), one or several; None means
            all that there are.
        layers: how many blocks the model has.
        absent: what this call does not compute. A pattern passes over it, a name is refused.

    Raises:
        InputError: a name that there is none of, or a pattern that fits nothing.

    >>> choose_taps(["ln_f", "h.*.q"], 2)
    ('h.0.q', 'h.1.q', 'ln_f')
    """
    absent = frozenset(absent)
    every = tuple(list_taps(layers))
    there = tuple(name for name in every if name not in absent)
    if names is None:
        return there
    chosen: set[str] = set()
    for pattern in (names,) if isinstance(names, str) else tuple(names):
        found = [name for name in there if _fits(name, pattern)] if isinstance(pattern, str) else []
        if not found:
            raise _no_such_tap(pattern, every, layers)
        chosen.update(found)
    return tuple(name for name in there if name in chosen)


def _fits(name: str, pattern: str) -> bool:
    """Whether the name is the pattern, in which each * stands for anything.

    By methods of strings alone, since torch.compile traces neither `fnmatch` nor `re`.
    """
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    *middle, last = others
    at = len(first)
    for part in middle:
        if (found := name.find(part, at)) < 0:
            return False
        at = found + len(part)
    return name.startswith(first) and name.endswith(last) and len(name) - len(last) >= at


def _no_such_tap(name: object, every: tuple[str, ...], layers: int) -> InputError:
    if name in every:
        hint = "loss needs labels, and only GPTJForCausalLM has logits and loss"
        return InputError("not computed in this call", where="names", found=shown(name), hint=hint)
    guess = did_you_mean(name, every) if isinstance(name, str) else None
    expected = f"names of gptj.taps.list_taps({layers}), or patterns such as h.0.*"
    return InputError("no such tap", where="names", expected=expected, found=shown(name), hint=guess)


class TapCollector:
    """The values that a forward pass hands over, of which it keeps those asked for.

    A wing's blocks are given one only where somebody asks; else they are given None, and do what they always do.

    Args:
        names: what to keep.
        prefix: stands before every name that is handed over, `h.3.` in a block.
        kept: where to keep them; blocks share the model's.
    """

    def __init__(self, names: Iterable[str], prefix: str = "", kept: dict[str, Any] | None = None) -> None:
        self.names, self.prefix = frozenset(names), prefix
        self.kept: dict[str, Any] = {} if kept is None else kept

    def in_block(self, number: int) -> TapCollector:
        """The same, for the values of one block."""
        return TapCollector(self.names, f"h.{number}.", self.kept)

    def asks(self, *names: str) -> bool:
        """Whether any of these is asked for."""
        return any(self.prefix + name in self.names for name in names)

    def __call__(self, **values: Any) -> None:
        """Keep what is asked for of these values, by their names."""
        for name, value in values.items():
            if self.prefix + name in self.names:
                self.kept[self.prefix + name] = value
