"""Methods of transformers' models that cannot be had here: each says why, and what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from gptj.errors import InputError

__all__ = ["Absent"]


def _absent(name: str, reason: str, hint: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise InputError(f"is not there: {reason}", where=name, hint=hint)

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {reason}. {hint}."
    return refuse


class Absent:
    """Methods that refuse."""

    push_to_hub = _absent(
        "push_to_hub", "nothing is uploaded from here", "save_pretrained(DIR), then: hf upload OWNER/NAME DIR"
    )
    parallelize = _absent(
        "parallelize", "a model is cut when it is opened", 'from_pretrained(DIR, mesh=..., strategy="tp")'
    )
    deparallelize = _absent("deparallelize", "a model is cut when it is opened", "from_pretrained(DIR)")
    prune_heads = _absent(
        "prune_heads", "a GPT-J's heads are all of one number", "generate and the forward pass take head_mask"
    )
    init_weights = _absent(
        "init_weights", "a model that is made has its start values", "initialise(seed=...) gives them again"
    )
    resize_position_embeddings = _absent(
        "resize_position_embeddings", "rotary positions have no weights", "from_pretrained(DIR, n_positions=N)"
    )
    get_position_embeddings = _absent(
        "get_position_embeddings", "rotary positions have no weights", "See config.n_positions and config.rotary_dim"
    )
    set_attn_implementation = _absent(
        "set_attn_implementation",
        "the choice of attention is made when a model is opened, in PyTorch",
        'from_pretrained(DIR, attn_implementation="sdpa")',
    )
    to_bettertransformer = _absent(
        "to_bettertransformer",
        "optimum is not used",
        'prepare_for_inference(), or in PyTorch attn_implementation="sdpa"',
    )
