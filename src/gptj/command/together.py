"""A command that several processes run as one: they find each other, agree on the seed, and the first one speaks."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import click

from gptj.backends import choose_backend
from gptj.command.options import Names, option
from gptj.command.standard_streams import stdout_apart
from gptj.errors import GPTJError, InputError, ProcessError, warn_of
from gptj.sharding import Mesh, Processes, Strategy, Watch, choose_mesh, require_same, silence_seconds

__all__ = [
    "TOGETHER",
    "TOO_FEW_HINT",
    "Copies",
    "check_axes",
    "check_strategy_options",
    "fitting_mesh",
    "joined",
    "strategy_options",
    "together",
]


TOO_FEW_HINT = "Give more, or cut the model in place of the work: --strategy tp without --dp"
"""A way on where a copy of the model would have no work."""


def strategy_options(section: str, strategies: tuple[str, ...]) -> tuple[Any, ...]:
    """--strategy, --dp and --tp of a command that several processes run."""
    return (
        option(section, "--strategy", type=Names(strategies), help="Cut the model across the processes that torchrun "
               "or jax's launcher started; see gptj plan."),
        option(section, "--dp", type=click.IntRange(min=1), metavar="N", help="With --strategy: parts of each batch."),
        option(section, "--tp", type=click.IntRange(min=1), metavar="N", help="With --strategy: parts of each matrix. "
               "[default: all devices along one of the two]"),
    )  # fmt: skip


def check_strategy_options(said: Any) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: naming them.
    """
    check_axes(said.strategy, said.dp, said.tp)
    if said.strategy is not None and said.quantize:
        raise click.UsageError("--strategy is for the model as it is: leave out --quantize.")
    if said.strategy is not None and said.device != "auto":
        raise click.UsageError("With --strategy the processes say where it runs: leave out --device.")


def check_axes(strategy: str | None, dp: int | None, tp: int | None) -> None:
    """Refuse a mesh that no strategy cuts along.

    Raises:
        click.UsageError: naming the options.
    """
    if strategy is None and (dp or tp):
        raise click.UsageError("--dp and --tp go with --strategy.")


TOGETHER = ("parallel", "processes")
"""A wing's modules of what processes do as one."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """The copies of a model among which a command's rows of work are dealt out: piece n is copy n % count's.

    Attributes:
        mine, count: which of how many this process has.
        talk: the wing's module `processes`, None where one process does all.
    """

    mine: int = 0
    count: int = 1
    talk: Any = None

    @classmethod
    def of(cls, model: Any, backend: str, work: Sequence[Any]) -> Copies:
        """Those of a model that was opened with a strategy, or without one.

        Args:
            work: token ids of every row, which must be the same in every process.

        Raises:
            InputError: they are not.
        """
        if model.placement is None:
            return cls()
        parallel, talk = (importlib.import_module(f"gptj.{backend}.{name}") for name in TOGETHER)
        require_same(
            hashlib.sha256(repr(work).encode()).hexdigest(), talk.share_number, file=None,
            problem=f"the texts on {socket.gethostname()} are others than the first process'",
            hint="Give every host the same files; stdin is one process' alone",
        )  # fmt: skip
        mine, count = parallel.copy_of(model)
        return cls(mine, count, talk)

    def check(self, pieces: int, where: str) -> None:
        """Refuse so little work that a copy would have none.

        Raises:
            InputError: naming it.
        """
        if pieces < self.count:
            raise InputError(
                f"fewer than the {self.count} copies of the model", where=where, expected=f"{self.count} or more",
                found=pieces, hint=TOO_FEW_HINT,
            )  # fmt: skip

    def is_mine(self, number: int) -> bool:
        """Whether the piece of that number is this process' to do."""
        return number % self.count == self.mine

    def gather(self, done: Mapping[int, Any]) -> list[Any]:
        """The results of all pieces, in their order; a result is what JSON can hold."""
        if self.count == 1:
            return [done[number] for number in sorted(done)]
        found: dict[int, Any] = {}
        for text in self.talk.gather_texts(json.dumps([*done.items()])):
            found |= dict(json.loads(text))
        return [found[number] for number in sorted(found)]


