"""Tensors from process to process while PyTorch computes one model in several, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gptj.config.labels import IGNORED_LABEL


class Peers(NamedTuple):
    """The processes along `tp` that compute one model together.

    Attributes:
        group: torch's process group of them.
        rank: this process' number among them.
        size: how many.
    """

    group: Any
    rank: int
    size: int


class CopyToPeers(torch.autograd.Function):
    """The same values, used by every process in its own way: the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """The values themselves."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """The sum of every process' slopes."""
        return _sum(slopes[0].contiguous().clone(), ctx.group), None


class SumOfPeers(torch.autograd.Function):
    """The sum of every process' values: the gradient of each is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """The sum."""
        return _sum(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """The slope of the sum."""
        return slopes[0], None


class JoinedColumns(torch.autograd.Function):
    """Every process' columns, side by side; what is computed of them is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        """All columns."""
        ctx.peers, ctx.columns = peers, x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(peers.size)]
        dist.all_gather(parts, x.contiguous(), group=peers.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """The slope of this process' columns."""
        return slopes[0].narrow(-1, ctx.peers.rank * ctx.columns, ctx.columns), None


class LossOfColumns(torch.autograd.Function):
    """-log softmax(logits)[label] of each row, 0 where none counts, of logits whose columns processes share.

    Three numbers a row cross between them: the largest logit, then the sum of exponentials and the label's logit. The
    gradient crosses nowhere.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, peers: Peers) -> Tensor:
        """The loss of each row (n,)."""
        columns = logits.shape[1]
        counted, places = labels != IGNORED_LABEL, labels - peers.rank * columns
        held = counted & (places >= 0) & (places < columns)
        places = torch.where(held, places, 0)[:, None]
        peak = logits.amax(1)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=peers.group)
        shifted = logits - peak[:, None]
        own = torch.where(held, shifted.gather(1, places)[:, 0], 0)
        total, label = _sum(torch.stack((shifted.exp().sum(1), own)), peers.group)
        ctx.save_for_backward(logits, peak, total, places, held, counted)
        return torch.where(counted, total.log() - label, 0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        """softmax(logits) less one at the label, times each row's slope."""
        logits, peak, total, places, held, counted = ctx.saved_tensors
        slope = torch.where(counted, slopes[0], 0)
        gradient = (logits - peak[:, None]).exp_().mul_((slope / total)[:, None])
        return gradient.scatter_add_(1, places, torch.where(held, -slope, 0)[:, None]), None, None


def _sum(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x
