"""`gptj parity report`, and the options of commands that write reports: --html, --junit, --markdown, --json FILE."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptj.command.options import Judging, PathArgument, apply_options, overwrite_option
from gptj.command.printing import print_json
from gptj.errors import WriteError

if TYPE_CHECKING:
    from gptj.parity.findings import Findings

__all__ = ["Destinations", "TakesJsonFile", "report", "report_options"]

STDOUT = "-"
_KINDS = {"html": "one page", "junit": "JUnit XML", "markdown": "Markdown for a job's summary"}


class TakesJsonFile(Judging):
    """A command whose --json takes a file too: `--json=FILE`, or `--json FILE` where FILE ends in .json.

    Without one --json prints, as it does in every command, and what follows it is an argument.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with --json's file behind an equals sign."""
        spelt: list[str] = []
        rest = [*args]
        while rest:
            word = rest.pop(0)
            if word == "--":
                spelt += [word, *rest]
                break
            if word == "--json":
                word = f"--json={rest.pop(0) if rest and rest[0].lower().endswith('.json') else STDOUT}"
            spelt.append(word)
        return super().parse_args(ctx, spelt)


class Destinations:
    """The files that reports are written into, and whether the result is printed as JSON.

    Args:
        files: each by its kind, None where none is asked for.
        as_json: whether to print JSON.
        overwrite: whether to replace what is there.

    Raises:
        click.UsageError: two reports would be one file, or there is none to overwrite.
        WriteError: something is there already, or its folder is not.
    """

    def __init__(self, files: Mapping[str, Path | None], *, as_json: bool, overwrite: bool) -> None:
        from gptj.parity.reports.output import require_free

        self.as_json = as_json
        self.files = {kind: path for kind, path in files.items() if path is not None}
        self.overwrite = overwrite
        if overwrite and not self.files:
            raise click.UsageError(f"--overwrite is for {', '.join(f'--{kind} FILE' for kind in files)}.")
        try:
            places = [path.absolute() for path in self.files.values()]
        except FileNotFoundError:
            hint = "Change to a folder that is there, or give a whole path"
            raise WriteError("the current folder, which the reports' paths begin in, is gone", hint=hint) from None
        if len({*places}) < len(places):
            twice = next(path for path in places if places.count(path) > 1)
            raise click.UsageError(f"Two reports would be one file: {twice}.")
        for path in self.files.values():
            require_free(path, overwrite=overwrite)

    def finish(self, gather: Callable[[], Findings], document: Callable[[], Any], show: Callable[[], object]) -> None:
        """Write the reports; then, whatever has become of them, print the result.

        Args:
            gather: gives the findings, and is called where a file is asked for.
            document: gives what is printed as JSON.
            show: prints the result otherwise.
        """
        try:
            if self.files:
                self.write(gather())
        finally:
            if self.as_json:
                print_json(document())
            else:
                show()

    def write(self, findings: Findings) -> None:
        """Write each report, and say so on stderr."""
        from gptj.parity.reports.output import write_report

        for kind, path in self.files.items():
            write_report(path, findings, kind=kind, overwrite=self.overwrite)
            click.echo(f"{path}: written", err=True)


def report_options(function: Any) -> Any:
    """--html, --junit, --markdown and --json [FILE], --overwrite: the command gets `destinations`."""
    names = {kind: click.option(f"--{kind}", type=PathArgument, metavar="FILE", help=f"Write {said}.")
             for kind, said in _KINDS.items()}  # fmt: skip
    json = click.option(
        "--json",
        type=PathArgument,
        metavar="[FILE]",
        help="Print the result as JSON; or write the findings into FILE, whose name ends in .json.",
    )

    @functools.wraps(function)
    def with_destinations(*arguments: Any, overwrite: bool, **options: Any) -> Any:
        files: dict[str, Path | None] = {kind: options.pop(kind) for kind in (*_KINDS, "json")}
        as_json = files["json"] == Path(STDOUT)
        if as_json:
            files["json"] = None
        destinations = Destinations(files, as_json=as_json, overwrite=overwrite)
        return function(*arguments, destinations=destinations, **options)

    decorate: Callable[[Any], Any] = apply_options([*names.values(), json, overwrite_option])
    return decorate(with_destinations)


@click.command(cls=TakesJsonFile, short_help="Print findings that were saved, and make reports of them.")
@click.argument("findings", type=PathArgument, metavar="FINDINGS.json")
@report_options
def report(findings: Path, destinations: Destinations) -> None:
    """Print findings that --json FILE saved, and make reports of them.

    No framework and no model is needed. The exit status is that of the comparison: 0 where it holds, 1 where it
    differs; 2 where FINDINGS.json cannot be read.
    """
    from gptj.parity.findings import Findings

    found = Findings.from_file(findings)
    destinations.write(found)
    if destinations.as_json:
        click.echo(found.to_json(), nl=False)
    else:
        from gptj.parity.reports.text import render_text

        click.echo(render_text(found, width=shutil.get_terminal_size().columns), nl=False)
    if not found.passed:
        sys.exit(1)
