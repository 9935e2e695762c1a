"""`gptj parity matrix` and `gptj parity ladder`: each backend's ways to one answer, and its precisions."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptj.backends import choose_backend, installed_backends
from gptj.command.options import ModelArgument, Names, PathArgument, backends_option, revision_option
from gptj.command.reports import Destinations, TakesJsonFile, report_options
from gptj.command.waiting import waiting
from gptj.config.dtypes import DTYPES_CALLED

if TYPE_CHECKING:
    from gptj.parity.findings import Findings
    from gptj.parity.trace_record import Batch

__all__ = ["find_ladder", "find_matrix", "ladder", "matrix"]

SeedOption = click.IntRange(0, 2**63 - 1)


@click.command(cls=TakesJsonFile, short_help="Hold each backend's ways to one answer together.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@backends_option
@click.option(
    "--dtype",
    type=Names(("float32", "float64"), called=DTYPES_CALLED),
    default="float32",
    show_default=True,
    help="To compute in.",
)
@click.option("--seed", type=SeedOption, default=0, show_default=True, metavar="N", help="Of the random tokens.")
@revision_option()
@report_options
def matrix(
    directory: Path, backends: tuple[str, ...] | None, dtype: str, seed: int, destinations: Destinations
) -> None:  # fmt: skip
    """Check that each framework's ways to one answer agree, for the model in DIR.

    Gradients, a step of SGD and of AdamW, over the cache, in pieces, prepared, in 8 bits, compiled, in a batch, padded,
    by embeddings, saved and opened again, through each file format. The exit status is 0 where rounding explains every
    difference, 1 where it does not, and 2 where that could not be judged.
    """
    _print(find_matrix(directory, backends, dtype=dtype, seed=seed), destinations)


def find_matrix(
    directory: Path, backends: tuple[str, ...] | None, *, dtype: str = "float32", seed: int = 0
) -> Findings:
    """The matrix of a model, with a row for each file format; on a terminal, who is at work on what meanwhile.

    Raises:
        GPTJError: see `gptj.parity.matrix.run_matrix`.
    """
    from gptj_conversion.round_trip import run_matrix_through_formats

    from gptj.parity.run import open_reference, require_framework

    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    require_framework(names)  # before anything is converted
    open_reference(directory)
    with waiting("converting to each format and back") as say:
        found: Findings = run_matrix_through_formats(
            directory, names, dtype=dtype, seed=seed, progress=lambda words: say(f"ways to one answer: {words}")
        )
    return found


@click.command(cls=TakesJsonFile, short_help="Measure each precision against float64.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@backends_option
@click.option("--prompts", type=PathArgument, metavar="FILE", help="A prompt a line. [default: random tokens]")
@click.option("--seed", type=SeedOption, metavar="N", help="Of the random tokens. [default: 0]")
@revision_option()
@report_options
def ladder(
    directory: Path, backends: tuple[str, ...] | None, prompts: Path | None, seed: int | None,
    destinations: Destinations,
) -> None:  # fmt: skip
    """Measure each framework in float64, float32, bfloat16, float16 and int8 against float64, for the model in DIR.

    The largest error of any logit, the divergence of the next token's distribution, and the shares of best tokens and
    of greedy tokens that are the same. transformers' own GPT-J is measured too where it is installed with PyTorch and
    no --backends are named. The exit status is 0 where all was measured, 1 where a precision gives what is not finite,
    and 2 where it could not be measured.
    """
    from gptj.command.traces import read_batch, refuse_seed

    refuse_seed(seed, prompts)
    batch = None if prompts is None else read_batch(directory, prompts)
    _print(find_ladder(directory, backends, prompts=batch, seed=seed), destinations)


def find_ladder(
    directory: Path, backends: tuple[str, ...] | None, *, prompts: Batch | None = None, seed: int | None = None
) -> Findings:
    """The ladder of a model; on a terminal, who is at work on what meanwhile.

    Raises:
        GPTJError: see `gptj.parity.ladder.run_ladder`.
    """
    from gptj.parity.ladder import TRANSFORMERS, run_ladder

    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    if backends is None and "pt" in names and importlib.util.find_spec(TRANSFORMERS) is not None:
        names = (*names, TRANSFORMERS)
    with waiting("measuring each precision") as say:
        return run_ladder(directory, names, prompts=prompts, seed=seed,
                          progress=lambda words: say(f"precisions: {words}"))  # fmt: skip


def _print(found: Findings, destinations: Destinations) -> None:
    """Print and write what was found, and exit with 1 where it differs."""
    from gptj.parity.reports.text import render_text

    def show() -> None:
        click.echo(render_text(found, width=shutil.get_terminal_size().columns), nl=False)

    destinations.finish(lambda: found, found.as_dict, show)
    if not found.passed:
        sys.exit(1)
