"""A command that several processes run as one: they find each other, agree on the seed, and the first one speaks."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import click

from gptj.backends import choose_backend
from gptj.command.options import Names, option
from gptj.errors import GPTJError, ProcessError
from gptj.sharding import Mesh

__all__ = ["joined", "mesh_of", "strategy_options", "together"]


def strategy_options(section: str, strategies: tuple[str, ...]) -> tuple[Any, ...]:
    """--strategy, --dp and --tp of a command that several processes run."""
    return (
        option(section, "--strategy", type=Names(strategies), help="Cut the model across the processes that torchrun "
               "or jax's launcher started; see gptj plan."),
        option(section, "--dp", type=click.IntRange(min=1), metavar="N", help="With --strategy: parts of each batch."),
        option(section, "--tp", type=click.IntRange(min=1), metavar="N", help="With --strategy: parts of each matrix. "
               "[default: all devices along one of the two]"),
    )  # fmt: skip


def mesh_of(dp: int | None, tp: int | None) -> Mesh | None:
    """The mesh that the command line names, None for the strategy's own."""
    return None if dp is None and tp is None else Mesh(dp=dp or 1, tp=tp or 1)


@contextlib.contextmanager
def together(request: Any) -> Iterator[Any]:
    """The request as all processes agree on it; as it is, where it asks for no strategy.

    Raises:
        InputError: the framework cannot, or the launcher's variables are there in part.
    """
    if request.strategy is None:
        yield request
        return
    with joined(request.backend) as (backend, parallel):
        seed = parallel.share_number(secrets.randbits(62)) if request.seed is None else request.seed
        dp, tp = complete(request.dp, request.tp, parallel.count_devices())
        chosen = request.seed is not None
        yield dataclasses.replace(request, backend=backend, seed=seed, chosen_seed=chosen, dp=dp, tp=tp)


@contextlib.contextmanager
def joined(backend: str | None) -> Iterator[tuple[str, Any]]:
    """The framework and its module of processes, which know each other while this is open.

    What one of them fails at ends all: the first to fail says so, and the others end without a word. None waits for
    one that is no more.

    Raises:
        InputError: the launcher's variables are there in part.
        ProcessError: another process ended.
    """
    backend = choose_backend(backend)
    parallel: Any = importlib.import_module(f"gptj.{backend}.parallel")
    processes = parallel.join_processes()
    try:
        with _silent(processes.rank > 0):
            yield backend, parallel
    except (Exception, SystemExit) as error:
        atexit.register(_end_at_once, error)
        if isinstance(error, SystemExit):
            raise
        ended = not isinstance(error, GPTJError) and parallel.is_of_processes(error)
        if processes.size > 1 and not parallel.speaks_first():
            raise SystemExit(1) from None
        if ended:
            raise ProcessError(
                "another process of this run ended", where=f"process {processes.rank} of {processes.size}",
                hint="The cause is what that one said, or what killed it; what was saved stands",
            ) from None  # fmt: skip
        raise
    parallel.leave_processes()


def _end_at_once(error: BaseException) -> None:
    """End this process without taking leave of others that may be no more, at which frameworks wait for minutes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) else 1)


def complete(dp: int | None, tp: int | None, devices: int) -> tuple[int | None, int | None]:
    """Both axes of the mesh where one is named: the other takes all devices that are left."""
    if dp is None and tp is None:
        return None, None
    return dp or devices // (tp or 1) or 1, tp or devices // (dp or 1) or 1


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """While this is open, nothing is printed but errors, where `silent`."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
