"""`from_pretrained(..., mesh=..., strategy=...)` before any framework: is the model one that can be cut so?"""

from __future__ import annotations

from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.sharding import Placement, check_mesh, check_strategy


def place_model(cls: Any, config: GPTJConfig, mesh: Any, strategy: str | None, *, inference: bool) -> Placement:
    """This process' part of a model of `config`, checked.

    Args:
        cls: the model's class, whose `_choose_placement` knows the framework's devices.
        mesh, strategy, inference: as `from_pretrained` was given them.

    Raises:
        InputError: one of the two is missing, there is no such strategy or mesh, or the model cannot be cut so.
    """
    if strategy is None:
        raise InputError("a mesh without a strategy", where="strategy", expected="tp, fsdp, tp_fsdp or dp", found=None)
    if inference:
        hint = "Leave inference=True out; tp is for inference already"
        raise InputError("a model on several devices cannot be prepared", where="inference", found=True, hint=hint)
    placement: Placement = cls._choose_placement(mesh, check_strategy(strategy))
    check_mesh(config, placement.strategy, placement.mesh)
    return placement
