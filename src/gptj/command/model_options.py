"""Options that say which model is opened and where it runs, spelt once for every command that computes with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from gptj.calls.prepared import DEVICES, DEVICES_CALLED, QUANTIZATIONS
from gptj.command.options import BackendChoice, DtypeChoice, Inside, Names, PathArgument, option, revision_option

__all__ = ["MODEL_OPTIONS", "adapter_option", "batch_size_option", "no_mmap_option", "place_options"]


def place_options(section: str) -> tuple[Callable[[Any], Any], ...]:
    """--backend and --device, under a heading."""
    return (
        option(section, "--backend", type=BackendChoice, help="Which framework. [default: GPTJ_BACKEND, or the only "
               "one]"),
        option(section, "--device", type=Names(DEVICES, called=DEVICES_CALLED), default="auto", show_default=True,
               help="Where it runs; auto is a GPU where the framework sees one."),
    )  # fmt: skip


MODEL_OPTIONS = (
    *place_options("Model"),
    option("Model", "--weights", type=Inside, metavar="FILE", help="Which weights file of DIR, where it holds "
           "several sets."),
    revision_option(section="Model"),
    option("Model", "--dtype", type=DtypeChoice, help="Of the parameters. [default: as stored]"),
    option("Model", "--quantize", type=Names(QUANTIZATIONS), help="Compute with weights of 8 or 4 bits, where the "
           "framework can."),
)  # fmt: skip
"""The options of every command that opens one model to compute with it."""

no_mmap_option = option("Model", "--no-mmap", is_flag=True, help="Read the weights files and do not map them: slower "
                        "to start, and they may change meanwhile.")  # fmt: skip
adapter_option = option("Model", "--adapter", type=PathArgument, metavar="DIR", help="A LoRA adapter's folder, to put "
                        "to work.")  # fmt: skip
batch_size_option = option("Model", "--batch-size", type=click.IntRange(min=1), metavar="N", help="Texts to read at "
                           "once. [default: 2,048 tokens' worth]")  # fmt: skip
