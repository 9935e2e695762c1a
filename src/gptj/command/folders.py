"""`gptj parity A B`: how far one folder's model lies from another's."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from gptj.command.options import Names, PathArgument
from gptj.command.reports import Destinations
from gptj.command.waiting import waiting

__all__ = ["ForTwoFolders", "compare_two_folders", "two_folders_options"]

WAYS = ("plain", "prepared", "int8", "compiled", "sdpa")


@dataclasses.dataclass(frozen=True)
class ForTwoFolders:
    """Options that are for two folders alone.

    Attributes:
        way: how the second's model computes, `--path`; None is plainly.
        prompts: a file of them.
    """

    way: str | None
    prompts: Path | None

    def refuse(self) -> None:
        """Refuse them where there is one folder.

        Raises:
            click.UsageError: naming the option.
        """
        for option, value in {"--path": self.way, "--prompts": self.prompts}.items():
            if value is not None:
                raise click.UsageError(f"{option} is for two folders.")


def two_folders_options(function: Any) -> Any:
    """--path and --prompts: the command gets `asked`, a `ForTwoFolders`."""

    @functools.wraps(function)
    def with_asked(*arguments: Any, way: str | None, prompts: Path | None, **options: Any) -> Any:
        return function(*arguments, asked=ForTwoFolders(way, prompts), **options)

    file = click.option("--prompts", type=PathArgument, metavar="FILE", help="With DIR2: a prompt a line.")
    path = click.option("--path", "way", type=Names(WAYS), help="With DIR2: how its model computes.")
    return path(file(with_asked))


def compare_two_folders(
    first: Path, second: Path, backends: Sequence[str] | None, *, asked: ForTwoFolders, dtype: str, seed: int | None,
    verbose: bool, destinations: Destinations, unused: Mapping[str, Any],
) -> NoReturn:  # fmt: skip
    """Print how far the second lies from the first, and end: 0 where all is equal within rounding, 1 where not.

    Raises:
        click.UsageError: an option of `unused` is given, which is for one folder, or a seed beside prompts.
        GPTJError: see `gptj.parity.two_folders.compare_folders`.
    """
    from gptj.command.traces import read_batch, refuse_seed
    from gptj.parity.gather import findings_of_folders
    from gptj.parity.two_folders import compare_folders

    for option, value in unused.items():
        if value:
            raise click.UsageError(f"{option} is for one folder.")
    refuse_seed(seed, asked.prompts)
    ids = None
    if asked.prompts is not None:
        batch = read_batch(first, asked.prompts)
        ids = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with waiting(f"comparing {first.name} and {second.name}") as say:
        found = compare_folders(first, second, backends, dtype=dtype, way=asked.way or "plain", prompts=ids, seed=seed,
                                progress=say)  # fmt: skip
    equal = all(one.equal for one in found)
    folders = [str(first), str(second)]

    def document() -> dict[str, Any]:
        return {"equal": equal, "folders": folders, "backends": [one.as_dict() for one in found]}

    def show() -> None:
        for one in found:
            for line in one.lines(every=verbose):
                click.echo(line)

    destinations.finish(lambda: findings_of_folders(found, *folders), document, show)
    sys.exit(0 if equal else 1)
