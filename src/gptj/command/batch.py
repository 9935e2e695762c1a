"""`gptj batch`: many files of prompts, an output file each, a share of them in each of many processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gptj.command.generate import HOW_OPTIONS, GenerateOptions
from gptj.command.options import ModelArgument, PathArgument, Sections, apply_options, option
from gptj.errors import InputError, counted

__all__ = ["batch"]

_NOT_GIVEN = {
    "prompts": None, "token_ids": None, "stream": False, "interactive": False, "as_json": True,
    "strategy": None, "dp": None, "tp": None,
}  # fmt: skip
"""The options of `gptj generate` alone, as it has them where they are not given."""


class Share(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A share of the files: I/N, counted from 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            self.fail("I/N, with I from 1 to N, as in 3/8.", param, ctx)
        return int(found[1]), int(found[2])


@dataclasses.dataclass(frozen=True)
class Task:
    """A file of prompts, and the file that its texts go into."""

    source: Path
    target: Path

    def is_done(self) -> bool:
        """Whether its texts are there.

        Raises:
            InputError: something else is.
        """
        if os.path.lexists(self.target) and not self.target.is_file():
            raise InputError("in the way of an output", file=self.target, expected="a file, or nothing")
        return self.target.is_file()


@click.command(cls=Sections, short_help="Continue many files of prompts, a share of them here.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("output", type=PathArgument, metavar="OUT")
@click.argument("files", type=PathArgument, metavar="FILE...", nargs=-1, required=True)
@option("Prompts", "--shard", type=Share(), default="1/1", metavar="I/N", help="Every N-th file from the I-th on, "
        "by name. [default: all]")  # fmt: skip
@apply_options(HOW_OPTIONS)
def batch(directory: Path, output: Path, files: Sequence[Path], shard: tuple[int, int], **options: Any) -> None:
    """Continue the prompts of each FILE with the model in DIR, and write them into the folder OUT as JSON lines.

    A FILE has a prompt a line, or JSON lines, as for gptj generate. What is written is there whole or not at all, and a
    FILE whose output is there is passed over: start the same line again after a fault, or on another machine with
    another --shard. Each FILE draws with the seed, the seed + 1, and so on.
    """
    said = GenerateOptions.of({**options, **_NOT_GIVEN})
    if os.path.lexists(output) and not output.is_dir():
        raise InputError("not a folder", file=output, hint="The order is DIR OUT FILE...")
    tasks = list_tasks(files, output, *shard)
    waiting = [task for task in tasks if not task.is_done()]
    click.echo(f"{counted(len(tasks), 'file')}, {len(tasks) - len(waiting)} of them done before", err=True)
    if waiting:
        work_through(said, directory, waiting)


def list_tasks(files: Sequence[Path], output: Path, part: int, parts: int) -> list[Task]:
    """The share of the files, sorted by name, with where their texts go.

    Raises:
        InputError: two files would have one output.
    """
    targets: dict[Path, Path] = {}
    for source in sorted(files, key=os.fspath):
        target = output / f"{source.name.removesuffix('.jsonl').removesuffix('.txt')}.jsonl"
        if os.path.realpath(target) == os.path.realpath(source):
            raise InputError("would be its own output", file=source, hint="Give another OUT")
        if target in targets:
            raise InputError("would be written where another is", file=source, found=os.fspath(targets[target]))
        targets[target] = source
    return [Task(source, target) for target, source in [*targets.items()][part - 1 :: parts]]


def work_through(said: GenerateOptions, directory: Path, tasks: Sequence[Task]) -> None:
    """Read every file, load the model once, and write an output after the other.

    Raises:
        GPTJError: a file cannot be read, or a prompt is none: nothing has been computed then.
        WriteError: the folder cannot be made.
    """
    from gptj.command.continuation import batches, continue_batch
    from gptj.command.opened_model import OpenedModel
    from gptj.command.prompts import read_lines
    from gptj.writing.file_system import make_folder
    from gptj.writing.output_file import whole_file

    read = [read_lines(os.fspath(task.source)) for task in tasks]
    opened = OpenedModel(said.request(directory), needs_tokenizer=any(p.text is not None for one in read for p in one))
    jobs = [opened.jobs(prompts) for prompts in read]
    make_folder(tasks[0].target.parent)
    steps = sum(opened.tokens(one, said.batch_size) for one in jobs)
    with opened.at_work():
        model, assistant = opened.load(steps), opened.load_assistant(steps)
        for task, one in zip(tasks, jobs, strict=True):
            if task.is_done():
                click.echo(f"{task.target}: written by another process meanwhile", err=True)
                continue
            with whole_file(task.target) as write:
                for group in batches(one, said.batch_size):
                    for record in continue_batch(opened, model, assistant, group):
                        write(f"{json.dumps(record)}\n".encode())
            click.echo(f"{task.target}: written", err=True)
