"""Folders that are no model's: what they are, by names alone, and where the weights are or how to get them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "describe_folder",
]


_MERGE = "Load it with PEFT over its base model, call merge_and_unload(), and save the model that this gives"
_ONE_WAY = "It is converted one way only: take the original model"

# A sign among the folder's names, what that makes of it, and what to do.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"adapter_config\.json|adapter_model\.(safetensors|bin)", "a PEFT (LoRA) adapter without its base model", _MERGE),
    (
        r"zero_pp_rank_.*|.*_optim_states\.pt|.*_model_states\.pt|zero_to_fp32\.py|global_step\d+",
        "a DeepSpeed checkpoint, whose weights lie in parts in {}",
        "Gather them: python zero_to_fp32.py DIR OUT, then convert OUT/pytorch_model.bin",
    ),
    (
        r".*\.distcp|\.metadata|pytorch_model_fsdp_\d+",
        "an FSDP (torch.distributed) checkpoint, whose weights lie in parts in {}",
        "Gather them: accelerate merge-weights DIR OUT",
    ),
    (
        r"mp_rank_\d+(_\d+)?|iter_\d{5,}|latest_checkpointed_iteration\.txt",
        "a Megatron checkpoint, whose weights lie in parts in {}",
        "Gather and convert them with the tools of the trainer that wrote it",
    ),
    (r".*\.gguf|.*ggml.*\.bin", "a GGUF (llama.cpp) model: {}", _ONE_WAY),
    (r".*\.onnx", "an ONNX model: {}", _ONE_WAY),
    (r"model\.bin", "a CTranslate2 model: {}", _ONE_WAY),
    (r"saved_model\.pb|.*\.keras", "a Keras model: {}", "Save it with transformers' save_pretrained"),
    (
        r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|checkpoint_\d+|.*\.orbax.*|ocdbt\..*",
        "an orbax or t5x checkpoint: {}",
        "Restore it there, and save the parameters with transformers' save_pretrained",
    ),
    (
        r"random_states_\d+\.pkl|optimizer\.(bin|pt)|scheduler\.(bin|pt)|trainer_state\.json|training_args\.bin",
        "a trainer's state without the model's weights: {}",
        "Give the folder that save_pretrained wrote, or save the model again",
    ),
    (r"checkpoint-\d+", "a trainer's output folder, whose checkpoints lie in {}", "Give one of them"),
    (r"snapshots|models--.+", "a folder of the hub's cache; the models lie in {}", "Give .../snapshots/REVISION"),
    (r".*\.(ckpt|pth?|safetensors|bin|h5|msgpack)", "a folder whose weights have another name: {}",
     "Choose the file: gptj convert {dir} OUT --weights {name}"),
)  # fmt: skip


def describe_folder(directory: Path) -> tuple[str, str] | None:
    """A name for a folder that holds no model's weights, and a hint; None where no sign of any kind is in it."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        return None
    for sign, kind, hint in _KINDS:
        matches: Callable[[str], re.Match[str] | None] = re.compile(sign).fullmatch
        found = next((name for name in names if matches(name)), None)
        if found is not None and not (sign == r"model\.bin" and "config.json" not in names):
            hint = hint.replace("DIR", str(directory)).replace("{dir}", str(directory)).replace("{name}", found)
            return kind.format(found), hint
    return None
