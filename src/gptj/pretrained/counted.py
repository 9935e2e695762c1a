"""Numbers and bytes of a model, counted once for all three wings by what each tells of its arrays."""

from __future__ import annotations

from typing import NamedTuple

from gptj.config.schema import BASE_PREFIX

__all__ = ["ArrayFacts", "is_embedding"]


class ArrayFacts(NamedTuple):
    """A parameter, or an array that a prepared model has in the place of some.

    Attributes:
        size: how many numbers.
        nbytes: of memory; 0 where it has no values yet.
        trainable: whether an optimizer would change it.
        embeds: whether it is wte's, to which a tied lm_head's weight belongs.
    """

    size: int
    nbytes: int
    trainable: bool
    embeds: bool = False


def is_embedding(name: str) -> bool:
    """Whether a row of the schema is wte's."""
    return name.removeprefix(BASE_PREFIX) == "wte.weight"
