"""The interface of every reader: a model's config, and its canonical tensors one at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import HEADS, Head, TensorSpec
from gptj.reading.buffers import ReusedBuffer

__all__ = ["TOKENIZER_SIGNS", "Context", "Facts", "Source", "describe_head"]

TOKENIZER_SIGNS = ("tokenizer.json", "vocab.json")
"""A folder that holds one of these files holds a tokenizer."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """The sizes and kinds of a checkpoint, from its headers alone.

    Attributes:
        path, format: where and what; `format` is the reader's name with the layout.
        step: the training step, where the format knows one.
        shards: how many pieces the weights are in: files, or the shards of a TPU checkpoint.
        layers, width, heads, rotary_width, positions, vocab: sizes; None where neither files nor config say.
        dtype: of the tensors, several joined by commas.
        tensors, parameters: how many, once converted.
        bytes: of the files that hold them.
        problems: what would keep it from being converted, or is worth knowing before.
    """

    path: str
    format: str
    step: int | None
    shards: int
    layers: int
    width: int
    heads: int | None
    rotary_width: int | None
    positions: int | None
    vocab: int
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The facts in this order, ready for JSON."""
        return {**dataclasses.asdict(self), "problems": list(self.problems)}


def describe_head(head: Head) -> list[str]:
    """The sentence on a head that is no language model's, if it is none."""
    return [] if head == "causal_lm" else [f"no language model's head: it is a {HEADS[head]}"]


@dataclasses.dataclass(frozen=True)
class Context:
    """The surroundings of a checkpoint's tensors and config.

    Attributes:
        beside: the folders in which its tokenizer and generation_config.json may lie, the nearest first.
        unread: files of its tokenizer that lie where they are not read from.
        assumed: the fields of its config that nothing in the checkpoint says: values of GPT-J-6B.
        oddities: sentences that a caller of `convert` is warned with.
        notes: these, what is left out of a conversion, and what was chosen without having been asked for.
        step: the training step; 0 where the format knows none.
    """

    beside: tuple[Path, ...]
    unread: tuple[Path, ...] = ()
    assumed: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    step: int = 0


class Source(Protocol):
    """An opened checkpoint of any format. No data is read until a tensor is asked for."""

    @property
    def path(self) -> Path:
        """The folder or file that it was opened from."""

    @property
    def format(self) -> str:
        """The format's name in plans and manifests."""

    @property
    def config(self) -> GPTJConfig | None:
        """The model's config; None where it is still needed from the caller."""

    @property
    def head(self) -> Head:
        """The head on top of the blocks."""

    @property
    def context(self) -> Context:
        """Its surroundings."""

    def dtype_of(self, name: str) -> str:
        """The dtype that a canonical tensor is stored in."""

    def read(
        self,
        row: TensorSpec,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        buffer: ReusedBuffer | None = None,
    ) -> NDArray[Any]:
        """A canonical tensor in its own dtype or in `dtype`.

        Its memory is its own; or, if a `buffer` is given, it may be the buffer's, which the next tensor will take.
        """

    def origin(self, name: str) -> str:
        """The making of a canonical tensor, in words."""

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The files that it is made of, by their path in the source."""

    def facts(self) -> Facts:
        """Its sizes and kinds."""
