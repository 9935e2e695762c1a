"""Stored axes: how a trace's array lies in its file, told by letters, and how it is brought into its tap's order.

A layout is written as in einops: `b t (h d)` is an array of three axes whose last is heads times their widths. From
the letters follow the reshape and the transposition, so neither is ever said with numbers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from gptj.errors import InputError, shown

__all__ = ["Layout"]

_TOKEN = re.compile(r"\(([^()]*)\)|([^()\s])")
_LETTERS = frozenset("bthsdmfv1")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a stored array.

    Attributes:
        groups: of each stored axis, the letters of the axes that are merged in it, the outermost first.

    >>> Layout.parse("b t (h d)", of="bhtd").groups
    ('b', 't', 'hd')
    """

    groups: tuple[str, ...]

    @classmethod
    def parse(cls, text: object, *, of: str) -> Layout:
        """The layout that `text` spells, of a tap whose axes are `of`.

        Raises:
            InputError: it is not spelt as a layout, or has other axes than the tap. "1" may be left out or added.
        """
        if not isinstance(text, str) or _TOKEN.sub("", text).strip():
            raise InputError(
                "not a layout", where="axes", expected="letters and brackets, as in 'b t (h d)'", found=shown(text)
            )
        groups = tuple((a or b).replace(" ", "") for a, b in _TOKEN.findall(text))
        letters = "".join(groups)
        wanted = sorted(of.replace("1", ""))
        if "" in groups or not _LETTERS.issuperset(letters) or sorted(letters.replace("1", "")) != wanted:
            raise InputError(
                "not the axes of its tap", where="axes", expected=f"each of {', '.join(wanted)} once", found=shown(text)
            )
        return cls(groups)

    @property
    def letters(self) -> str:
        """All axes after the reshape, in the order in which they are stored."""
        return "".join(self.groups)

    def axis_of(self, letter: str) -> int | None:
        """The stored axis that is this letter alone, None where there is none."""
        return self.groups.index(letter) if letter in self.groups else None

    def arrange(self, values: NDArray[Any], axes: str, sizes: Mapping[str, int]) -> NDArray[Any]:
        """The stored array with a tap's `axes`, a view where one will do.

        Args:
            values: of one axis a group.
            axes: the tap's letters.
            sizes: of every letter.
        """
        letters = self.letters.replace("1", "")
        split = values.reshape([sizes[letter] for letter in letters])
        ordered = split.transpose([letters.index(letter) for letter in axes if letter != "1"])
        return ordered.reshape([1 if letter == "1" else sizes[letter] for letter in axes])

    def solve(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, int]:
        """Sizes of letters that follow from a stored shape and the sizes that are known.

        Raises:
            InputError: the shape has another number of axes, or an axis contradicts a known size.
        """
        if len(shape) != len(self.groups):
            raise InputError("of another number of axes", expected=self._shape(sizes), found=_shown_shape(shape))
        found: dict[str, int] = {}
        for group, size in zip(self.groups, shape, strict=True):
            known = {"1": 1, **sizes, **found}
            unknown = [letter for letter in group if letter not in known]
            product = math.prod(known[letter] for letter in group if letter in known)
            fits = size == product if not unknown else product > 0 and size % product == 0
            if not fits:
                raise InputError("of another shape", expected=self._shape(known), found=_shown_shape(shape))
            if len(unknown) == 1:
                found[unknown[0]] = size // product
        return found

    def _shape(self, sizes: Mapping[str, int]) -> str:
        groups = ("*".join(f"{sizes.get(letter, '?')}" for letter in group) for group in self.groups)
        letters = " ".join(group if len(group) == 1 else f"({' '.join(group)})" for group in self.groups)
        return f"{letters or 'no axis'} = [{', '.join(groups)}]"


def _shown_shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
