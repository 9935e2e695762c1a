"""`gptj parity A B`: how far one folder's model lies from another's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from gptj.command.options import PathArgument
from gptj.command.printing import print_json
from gptj.command.reports import Destinations
from gptj.command.waiting import waiting

__all__ = ["compare_two_folders", "refuse_for_one_folder", "two_folders_options"]

Function = TypeVar("Function", bound=Callable[..., Any])

WAYS = ("plain", "prepared", "int8", "compiled", "sdpa")


def two_folders_options(command: Function) -> Function:
    """The options that are for two folders alone."""
    prompts = click.option("--prompts", type=PathArgument, metavar="FILE", help="With DIR2: a prompt a line.")
    way = click.option("--path", "way", type=click.Choice(WAYS), help="With DIR2: how its model computes.")
    return way(prompts(command))


def refuse_for_one_folder(given: Mapping[str, Any]) -> None:
    """Refuse what only two folders have.

    Raises:
        click.UsageError: naming the option.
    """
    for option, value in given.items():
        if value is not None:
            raise click.UsageError(f"{option} is for two folders.")


def compare_two_folders(
    first: Path, second: Path, backends: Sequence[str] | None, *, dtype: str, way: str | None, prompts: Path | None,
    seed: int, verbose: bool, destinations: Destinations, as_json: bool, unused: Mapping[str, Any],
) -> NoReturn:  # fmt: skip
    """Print how far the second lies from the first, and end: 0 where all is equal within rounding, 1 where not.

    Raises:
        click.UsageError: an option of `unused` is given, which is for one folder.
        GPTJError: see `gptj.parity.two_folders.compare_folders`.
    """
    from gptj.command.traces import read_batch
    from gptj.parity.two_folders import compare_folders

    for option, value in unused.items():
        if value:
            raise click.UsageError(f"{option} is for one folder.")
    ids = None
    if prompts is not None:
        batch = read_batch(first, prompts)
        ids = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with waiting(f"comparing {first.name} and {second.name}"):
        found = compare_folders(first, second, backends, dtype=dtype, way=way or "plain", prompts=ids, seed=seed)
    equal = all(one.equal for one in found)
    folders = [str(first), str(second)]
    try:
        if destinations:
            from gptj.parity.gather import findings_of_folders

            destinations.write(findings_of_folders(found, *folders))
    finally:  # whatever becomes of the files
        if as_json:
            print_json({"equal": equal, "folders": folders, "backends": [one.as_dict() for one in found]})
        else:
            for one in found:
                for line in one.lines(every=verbose):
                    click.echo(line)
    sys.exit(0 if equal else 1)
