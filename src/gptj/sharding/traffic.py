"""Bytes that cross between devices under each strategy: arithmetic over the schema, as `plan` is for memory.

Counted is what PyTorch's engine hands to its collectives in a pass, whole tensors: what an all-reduce sums, what an
all-gather makes and what a reduce-scatter takes. XLA makes the same sums along tp of a model in Flax. Sent is what a
ring makes of them, which no schedule undercuts: (n - 1) / n of the bytes, and twice that for an all-reduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import schema
from gptj.sharding.plan import Work
from gptj.sharding.table import Mesh, MeshAxis, Strategy, held_by_one

__all__ = ["Collective", "Kind", "list_collectives", "sent_bytes"]

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one pass.

    Attributes:
        kind, axis: what it does, and among the devices along which axis.
        count: how many times a device takes part.
        nbytes: of the whole tensors, all times together.
    """

    kind: Kind
    axis: MeshAxis
    count: int
    nbytes: int

    def sent(self, mesh: Mesh) -> float:
        """Bytes that one device sends for it around a ring."""
        devices = mesh.along((self.axis,))
        return (2 if self.kind == "all-reduce" else 1) * (devices - 1) / devices * self.nbytes


def sent_bytes(config: GPTJConfig, strategy: Strategy, mesh: Mesh, work: Work) -> float:
    """Bytes that one device sends in a pass."""
    return sum(one.sent(mesh) for one in list_collectives(config, strategy, mesh, work))


def list_collectives(config: GPTJConfig, strategy: Strategy, mesh: Mesh, work: Work) -> Iterator[Collective]:
    """The collectives of a pass over a batch: forward, and in training back.

    A forward pass is one over whole rows with the logits of each token; a decoded token is one of length 1.
    """
    width = numpy_dtype(work.dtype).itemsize
    tokens = work.batch // mesh.dp * work.length
    if mesh.tp > 1 and strategy in ("tp", "tp_fsdp"):
        yield from _along_tp(config, tokens, width, work)
    if mesh.dp == 1 or not work.training:
        return
    along_tp: Strategy = "tp" if strategy == "tp_fsdp" else "dp"
    sizes = {row.name: held_by_one(row, along_tp, mesh) for row in schema(config)}
    whole = sum(sizes.values()) * width
    if strategy == "dp":
        yield Collective("all-reduce", "dp", len(sizes), whole)  # gradients
        return
    blocks = sum(size for name, size in sizes.items() if ".h." in name) * width
    # Each block's weights are let go of after its turn and gathered again on the way back; the rest stays.
    yield Collective("all-gather", "dp", 2 * config.n_layer + 1, whole + blocks)
    yield Collective("reduce-scatter", "dp", config.n_layer + 1, whole)


def _along_tp(config: GPTJConfig, tokens: int, width: int, work: Work) -> Iterator[Collective]:
    stream = tokens * config.n_embd * width
    sums = config.n_layer + 1  # no more where blocks are computed again: nobody needs a block's sum then
    yield Collective("all-reduce", "tp", sums, sums * stream)  # each block's sum, and the embedding's
    if not work.training:
        yield Collective("all-gather", "tp", 1, tokens * config.vocab_size * width)  # logits
    else:
        yield Collective("all-reduce", "tp", 2, 3 * tokens * max(4, width))  # the loss: three numbers a token
        yield Collective("all-reduce", "tp", sums, sums * stream)  # each block's gradient, and the head's
