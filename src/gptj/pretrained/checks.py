"""Refusals of what a model of any wing cannot be told: another build's config, odd embeddings, odd sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptj.config import BUILT_IN, GPTJConfig
from gptj.config.schema import Head
from gptj.errors import ConfigError, InputError, shown


def check_same_build(old: GPTJConfig, new: GPTJConfig, head: Head) -> None:
    """Refuse a config in which a field differs that the model was built by.

    Raises:
        ConfigError: naming the first such field, with both values.
    """
    for field in BUILT_IN:
        before, after = getattr(old, field), getattr(new, field)
        if before != after and (field != "num_labels" or head == "sequence_classification"):
            raise ConfigError(
                "of another model",
                where=f"model.config: {field}",
                expected=repr(before),
                found=shown(after),
                hint="Make a model of that config, or open the folder with from_pretrained(folder, "
                f"{field}={shown(after)})",
            )


def check_recomputation(options: Mapping[str, Any] | None) -> None:
    """Refuse options of gradient checkpointing other than the one that is so anyway.

    Raises:
        InputError: another option.
    """
    for name, value in (options or {}).items():
        if (name, value) != ("use_reentrant", False) and value is not None:
            raise InputError(
                "not supported: blocks are recomputed without reentering autograd",
                where=f"gradient_checkpointing_kwargs: {shown(name)}",
                expected="use_reentrant=False, or nothing",
                found=shown(value),
            )


def check_output_embeddings(config: GPTJConfig, head: Head, class_name: str, shape: tuple[int, ...]) -> None:
    """Refuse an lm_head's weight for a class without one, or of another shape than (v, m).

    Raises:
        InputError: saying which.
    """
    if head != "causal_lm":
        raise InputError("has no lm_head", where=class_name, hint="Use GPTJForCausalLM")
    expected = (config.vocab_size, config.n_embd)
    if shape != expected:
        hint = "Use resize_token_embeddings to change the vocabulary's size"
        raise InputError("of another shape", where="embeddings", expected=expected, found=shape, hint=hint)


def new_vocabulary(
    config: GPTJConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> int | None:
    """The vocab_size that `resize_token_embeddings` was asked for, rounded up; None where it stays.

    Raises:
        InputError: a multiple below 1, or rows that start from the others' mean.
    """
    if mean_resizing:
        hint = "Leave it out: new rows have the start values of the seed"
        raise InputError("not supported", where="mean_resizing", expected=False, found=mean_resizing, hint=hint)
    if pad_to_multiple_of is None:
        return new_num_tokens
    multiple = pad_to_multiple_of
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise InputError("not a multiple", where="pad_to_multiple_of", expected="1 or above", found=shown(multiple))
    size = config.vocab_size if new_num_tokens is None else new_num_tokens
    return -(-size // multiple) * multiple
