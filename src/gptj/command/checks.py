"""`gptj parity`, `init`, `doctor` and `demo`: the commands that show whether all is well, and on what to try it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gptj.backends import choose_backend
from gptj.command.folders import ForTwoFolders, compare_two_folders, two_folders_options
from gptj.command.one_folder import OneFolder
from gptj.command.options import (
    Command,
    DtypeChoice,
    ModelArgument,
    Names,
    PathArgument,
    WithSubcommands,
    adapter_option,
    backends_option,
    json_option,
    overwrite_option,
    require_different,
    revision_option,
    weights_option,
)
from gptj.command.printing import (
    open_console,
    print_facts,
    print_json,
)
from gptj.command.reports import Destinations, TakesJsonFile, report_options
from gptj.command.waiting import waiting
from gptj.config.dtypes import DTYPES_CALLED, PARAMETER_DTYPES

__all__ = ["demo", "doctor", "init", "parity"]


class ParityCommand(WithSubcommands, TakesJsonFile):
    """`gptj parity`, with commands of its own, and a --json that takes a file too."""


@click.command(
    cls=ParityCommand,
    modules={
        **dict.fromkeys(("record", "compare"), "gptj.command.traces"),
        **dict.fromkeys(("matrix", "ladder"), "gptj.command.invariance"),
        "report": "gptj.command.reports",
    },
    short_help="Compare the frameworks on a model, and with an oracle.",
    epilog="To record and to compare apart: gptj parity record --help, gptj parity compare --help; "
    "each backend's ways to one answer, and its precisions: gptj parity matrix --help, gptj parity ladder --help; "
    "to make reports of what was found: gptj parity report --help. "
    "A folder of one of these names is ./record, ./compare, ./matrix, ./ladder, ./report.",
)
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("other", type=ModelArgument, metavar="[DIR2]", required=False)
@backends_option
@click.option(
    "--dtype", "dtypes", type=Names(PARAMETER_DTYPES, called=DTYPES_CALLED, several=True), default="float32",
    show_default=True, callback=require_different, help="To compute in; with commas between, in each.",
)  # fmt: skip
@two_folders_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Of the prompts and sampled text. [default: 0]",
)
@weights_option
@revision_option()
@adapter_option
@click.option("--skip-manifest", is_flag=True, help="Do not first check the weights against manifest.json.")
@click.option("--matrix", "with_matrix", is_flag=True, help="Also all that gptj parity matrix finds.")
@click.option("--ladder", "with_ladder", is_flag=True, help="Also all that gptj parity ladder finds.")
@click.option("--sensitivity", is_flag=True, help="Also plant every known mistake, and say which would be caught.")
@click.option("--verbose", is_flag=True, help="Also print every measure.")
@report_options
def parity(
    directory: Path, other: Path | None, backends: tuple[str, ...] | None, dtypes: tuple[str, ...],
    asked: ForTwoFolders, seed: int | None, weights: str | None, adapter: Path | None, verbose: bool,
    destinations: Destinations, **one_folders: bool,
) -> None:  # fmt: skip
    """Run the model in DIR in each framework and compare: with the float64 oracle and with each other.

    The weights are first checked against the manifest.json in DIR, if there is one. Each framework runs in a process
    of its own. The exit status is 0 where all agree, 1 where any two are too far apart, and 2 where that could not be
    judged: DIR cannot be opened, or the weights are not those of the manifest.

    With DIR2, say how far its model lies from that in DIR, in each framework: 0 is equal within rounding, 1 differs.

    All on one page: gptj parity DIR --dtype float32,bfloat16 --matrix --ladder --html FILE
    """
    if other is not None:
        if len(dtypes) > 1:
            raise click.UsageError("Two folders are compared in one --dtype.")
        unused = {"--weights": weights, "--adapter": adapter, "--skip-manifest": one_folders["skip_manifest"],
                  "--sensitivity": one_folders["sensitivity"], "--matrix": one_folders["with_matrix"],
                  "--ladder": one_folders["with_ladder"]}  # fmt: skip
        compare_two_folders(directory, other, backends, asked=asked, dtype=dtypes[0], seed=seed, verbose=verbose,
                            destinations=destinations, unused=unused)  # fmt: skip
    asked.refuse()
    more = [name for name in ("matrix", "ladder") if one_folders[f"with_{name}"]]
    for option, value in {"--weights": weights, "--adapter": adapter}.items():
        if more and value is not None:
            raise click.UsageError(f"{option} is not for --{more[0]}, which takes the folder as it is.")
    run = OneFolder(directory, backends, seed, dtypes)
    reports = run.compare(weights=weights, adapter=adapter, check_manifest=not one_folders["skip_manifest"],
                          sensitivity=one_folders["sensitivity"])  # fmt: skip
    others = [run.find(name) for name in more]
    run.finish(reports, others, verbose=verbose, destinations=destinations)


@click.command(cls=Command, short_help="Write a folder of random weights that reveal mistakes.")
@click.argument("directory", type=PathArgument, metavar="DIR")
@click.option("--config", type=PathArgument, help="A config.json. [default: a tiny model with every size different]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of the random values."
)
@click.option("--dtype", type=DtypeChoice, default="float32", show_default=True, help="Of the tensors.")
@overwrite_option
def init(directory: Path, config: Path | None, seed: int, dtype: str, overwrite: bool) -> None:
    """Write DIR with random weights that reveal mistakes: no bias is zero, no scale is one."""
    from gptj.config import GPTJConfig
    from gptj.parity.revealing import revealing_config, revealing_fill
    from gptj.writing.checkpoint_writer import write_checkpoint

    model_config = revealing_config() if config is None else GPTJConfig.from_file(config)
    with waiting(f"writing {directory}"):
        write_checkpoint(directory, model_config, revealing_fill(seed), dtype=dtype, overwrite=overwrite)
    click.echo(f"{directory}: written")


@click.command(cls=Command, short_help="Say what is installed, and what changes results.")
@json_option
def doctor(as_json: bool) -> None:
    """Say which frameworks are installed, in which versions, and what in the environment changes results."""
    from gptj.command.doctor import examine

    report = examine()
    if as_json:
        print_json(report.as_dict())
    else:
        print_facts(report.lines())
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)


@click.command(cls=Command, short_help="Show the whole journey on a model that is shipped.")
@backends_option
@click.option("--keep", type=PathArgument, metavar="DIR", help="Leave the converted model of verse here.")
def demo(backends: tuple[str, ...] | None, keep: Path | None) -> None:
    """Show the whole journey on a TPU checkpoint that the package ships: convert, verify, write verse, compare."""
    from gptj.command.demo import run_demo

    names = None if backends is None else tuple(choose_backend(name) for name in backends)
    if not run_demo(names, open_console(), keep=keep):
        sys.exit(1)
