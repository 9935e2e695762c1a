"""`gptj adapter`: what there is to do with a LoRA adapter and no framework, and what `gptj inspect` says of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from gptj.command.options import (
    DEBUG_HELP,
    Command,
    DtypeChoice,
    ModelArgument,
    PathArgument,
    json_option,
    overwrite_option,
    revision_option,
    weights_option,
)
from gptj.command.printing import print_facts, print_json, spell, spell_size
from gptj.command.waiting import waiting

__all__ = ["adapter", "merge", "print_adapter"]


@click.group(short_help="Merge a LoRA adapter into its base.")
@click.option("--debug", is_flag=True, expose_value=False, help=DEBUG_HELP)
def adapter() -> None:
    """LoRA adapters, in the folders that PEFT and save_adapter write: adapter_config.json and its weights.

    gptj inspect ADAPTER says what one is; generate and parity take one with --adapter.
    """


@adapter.command(cls=Command, short_help="Write a model with an adapter merged into it.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("adapter_directory", type=PathArgument, metavar="ADAPTER")
@click.argument("output", type=PathArgument, metavar="OUT")
@click.option("--dtype", type=DtypeChoice, help="Of the tensors written. [default: as stored]")
@click.option(
    "--max-shard-gb", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, metavar="GB",
    help="Of a weights file.",
)  # fmt: skip
@weights_option
@revision_option()
@overwrite_option
@json_option
def merge(
    directory: Path, adapter_directory: Path, output: Path, dtype: str | None, max_shard_gb: float,
    weights: str | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write OUT: the model in DIR with the adapter in ADAPTER added to its matrices.

    A tensor at a time, each sum in float64 and rounded once to the dtype that is stored; no framework is needed. The
    tokenizer in DIR is carried along.
    """
    from gptj.adapters import merge_folder, read_adapter

    with waiting(f"merging {adapter_directory} into {directory}"):
        merge_folder(
            directory,
            adapter_directory,
            output,
            dtype=dtype,
            weights=weights,
            max_shard_bytes=max(1, int(max_shard_gb * 1e9)),
            overwrite=overwrite,
        )
    if as_json:
        print_json({"merged": str(output), "base": str(directory), "adapter": describe_adapter(adapter_directory)})
    else:
        config = read_adapter(adapter_directory).config
        click.echo(f"{output}: written, {directory} with the adapter of rank {config.r} merged into it")


def describe_adapter(directory: Path) -> dict[str, Any]:
    """The facts of an adapter's folder, from its config and its weights' header."""
    from gptj.adapters import read_adapter

    found = read_adapter(directory)
    config, tensors = found.config, [*found.stored.values()]
    modules = [re.fullmatch(r"h\.(\d{1,9})\.(\w+\.\w+)\.lora_[AB]\.weight", name) for name in found.stored]
    places = sorted({(int(module[1]), module[2]) for module in modules if module is not None})
    blocks, scales = sorted({n for n, _ in places}), sorted({config.scale(*place) for place in places})
    return {
        "format": "LoRA adapter, as PEFT writes it",
        "base": config.base_model_name_or_path,
        "task": config.task_type,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "scale": scales[0] if len(scales) == 1 else scales,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "matrices": sorted({target.split(".")[1] for _, target in places}),
        "blocks": blocks,
        "rank_pattern": dict(config.rank_pattern) or None,
        "alpha_pattern": dict(config.alpha_pattern) or None,
        "dtype": ", ".join(sorted({tensor.dtype for tensor in tensors})),
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }


def print_adapter(directory: Path, as_json: bool) -> None:
    """Print what the adapter in a folder is."""
    facts = describe_adapter(directory)
    if as_json:
        print_json(facts)
        return
    told = {key.replace("_", " "): spell(value) for key, value in facts.items() if value is not None}
    told["bytes"] = spell_size(facts["bytes"])
    print_facts(told)
