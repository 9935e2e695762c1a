"""`gptj plan`: how much memory each device needs, per strategy, and the line that starts it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import click

from gptj.command.options import Command, DtypeChoice, PathArgument, json_option
from gptj.command.printing import open_console, print_json
from gptj.errors import InputError, counted
from gptj.paths import missing_folder

__all__ = ["plan"]

LEAST_BYTES = 2**20
"""Of a device's memory; a number without a unit, which means bytes, is almost surely meant in another."""


@click.command(cls=Command, short_help="Say what fits on how many devices.")
@click.argument("directory", type=PathArgument, metavar="DIR")
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True, help="How many there are.")
@click.option("--memory", default="16GiB", show_default=True, help="Of each device, as 16GiB or 80GB.")
@click.option("--training", is_flag=True, help="With gradients and AdamW's moments.")
@click.option("--batch", type=click.IntRange(1), help="Rows, of all devices together. [default: one a device]")
@click.option("--length", type=click.IntRange(1), help="Tokens a row. [default: n_positions]")
@click.option("--dtype", type=DtypeChoice, default="float32", show_default=True, help="Of weights, cache, activations.")
@click.option("--recompute", is_flag=True, help="In training, keep only what enters each block.")
@json_option
def plan(
    directory: Path, devices: int, memory: str, training: bool, batch: int | None, length: int | None, dtype: str,
    recompute: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print the memory that the model in DIR needs on each of N devices, for each strategy: arithmetic alone.

    DIR is a model's folder, a config.json, or a repository of the Hugging Face hub, whose config.json alone is fetched.
    """
    from gptj.config import CONFIG_FILE, GPTJConfig
    from gptj.paths.hub import HubPlace, is_repository_id
    from gptj.reading.folder import require_config
    from gptj.sharding.plan import Work, list_meshes, plan_memory
    from gptj.writing.shards import shard_bytes

    place = directory
    if not directory.exists():
        if not is_repository_id(directory):
            raise missing_folder(directory, "no such file or folder")
        place = HubPlace().locate(directory, patterns=(CONFIG_FILE,))
    if place.is_dir():
        require_config(place)
    elif place.name == CONFIG_FILE:
        directory = directory.parent
    config = GPTJConfig.from_file(place)
    meshes = [*list_meshes(devices, training=training)]
    work = Work(training, batch or devices, length or config.n_positions, dtype, recompute)
    work.check(config)
    room = shard_bytes(memory, where="--memory")
    if room < LEAST_BYTES:
        raise InputError("too little for a device", where="--memory", expected="such as 16GiB", found=memory)
    plans = [plan_memory(config, strategy, mesh, work) for strategy, mesh in meshes]
    if as_json:
        facts = [{**dataclasses.asdict(made), "total": made.total, "fits": made.fits(room)} for made in plans]
        print_json({"devices": devices, "memory": room, "work": dataclasses.asdict(work), "plans": facts})
        return
    _print_plans(plans, work, room, directory)


def _print_plans(plans: list[Any], work: Any, room: int, directory: Path) -> None:
    from rich.table import Table

    verb = "training" if work.training else "generating"
    console = open_console()
    rows = f"{counted(work.batch, 'row')} of {work.length} tokens"
    console.print(f"GiB of the fullest device, {verb}: {rows}, {work.dtype}")
    kinds = (
        ("weights", "gradients", "optimizer", "activations") if work.training else ("weights", "cache", "activations")
    )
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "dp", "tp", *kinds, "peak", ""):
        table.add_column(name, justify="left" if name in ("strategy", "") else "right")
    for made in plans:
        numbers = [f"{getattr(made, kind) / 2**30:.2f}" for kind in (*kinds, "total")]
        if made.problem is not None:
            numbers = ["-"] * len(numbers)
        verdict = "cannot be cut so" if made.problem else "fits" if made.fits(room) else "too large"
        table.add_row(made.strategy, str(made.mesh.dp), str(made.mesh.tp), *numbers, verdict)
    console.print(table)
    if work.training:
        console.print("Gradients come as activations go: the peak has the larger of both, and what passes beside it.")
    for made in plans:
        if made.problem is not None:
            console.print(f"{made.strategy} dp={made.mesh.dp} tp={made.mesh.tp}: {made.problem}", soft_wrap=True)
    fitting = [made for made in plans if made.fits(room)]
    if not fitting:
        console.print(f"Nothing fits in {room / 2**30:.4g} GiB: more devices, fewer rows, or a narrower dtype.")
        return
    best = min(fitting, key=lambda made: made.total)
    console.print(f"Start it: {_launch_line(best, directory, work)}", soft_wrap=True)


def _launch_line(made: Any, directory: Path, work: Any) -> str:
    """The command that starts one process a device on one host."""
    folder, mesh = shlex.quote(str(directory)), made.mesh
    start = "" if mesh.size == 1 else f"torchrun --nproc_per_node={mesh.size} "
    cut = "" if mesh.size == 1 else f" --backend pt --strategy {made.strategy} --dp {mesh.dp} --tp {mesh.tp}"
    if work.training and work.dtype != "float32":  # gptj finetune keeps float32 parameters, whatever it computes in
        placed = f'strategy="{made.strategy}", mesh=Mesh(dp={mesh.dp}, tp={mesh.tp}), ' if start else ""
        call = f'from_pretrained({json.dumps(str(directory))}, {placed}dtype="{work.dtype}")'
        loop = f"a loop of your own (docs/scale.md) over {call}"
        return f"{start or 'python '}LOOP.py, {loop}"
    if work.training:
        recompute = " --checkpoint-gradients" if work.recompute else ""
        verb = f"finetune {folder} DATA OUT{recompute}{cut} --batch {work.batch} --length {work.length}"
    else:  # as many rows as were planned for
        prompts = '"..."' if work.batch == 1 else f"--prompts FILE --batch-size {work.batch // mesh.dp}"
        verb = f"generate {folder} {prompts} --dtype {work.dtype}{cut}"
    return f"{start}-m gptj {verb}" if start else f"gptj {verb}"
