"""Memory of each device under each strategy: arithmetic over the schema and the blocks, no device is asked.

Counted is what PyTorch's engine holds at the fullest of a few moments, array by array: while a prompt is read; when the
backward pass begins, at its end, and while AdamW works on the largest tensor. What a framework's allocator holds back,
and the framework itself, is not counted. `benchmarks/plan.py` compares it with processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import schema
from gptj.errors import GPTJError, InputError, shown
from gptj.sharding.table import Mesh, Strategy, check_mesh, held_by_one

__all__ = ["MemoryPlan", "Work", "list_meshes", "plan_memory"]


_MOST_DEVICES, _MOST_ROWS = 2**20, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that memory is planned for.

    Attributes:
        training: whether gradients and AdamW's moments are kept.
        batch: rows, of all devices together.
        length: tokens a row.
        dtype: of parameters, cache and activations.
        recompute: in training, keep only what enters each block.
    """

    training: bool = False
    batch: int = 1
    length: int = 2048
    dtype: str = "float32"
    recompute: bool = False

    def check(self, config: GPTJConfig) -> None:
        """Refuse sizes that no call can have.

        Raises:
            InputError: naming the first.
        """
        for name, most, why in (("batch", _MOST_ROWS, ""), ("length", config.n_positions, " (n_positions)")):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise InputError("out of range", where=name, expected=f"1 to {most}{why}", found=shown(value))


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the fullest device.

    Attributes:
        strategy, mesh: how the model is cut.
        weights, gradients, optimizer, cache: bytes each.
        activations: at their most, with what is gathered for a moment.
        passing: what is there beside all gradients: at the end of the backward pass, or in AdamW's step.
        problem: why the model cannot be cut so; None where it can. All bytes are 0 then.
    """

    strategy: Strategy
    mesh: Mesh
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    passing: int = 0
    problem: str | None = None

    @property
    def total(self) -> int:
        """Bytes at the fullest moment: gradients come as activations go, so the larger of both counts."""
        return self.weights + self.optimizer + self.cache + max(self.gradients + self.passing, self.activations)

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes has room for it."""
        return self.problem is None and self.total <= memory


def list_meshes(devices: int, *, training: bool) -> Iterator[tuple[Strategy, Mesh]]:
    """Every strategy of that work with every mesh of so many devices that is worth a line."""
    if not 1 <= devices <= _MOST_DEVICES:
        raise InputError("out of range", where="devices", expected=f"1 to {_MOST_DEVICES}", found=shown(devices))
    if devices == 1:
        yield "dp", Mesh()
        return
    strategies: tuple[Strategy, ...] = ("dp", "fsdp", "tp_fsdp") if training else ("dp", "tp")
    for strategy in strategies:
        if strategy == "tp":
            yield from (("tp", Mesh(dp=devices // n, tp=n)) for n in range(2, devices + 1) if devices % n == 0)
        elif strategy == "tp_fsdp":
            pairs = ((devices // n, n) for n in range(2, devices) if devices % n == 0)
            yield from (("tp_fsdp", Mesh(dp=dp, tp=tp)) for dp, tp in pairs)
        else:
            yield strategy, Mesh(dp=devices)


def plan_memory(config: GPTJConfig, strategy: Strategy, mesh: Mesh, work: Work) -> MemoryPlan:
    """The memory of the fullest device, or why the model cannot be cut so."""
    try:
        check_mesh(config, strategy, mesh, batch=work.batch)
    except GPTJError as error:
        return MemoryPlan(strategy, mesh, problem=str(error))
    width = numpy_dtype(work.dtype).itemsize
    rows, held = schema(config), [held_by_one(row, strategy, mesh) for row in schema(config)]
    weights = sum(held) * width
    batch = work.batch // mesh.dp
    split = mesh.tp if strategy in ("tp", "tp_fsdp") else 1
    if not work.training:
        cache = 2 * config.n_layer * batch * config.n_head // split * work.length * config.head_dim * width
        return MemoryPlan(strategy, mesh, weights, 0, 0, cache, _moment_of_a_prompt(config, work, batch, split, width))
    gathered = _Gathered.of(config, strategy, mesh)
    passing = 2 * max(held)  # the root of the second moment, and that divided: of one tensor at a time
    if gathered.rest:
        in_blocks = sum(n for n, row in zip(held, rows, strict=True) if ".h." in row.name)
        passing = max(passing, in_blocks + 3 * gathered.rest - sum(held))
    head = config.vocab_size // split * config.n_embd  # its gradient is there first
    beginning = gathered.rest + 3 * gathered.block + (head if gathered.rest else 0)
    kept = _kept_in_training(config, work, batch, split, width) + beginning * width
    return MemoryPlan(strategy, mesh, weights, weights, 2 * weights, 0, kept, passing * width)


def _kept_by_a_block(config: GPTJConfig, length: int, rows: int, split: int, width: int) -> int:
    """Bytes that a block's gradient needs: its input and normed input; q, k, both rotated, v and what they mix to; the
    feed-forward before and after its activation; and the attention's softmax, before and after the mask, in float32.
    """
    tokens, heads = rows * length, config.n_head // split
    streams = tokens * (2 * config.n_embd + (6 * config.n_embd + 2 * config.inner_width) // split)
    return streams * width + 2 * rows * heads * length * length * max(4, width)


def _kept_in_training(config: GPTJConfig, work: Work, rows: int, split: int, width: int) -> int:
    """Bytes at the top of a step, when the backward pass begins: every block's, and the logits with their gradient."""
    block = _kept_by_a_block(config, work.length, rows, split, width)
    entering = rows * work.length * config.n_embd * width
    blocks = config.n_layer * entering + block if work.recompute else config.n_layer * block
    return blocks + 2 * rows * work.length * config.vocab_size * max(4, width)


def _moment_of_a_prompt(config: GPTJConfig, work: Work, rows: int, split: int, width: int) -> int:
    """The most bytes that one block holds while a prompt of the whole length is read, and the last logits."""
    tokens, heads = rows * work.length, config.n_head // split
    stream = 2 * tokens * config.n_embd * width
    attention = 5 * tokens * config.n_embd // split * width + 3 * rows * heads * work.length**2 * max(4, width)
    feed_forward = 2 * tokens * config.inner_width // split * width
    return stream + max(attention, feed_forward) + rows * config.vocab_size * max(4, width)


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """Numbers that FSDP gathers: a block's, for its turn, and what is no block's, for the whole pass.

    At a pass' end there are of the latter the numbers, their gradients, and these once more on their way.
    """

    block: int
    rest: int

    @classmethod
    def of(cls, config: GPTJConfig, strategy: Strategy, mesh: Mesh) -> _Gathered:
        if mesh.dp == 1 or strategy not in ("fsdp", "tp_fsdp"):
            return cls(0, 0)
        along_tp: Strategy = "tp" if strategy == "tp_fsdp" else "dp"
        sizes = {row.name: held_by_one(row, along_tp, mesh) for row in schema(config)}
        block = sum(size for name, size in sizes.items() if ".h.0." in name)
        return cls(block, sum(size for name, size in sizes.items() if ".h." not in name))
