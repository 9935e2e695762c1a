"""`gptj finetune`: its options, the lines while it works, and Ctrl-C, which saves."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptj.adapters import TARGETS
from gptj.command.model_options import place_options
from gptj.command.options import (
    FiniteRange,
    ModelArgument,
    Names,
    PathArgument,
    Sections,
    apply_options,
    option,
    revision_option,
)
from gptj.command.printing import print_facts, print_json
from gptj.command.together import check_axes, fitting_mesh, joined, require_strategy, strategy_options
from gptj.config.dtypes import DTYPES_CALLED
from gptj.errors import InputError
from gptj.finetune.settings import DTYPES, MOST_TIMES, SCHEDULES
from gptj.sharding import STRATEGIES

if TYPE_CHECKING:
    from gptj.finetune import Outcome, Report
    from gptj.sharding import Strategy

__all__ = ["finetune"]

LINE_EVERY_S = 5.0
"""Seconds between lines about updates, evaluations and checkpoints aside."""

LORA_TARGETS = tuple(target.split(".")[1] for target in TARGETS)

_WHOLE = click.IntRange(1, MOST_TIMES)

_OPTIONS = (
    *place_options("Run"),
    option("Run", "--dtype", type=Names(DTYPES, called=DTYPES_CALLED), default="float32", show_default=True,
           help="What is computed in; parameters stay float32."),
    option("Run", "--checkpoint-gradients", is_flag=True, help="Compute each block again for its gradient: less "
           "memory, a third more time."),
    option("Run", "--resume", is_flag=True, help="Go on from the last checkpoint in OUT."),
    *strategy_options("Run", STRATEGIES),
    revision_option(section="Run"),
    option("Run", "--json", "as_json", is_flag=True, help="Print the result as JSON."),
    option("Data", "--length", type=click.IntRange(2, MOST_TIMES), metavar="N", help="Tokens of a window. [default: "
           "the model's n_positions]"),
    option("Data", "--pack/--pad", "pack", default=True, help="Documents one after the other in full windows, or each "
           "in a window of its own. [default: pack]"),
    option("Data", "--eval", "evaluation", type=PathArgument, metavar="DATA", help="Measure this, and keep the best."),
    option("Data", "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, metavar="N",
           help="Of the order of the windows."),
    option("Training", "--steps", type=_WHOLE, metavar="N", help="Updates. [default: one epoch]"),
    option("Training", "--epochs", type=_WHOLE, metavar="N", help="How often all of DATA is seen."),
    option("Training", "--batch", type=_WHOLE, default=4, show_default=True, metavar="N", help="Windows at once."),
    option("Training", "--accumulate", type=_WHOLE, default=1, show_default=True, metavar="N", help="Batches of one "
           "update."),
    option("Training", "--lr", type=FiniteRange(min=0, min_open=True), metavar="X", help="Peak learning rate. "
           "[default: 2e-5; with --lora 2e-4]"),
    option("Training", "--schedule", type=Names(SCHEDULES), default="cosine", show_default=True, help="How the "
           "learning rate falls after the warm-up."),
    option("Training", "--warmup", type=FiniteRange(min=0), default=0.03, show_default=True, metavar="X",
           help="Updates in which it climbs; below 1, their share of all."),
    option("Training", "--weight-decay", type=FiniteRange(min=0), default=0.01, show_default=True, metavar="X",
           help="Of matrices."),
    option("Training", "--clip", type=FiniteRange(min=0), default=1.0, show_default=True, metavar="X", help="The "
           "gradient's largest norm; 0 for none."),
    option("Adapter", "--lora", type=_WHOLE, metavar="R", help="Train an adapter of this rank, and "
           "nothing else; OUT is its folder."),
    option("Adapter", "--lora-alpha", type=FiniteRange(min=0, min_open=True), metavar="X", help="Its scale is X / R. "
           "[default: twice R]"),
    option("Adapter", "--lora-targets", type=Names(LORA_TARGETS, several=True), help="The matrices it adds to. "
           "[default: q_proj,v_proj]"),
    option("Training", "--eval-every", type=_WHOLE, metavar="N", help="Updates between evaluations. [default: a "
           "tenth]"),
    option("Training", "--save-every", type=_WHOLE, metavar="N", help="Updates between checkpoints. [default: a "
           "tenth]"),
)  # fmt: skip


@click.command(cls=Sections, short_help="Go on training a model on your own texts.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("data", type=PathArgument, metavar="DATA")
@click.argument("output", type=PathArgument, metavar="OUT")
@apply_options(_OPTIONS)
def finetune(
    directory: Path, data: Path, output: Path, backend: str | None, device: str, resume: bool, as_json: bool,
    evaluation: Path | None, strategy: Strategy | None, dp: int | None, tp: int | None, **options: Any,
) -> None:  # fmt: skip
    """Fine-tune the model in DIR on DATA, and write OUT, a folder that every command opens.

    DATA is text, or JSON lines: {"text": ...}, or {"prompt": ..., "completion": ...}, of which the completion is
    learnt. The same seed gives the same loss curve in every framework.

    OUT/checkpoints keeps the last and the best; Ctrl-C writes one, and --resume goes on. With --eval the weights in
    OUT are the best evaluation's, else the last update's. OUT has its loss curve as loss.csv and loss.png.

    With --strategy, as in `torchrun --nproc-per-node=2 -m gptj finetune ... --strategy fsdp`, processes train one
    model with the losses of one process; --resume goes on on another number of them, too.
    """
    from gptj.backends import choose_backend
    from gptj.backends.surroundings import check_surroundings
    from gptj.finetune import Settings
    from gptj.finetune import finetune as run
    from gptj.finetune.job import check_cut

    try:
        settings = Settings(**options)
    except InputError as error:
        raise click.UsageError(str(error)) from None
    for name, path in (("DATA", data), ("--eval", evaluation)):
        if path is not None and str(path) == "-" and not path.exists():
            raise click.UsageError(f"{name}: - is no file, and --resume reads it again; write it into one.")
    if settings.eval_every is not None and evaluation is None:
        raise click.UsageError("--eval-every: nothing is measured; give --eval too.")
    check_axes(strategy, dp, tp)
    backend = choose_backend(backend)
    check_surroundings(backend)
    with contextlib.ExitStack() as several:
        mesh, first = None, True
        if strategy is None:
            require_strategy()
        else:
            check = functools.partial(check_cut, settings, device, backend, strategy)
            backend, talk, place = several.enter_context(joined(backend, check=check))
            mesh, first = fitting_mesh(strategy, dp, tp, talk.count_devices(), place), place.rank == 0
        heard = several.enter_context(stopped_by_signals(aloud=first))
        outcome = run(
            directory, data, output, settings, backend=backend, device=device, evaluation=evaluation, resume=resume,
            cut=None if strategy is None else (strategy, mesh),
            note=lambda sentence: click.echo(f"{sentence}", err=True), report=Lines(),
            stop=lambda: bool(heard),
        )  # fmt: skip
        if not outcome.finished:
            if first:
                _say_how_to_go_on(outcome, resume)
            sys.exit(128 + heard[0] if heard else 1)
        if as_json:
            print_json(outcome.to_dict())
        else:
            print_facts(_facts(outcome))


def _say_how_to_go_on(outcome: Outcome, resume: bool) -> None:
    again = shlex.join([*_command_line(), *([] if resume else ["--resume"])])
    click.echo(f"stopped after update {outcome.step} of {outcome.steps}; {outcome.checkpoint} has it", err=True)
    click.echo(f"to go on: {again}", err=True)


def _command_line() -> list[str]:
    return ["gptj", *sys.argv[1:]]


def _facts(outcome: Outcome) -> dict[str, str]:
    from gptj.finetune.curve import perplexity

    facts = {"written": str(outcome.folder), "updates": f"{outcome.step:,}", "tokens": f"{outcome.tokens:,}"}
    if outcome.loss is not None:
        facts["last loss"] = f"{outcome.loss:.4f}"
    if outcome.best_loss is not None:
        measured = f"loss {outcome.best_loss:.4f}, perplexity {perplexity(outcome.best_loss):.4g}"
        facts["best evaluation"] = f"{measured}, after update {outcome.best_step}"
    if outcome.picture is not None:
        facts["curve"] = str(outcome.picture)
    return facts


class Lines:
    """A line on stderr every so often: an update's loss, rate and pace, and each evaluation."""

    def __init__(self) -> None:
        self._shown_s = 0.0
        self._tokens, self._took_s = 0, 0.0

    def __call__(self, report: Report) -> None:
        """Print the line of an update, where it is time for one, it was measured, or it is the first or last."""
        from gptj.finetune.curve import perplexity

        row, now_s = report.row, time.monotonic()
        self._tokens, self._took_s = self._tokens + report.tokens, self._took_s + report.took_s
        ends = row.step == report.steps or not self._shown_s
        if not (ends or row.eval_loss is not None or report.overflow or now_s - self._shown_s >= LINE_EVERY_S):
            return
        pace = f"{self._tokens / self._took_s:,.0f} tokens/s"
        self._shown_s, self._tokens, self._took_s = now_s, 0, 0.0
        place = f"{row.step:{len(str(report.steps))}}/{report.steps}"
        line = f"{place}  loss {row.loss:.4f}  lr {row.learning_rate:.3g}  {pace}"
        if row.eval_loss is not None:
            line += f"  evaluation {row.eval_loss:.4f}, perplexity {perplexity(row.eval_loss):.4g}"
        if report.overflow:
            line += "  left out: the float16 gradient overflowed, and the loss is scaled by less from here"
        click.echo(line, err=True)


@contextlib.contextmanager
def stopped_by_signals(*, aloud: bool = True) -> Iterator[list[int]]:
    """A list to which the first Ctrl-C or SIGTERM adds its number, and says so; the second does what it always does."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        signal.signal(number, before[signal.Signals(number)])
        # Past Python's stream, which may be in the middle of a line: a signal falls in anywhere.
        if aloud:
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), b"saving after this update; once more to leave at once\n")

    for number, handler in before.items():
        if callable(handler):  # neither ignored nor the system's
            signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