@contextlib.contextmanager
def together(request: Any) -> Iterator[Any]:
    """The request as all processes agree on it; as it is, where it asks for no strategy.

    Raises:
        InputError: the framework cannot, or the launcher's variables are there in part.
    """
    if request.strategy is None:
        if (count := _count_launched()) > 1:
            hint = "--strategy tp, or dp, has them share it; or start one"
            warn_of(f"{count} processes were started, and each does all of it", where="--strategy", hint=hint)
        yield request
        return
    if request.adapter is not None and choose_backend(request.backend) == "tf":
        hint = "gptj adapter merge DIR ADAPTER OUT makes one model of both"
        problem = "nothing is beside a cut matrix in TensorFlow"
        raise InputError(problem, where="--adapter", expected="--backend pt or flax", hint=hint)
    with joined(request.backend) as (backend, talk, place):
        mesh = fitting_mesh(request.strategy, request.dp, request.tp, talk.count_devices(), place)
        seed = talk.share_number(secrets.randbits(62)) if request.seed is None else request.seed
        agreed = {"backend": backend, "seed": seed, "chosen_seed": request.seed is not None}
        yield dataclasses.replace(request, **agreed, dp=mesh.dp, tp=mesh.tp, rank=place.rank)


@contextlib.contextmanager
def joined(backend: str | None, *, check: Callable[[], object] = lambda: None) -> Iterator[tuple[str, Any, Processes]]:
    """The framework, its module of processes, which know each other while this is open, and this one's place.

    What one of them fails at ends all: the first to fail says so, and the others end without a word. None waits for
    one that is no more.

    Args:
        check: refuses what cannot be, before more is said.

    Raises:
        InputError: the launcher's variables are there in part.
        ProcessError: another process ended.
    """
    backend, bound_s = choose_backend(backend), silence_seconds()
    talk: Any = importlib.import_module(f"gptj.{backend}.processes")
    try:
        processes = talk.join_processes()
    except RuntimeError as error:
        atexit.register(_end_at_once, error, 0)
        cause = str(error).splitlines()[0]
        raise ProcessError(f"the other processes did not come: {cause}", where="--strategy") from None
    watch = None
    if processes.size > 1:
        watch = Watch(
            processes, talk.make_keys, lambda other, how: _end_for(other, how, processes, bound_s),
            bound_s=bound_s,
        )  # fmt: skip
        watch.start()
    try:
        with stdout_apart(), _silent(processes.rank > 0):
            check()
            if processes.size == 1 and talk.count_devices() == 1:
                _say_alone()
            yield backend, talk, processes
    except (Exception, SystemExit) as error:
        ended = not isinstance(error, GPTJError) and talk.is_of_processes(error)
        alone = processes.size == 1
        silent = alone or (ended and (processes.rank > 0 or processes.size == 2))  # nobody is left who would ask it
        atexit.register(_end_at_once, error, 0 if silent else _LISTENING_S)
        if isinstance(error, SystemExit):
            raise
        first = True if alone else talk.speaks_first()
        if watch is not None:
            watch.fail()
        if not (ended and _is_first_here() if first is None else first):
            raise SystemExit(1) from None
        if ended:
            raise ProcessError(
                "another process of this run ended", where=f"process {processes.rank} of {processes.size}",
                hint=_CAUSE,
            ) from None  # fmt: skip
        raise
    if watch is not None:
        watch.leave()
    with contextlib.suppress(Exception):  # all is written: one that died since takes nothing away
        talk.leave_processes()
    atexit.register(_end_well)


_LISTENING_S = 2.0
"""Seconds for which a process that failed stays, so that others who fail alike learn from it that it said why."""

_CAUSE = "The cause is what that one said, or what killed it; what was saved stands"

_QUIET_S = 0.5
"""For so long a process whose fellow failed may still end by itself: less than that one stays."""


def _is_first_here() -> bool:
    """Whether no other process of this run on this host asked before: where the first is gone, nobody else counts.

    A name that one process alone can have, until it ends; where the system has no such names, each is the first.
    """
    name = "\0gptj.failed:" + ":".join(os.environ.get(name, "") for name in _RUN)
    try:
        claim = socket.socket(socket.AF_UNIX)
        atexit.register(claim.close)  # which keeps it open
        claim.bind(name)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    except AttributeError:  # Windows
        return True
    atexit.register(time.sleep, _LISTENING_S)
    return True


