"""`gptj eval`: a thin door to lm-evaluation-harness, with a model of ours in it."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import click

from gptj.command.model_options import MODEL_OPTIONS, adapter_option, batch_size_option
from gptj.command.options import (
    ModelArgument,
    PathArgument,
    Sections,
    apply_options,
    option,
)
from gptj.command.printing import write_text
from gptj.reading.weight_files import split_weights

__all__ = ["eval"]

_OPTIONS = (
    option("Tasks", "--tasks", required=True, metavar="NAMES", help="Which, with commas between: names, patterns such "
            "as arc_*, or YAML files."),
    option("Tasks", "--include-path", type=PathArgument, metavar="FOLDER", help="A folder with tasks of yours."),
    option("Tasks", "--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question. "
            "[default: the task's]"),
    option("Tasks", "--limit", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Of each task the first "
            "N documents, or below 1 that part of them: to try it."),
    option("Output", "--json", "as_json", is_flag=True, help="Print the harness' results as JSON."),
    option("Output", "--samples", is_flag=True, help="With --json, also each document and what was answered."),
    *MODEL_OPTIONS,
    adapter_option,
    batch_size_option,
    option("Model", "--max-length", type=int, metavar="N", help="Tokens that are read together. [default: the "
            "model's positions]"),
)  # fmt: skip


@click.command(cls=Sections, short_help="Run lm-evaluation-harness' tasks on a model.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@apply_options(_OPTIONS)
def eval(
    directory: Path, tasks: str, include_path: Path | None, num_fewshot: int | None, limit: float | None,
    as_json: bool, samples: bool, **options: Any,
) -> None:  # fmt: skip
    """Run tasks of lm-evaluation-harness on the model in DIR; it is installed by gptj-multibackend[eval].

    For all of the harness' own options, run it as: python -m gptj.harness --model gptj --model_args
    pretrained=DIR,backend=pt --tasks ...
    """
    from gptj.errors import InputError

    if samples and not as_json:
        raise click.UsageError("--samples is for --json.")
    if limit is not None and not (0 < limit < 1 or (limit < 2**31 and limit.is_integer())):
        raise click.UsageError(f"--limit: expected a whole number, or a part below 1; found {limit}.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--tasks names none.")
    if include_path is not None and not include_path.is_dir():
        raise InputError("no such folder", where="--include-path", found=str(include_path))
    from gptj import harness

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    directory, weights = split_weights(directory, options.pop("weights"))
    with contextlib.redirect_stdout(sys.stderr):  # where the harness prints what it does
        results = harness.evaluate(
            lambda: harness.GPTJLM(str(directory), weights=weights, **options),
            names,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit if limit is None or limit < 1 else int(limit),
            log_samples=samples,
        )
    write_text((harness.to_json(results) if as_json else harness.to_table(results)) + "\n")
