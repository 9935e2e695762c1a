"""The parts of GPT-J's blocks in PyTorch that know no attention: activations and rotary positions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.config.rotary import rotary_table

GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
"""`F.gelu`'s `approximate=` argument for each activation."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: functools.partial(F.gelu, approximate=approximate) for name, approximate in GELUS.items()},
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class RotaryTable:
    """The sine and cosine of every position, looked up by position ids.

    Not a buffer: `.half()` and `.bfloat16()` must leave it in float32, so the owner places it (`GPTJModel._apply`).
    """

    def __init__(self, config: GPTJConfig) -> None:
        self.n_positions, self.width = config.n_positions, config.rotary_width
        self.sin = self.cos = torch.empty(0)
        self.place(torch.device("cpu"), torch.float32)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the table on `device`, in float64 for a float64 model and in float32 for any other."""
        precision = "float64" if dtype == torch.float64 else "float32"
        if (self.sin.device, self.sin.dtype) == (device, getattr(torch, precision)) and self.sin.numel():
            return
        sin, cos = rotary_table(self.n_positions, self.width, precision)
        self.sin, self.cos = torch.tensor(sin, device=device), torch.tensor(cos, device=device)

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sine and cosine of each position, (b, t, pairs)."""
        return self.sin[position_ids], self.cos[position_ids]


def rotate_pairs(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """`x` (b, h, t, d) with its first 2 * pairs dimensions rotated, pair by interleaved pair.

    (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x1 cos a + x0 sin a), in the table's precision.
    """
    width = 2 * sin.shape[-1]
    sin, cos = sin[:, None], cos[:, None]  # b 1 t pairs
    x0, x1 = x[..., :width].to(sin.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), x[..., width:]), dim=-1)
