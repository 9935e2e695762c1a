"""`from_pretrained(..., mesh=..., strategy=...)` before any framework: is the model one that can be cut so?"""

from __future__ import annotations

from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import InputError, shown
from gptj.sharding import Placement, ReadPart, check_mesh, check_strategy


def place_model(cls: Any, config: GPTJConfig, mesh: Any, strategy: str | None, *, device_map: Any = None) -> Placement:
    """This process' part of a model of `config`, checked.

    Args:
        cls: the model's class, whose `_choose_placement` knows the framework's devices.
        mesh, strategy, device_map: as `from_pretrained` was given them.

    Raises:
        InputError: one of the two is missing, there is no such strategy or mesh, or the model cannot be cut so.
    """
    if strategy is None:
        raise InputError("a mesh without a strategy", where="strategy", expected="tp, fsdp, tp_fsdp or dp", found=None)
    if device_map is not None:
        hint = "Leave it out: a mesh of the framework's own names its devices"
        raise InputError("the mesh says where", where="device_map", found=shown(device_map), hint=hint)
    dropped = [name for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop") if getattr(config, name) > 0]
    if strategy == "tp_fsdp" and dropped:
        raise InputError(
            "processes that share a token would drop other elements of it",
            where=dropped[0],
            expected=0,
            found=getattr(config, dropped[0]),
            hint=f"Pass {dropped[0]}=0.0, or use fsdp",
        )
    placement: Placement = cls._choose_placement(mesh, check_strategy(strategy))
    check_mesh(config, placement.strategy, placement.mesh)
    return placement


def cut_model(
    cls: Any, config: GPTJConfig, read_part: ReadPart, *, strategy: str, mesh: Any = None, dtype: str = "float32"
) -> Any:
    """A model of which this process has its part, as `read_part` gives it: `from_pretrained` for any other format.

    Args:
        cls: a model's class, of any wing.
        config: the model's.
        read_part: reads a row's slices in `dtype`, as a reader of gptj_conversion does, and nothing else.
        strategy, mesh, dtype: as `from_pretrained` takes them.

    Raises:
        InputError: see `place_model`; and what `read_part` raises.
    """
    model = cls(config, param_dtype=dtype, _do_init=False)
    model._distribute(read_part, place_model(cls, config, mesh, strategy))
    return model
