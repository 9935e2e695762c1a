"""`save_pretrained` before any framework: its options, and what lies beside the weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import InputError, SchemaError, shown
from gptj.generation.config import GENERATION_CONFIG_FILE
from gptj.generation.mixin import Generates
from gptj.sharding import ReadTogether
from gptj.writing.checkpoint_writer import write_checkpoint
from gptj.writing.shards import shard_bytes


def write_model(
    model: Any, directory: str | os.PathLike[str], read: Callable[[TensorSpec], NDArray[Any]], **options: Any
) -> Path:
    """Write a model's folder; of processes that hold parts of it the first writes, and the others read along.

    Args:
        model: whose.
        directory: the folder.
        read: a row's values; where the model is cut, every process must be asked for the same rows in one order.
        options: of `write_checkpoint`.
    """
    together = ReadTogether(schema(model.config, model.head), read)
    try:
        if model.placement is not None and any(model.placement.coordinates.values()):
            return Path(directory)
        return write_checkpoint(
            directory,
            model.config,
            together,
            head=model.head,
            beside_others=True,
            extra_files=side_files(model),
            **options,
        )
    finally:
        if model.placement is not None:
            together.finish()


def side_files(model: Any) -> dict[str, bytes]:
    """Files of `save_pretrained` besides config and weights: generation_config.json, where the model makes text."""
    if not isinstance(model, Generates):
        return {}
    settled = model.generation_config
    if model.derives_generation_config and (settled.pad_token_id or 0) >= model.config.vocab_size:
        settled = settled.replace(pad_token_id=None)  # it would be left out when it is read
    return {GENERATION_CONFIG_FILE: settled.to_json().encode()}


def saving_options(max_shard_bytes: int | str, others: Mapping[str, Any]) -> int:
    """The most bytes of a weights file that `save_pretrained` was asked for.

    Args:
        max_shard_bytes: in bytes or as "5GB".
        others: transformers' max_shard_size, the same; and what is so anyway: safe_serialization=True,
            push_to_hub=False, variant=None, and save_function, since weights are written by one door.

    Raises:
        InputError: another option, or a value that cannot be had.
    """
    size = others.get("max_shard_size")
    for name, value in others.items():
        if name not in _SAVING_OPTIONS:
            raise InputError("no such argument", where=shown(name), hint=_suggest(name))
        so_anyway, hint = _SAVING_OPTIONS[name]
        if so_anyway is not None and value is not None and value not in so_anyway:
            expected = repr(next(iter(so_anyway), None))
            raise InputError("not supported", where=name, expected=expected, found=shown(value), hint=hint)
    return shard_bytes(max_shard_bytes if size is None else size)


_SAVING_OPTIONS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "max_shard_size": (None, ""),
    "safe_serialization": ((True,), "Write safetensors, then: gptj convert DIR OUT --to bin"),
    "push_to_hub": ((False,), "Save, then: hf upload OWNER/NAME DIR"),
    "token": ((), "Save, then: hf upload OWNER/NAME DIR"),
    "variant": ((), "Save, then rename the file to model.VARIANT.safetensors"),
    "save_peft_format": ((True, False), ""),
    "save_original_format": ((True, False), ""),
    "save_config": ((True,), "The folder always has its config.json"),
    "save_function": (None, ""),
}


def _suggest(name: str) -> str | None:
    known = (*_SAVING_OPTIONS, "max_shard_bytes", "overwrite", "is_main_process", "state_dict")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else None


def check_rows(config: GPTJConfig, head: Head, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that lack a row of the schema, or have one of another shape.

    Raises:
        SchemaError: naming the first.
    """
    for row in schema(config, head):
        if shapes.get(row.name) != row.shape:
            raise SchemaError(
                "not this model's", where=f"state_dict: {row.name}", expected=row.shape, found=shapes.get(row.name)
            )
