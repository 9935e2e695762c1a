"""`gptj parity record` and `gptj parity compare`: a backend's trace written down, and traces compared, apart."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptj.backends import choose_backend
from gptj.command.options import (
    BackendChoice,
    DtypeChoice,
    Judging,
    ModelArgument,
    Names,
    PathArgument,
    Repository,
    overwrite_option,
    revision_option,
    weights_option,
)
from gptj.command.reports import Destinations, TakesJsonFile, report_options
from gptj.command.waiting import waiting
from gptj.errors import InputError, WriteError
from gptj.paths.hub import locate

if TYPE_CHECKING:
    from gptj.parity.trace_record import Batch

__all__ = ["compare", "read_batch", "record", "refuse_seed"]


@click.command(cls=Judging, short_help="Write down every intermediate value of a backend.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.option("--backend", type=BackendChoice, required=True, help="Which framework computes.")
@click.option("--dtype", type=DtypeChoice, default="float32", show_default=True, help="To compute in.")
@click.option(
    "--path", "way", type=Names(("plain", "prepared", "int8", "compiled", "sdpa")), default="plain",
    show_default=True, help="The way of computing.",
)  # fmt: skip
@click.option("--prompts", type=PathArgument, metavar="FILE", help="A prompt a line. [default: random tokens]")
@click.option("--gradients", is_flag=True, help="Also the loss' gradient by every parameter.")
@click.option("--steps", is_flag=True, help="Also every parameter after steps of SGD and AdamW, with --gradients.")
@click.option("--generate", type=click.IntRange(min=0), default=0, metavar="N", help="Also N greedy tokens a prompt.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Of random tokens. [default: 0]")
@click.option("--output", "-o", type=PathArgument, required=True, metavar="TRACE", help="The file to write.")
@overwrite_option
@weights_option
@revision_option()
def record(
    directory: Path, backend: str, dtype: str, way: str, prompts: Path | None, gradients: bool, steps: bool,
    generate: int, seed: int | None, output: Path, overwrite: bool, weights: str | None,
) -> None:  # fmt: skip
    """Run the model in DIR in one framework, and write every intermediate value, by name, into the file TRACE.

    The file is a safetensors file; docs/traces.md says what is in it. `gptj parity compare` needs no framework. The
    exit status is 0 where TRACE is written, and 2 where it could not be.
    """
    from gptj.parity.processes import child_environment
    from gptj.parity.trace_record import record_trace, require_way

    refuse_seed(seed, prompts)
    if steps and not gradients:
        raise click.UsageError("--steps are taken from gradients: give --gradients too.")
    if os.path.lexists(output) and not overwrite:
        raise WriteError("is there already", file=output, hint="Give --overwrite to replace it")
    batch = None if prompts is None else read_batch(directory, prompts)
    require_way(choose_backend(backend), way, gradients=gradients)
    os.environ.update(child_environment(dtype))  # before the framework is imported, which reads it once
    with waiting(f"recording {backend}"):
        record_trace(directory, backend, output, dtype=dtype, way=way, batch=batch,
                     gradients="steps" if steps else gradients,
                     generate=generate, seed=None if batch else seed or 0, weights=weights)  # fmt: skip
    click.echo(f"{output}: written")


def refuse_seed(seed: int | None, prompts: Path | None) -> None:
    """Refuse a seed of random tokens where there are prompts.

    Raises:
        click.UsageError: both are given.
    """
    if seed is not None and prompts is not None:
        raise click.UsageError("--seed is of random tokens, and --prompts leaves none to draw.")


def read_batch(directory: Path, prompts: Path) -> Batch:
    """The prompts of a file as a batch.

    Raises:
        InputError: a prompt is none, or says how to continue it, which a trace does not.
    """
    from gptj.command.prompts import read_lines
    from gptj.parity.trace_record import batch_of_prompts
    from gptj.text.tokenizer import GPTJTokenizer

    lines = read_lines(str(prompts))
    for line in lines:
        if line.settings or line.seed is not None:
            found = next(iter(line.settings), "seed")
            raise line.add_place(InputError("nothing is generated for a trace", where=found, hint="Leave it out"))
    tokenizer = None
    if any(line.text is not None for line in lines):
        tokenizer = GPTJTokenizer.from_pretrained(directory)
    ids = [[*line.token_ids] if line.token_ids is not None else _encode(tokenizer, line.text) for line in lines]
    return batch_of_prompts(ids)


def _encode(tokenizer: object, text: str | None) -> list[int]:
    from gptj.text.tokenizer import GPTJTokenizer

    assert isinstance(tokenizer, GPTJTokenizer) and text is not None
    ids: list[int] = tokenizer.encode(text)
    return ids


@click.command(cls=TakesJsonFile, short_help="Say where traces part, and whether the error was born there.")
@click.argument("traces", type=PathArgument, metavar="TRACE TRACE...", nargs=-1, required=True)
@click.option(
    "--reference", type=Repository(locate), metavar="DIR",
    help="The model's folder: its weights tell of every operation whether an error was born there.",
)  # fmt: skip
@click.option(
    "--names", type=str, metavar="NAME", multiple=True,
    help="Maps other programs' names onto ours: a TOML file, or a shipped one, such as transformers-pt. Repeatable.",
)  # fmt: skip
@click.option("--weights", metavar="FILE", help="Which weights file of --reference, where it holds several sets.")
@click.option("--verbose", is_flag=True, help="Also print every tap.")
@report_options
def compare(
    traces: tuple[Path, ...], reference: Path | None, names: tuple[str, ...], weights: str | None, verbose: bool,
    destinations: Destinations,
) -> None:  # fmt: skip
    """Compare traces of one model on the same inputs with the most exact of them, tap by tap.

    No framework is needed. The exit status is 0 where rounding explains every difference, 1 where it does not, and 2
    where that could not be judged: a file cannot be read, or is of another model or other inputs.
    """
    from gptj.parity.differences import compare_traces
    from gptj.parity.gather import findings_of_comparison, read_reference
    from gptj.parity.tap_names import TapNames
    from gptj.parity.threads import few_threads
    from gptj.parity.trace import open_trace

    if weights is not None and reference is None:
        raise click.UsageError("--weights is for --reference.")
    if len(traces) < 2:
        raise click.UsageError("Two traces or more are compared; one was given.")
    mapping = TapNames.find(*names)
    opened = [open_trace(path, mapping) for path in traces]
    config, read = (None, None) if reference is None else read_reference(reference, opened, weights=weights)
    with waiting(f"comparing {len(opened)} traces"), few_threads(opened[0].facts.config):
        found = compare_traces(opened, read, config=config)

    def show() -> None:
        for line in found.lines(every=verbose):
            click.echo(line)

    destinations.finish(lambda: findings_of_comparison(found, opened, folder=reference), found.as_dict, show)
    if not found.passed:
        sys.exit(1)