_RUN = ("MASTER_ADDR", "MASTER_PORT", "DTENSOR_JOBS", "JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID")
"""Variables that are one run's, so that runs beside each other on a host each have a process that speaks."""


def _end_well() -> None:
    """End this process with status 0 where Python ends, once all that is to be done at its end is done.

    A thread of gloo's may still want Python's lock, and where Python has gone too far to give it, C++ aborts
    ("terminate called without an active exception", status -6).
    """
    atexit.unregister(_end_well)
    atexit._run_exitfuncs()
    _exit(0)


def _end_at_once(error: BaseException, wait_s: float) -> None:
    """End this process without taking leave of others that may be no more, at which frameworks wait for minutes."""
    _flush()
    time.sleep(wait_s)
    code = error.code if isinstance(error, SystemExit) else 1
    _exit(code if isinstance(code, int) else 1)


def _end_for(other: int, how: str, processes: Processes, bound_s: int) -> None:
    """End this process, which may wait for one that failed, is silent or ended, from a thread beside it.

    One that failed says why; of another a process on each host says so.
    """
    if how != "failed" and _is_first_here():
        problem, hint = f"was silent for {bound_s} s", "It was stopped, or its host is gone; what was saved stands. "
        if how == "ended":
            problem, hint = "ended", _CAUSE
        else:
            hint += "GPTJ_SILENCE_SECONDS allows more"
        error = ProcessError(problem, where=f"process {other} of {processes.size}", hint=hint)
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            click.echo(f"gptj: {error.code}: {error}", err=True)
    _flush()
    keeps = processes.rank == 0  # what the others ask, and jax' processes do not outlive
    time.sleep(_LISTENING_S if how != "failed" else 2 * _LISTENING_S if keeps else _QUIET_S)
    _exit(1)


def _exit(status: int) -> NoReturn:
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


_LAUNCHED = ("WORLD_SIZE", "JAX_NUM_PROCESSES", "DTENSOR_NUM_CLIENTS")
"""Variables by which a launcher says how many processes there are."""


def _count_launched() -> int:
    """How many processes a launcher says that there are; 1 where none does."""
    return max(int(said) if (said := os.environ.get(name, "")).isdecimal() else 1 for name in _LAUNCHED)


def require_strategy() -> None:
    """Refuse several processes that would write into one folder, none of which knows of another.

    Raises:
        InputError: a launcher started them, and no strategy was asked for.
    """
    if (count := _count_launched()) > 1:
        raise InputError(
            "each process would train a model of its own", where="--strategy", expected="dp, tp, fsdp or tp_fsdp",
            found=f"none, and {count} processes", hint="Give one, or start one process",
        )  # fmt: skip


def _say_alone() -> None:
    """Say that nothing is cut, where no launcher said that this process is to be the only one."""
    if not any(name in os.environ for name in _LAUNCHED):
        verb = click.get_current_context().info_name
        warn_of(
            "one process with one device holds the whole model, and cuts nothing", where="--strategy",
            expected="several, which a launcher starts",
            hint=f"torchrun --nproc-per-node=2 -m gptj {verb} ... starts two on this host; see docs/scale.md",
        )  # fmt: skip


def fitting_mesh(strategy: Strategy, dp: int | None, tp: int | None, devices: int, place: Processes) -> Mesh:
    """The mesh of all devices; where one axis is named, the other takes all that are left.

    Raises:
        InputError: what is named makes no mesh of so many.
    """
    named = None
    if dp is None and tp is None:
        if strategy == "tp_fsdp":
            expected = f"two numbers whose product is {devices}"
            raise InputError("the strategy cuts along both", where="--dp and --tp", expected=expected, found="neither")
    else:
        named = Mesh(dp=dp or devices // (tp or 1) or 1, tp=tp or devices // (dp or 1) or 1)
    return choose_mesh(named, strategy, devices, processes=place.size)


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """While this is open, nothing is printed but errors, where `silent`."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
