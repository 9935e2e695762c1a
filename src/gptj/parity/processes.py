"""Backends' processes, side by side where memory allows: all end where one fails, and where the caller is interrupted.

A backend's process gets the same Python and an environment of its own: quiet, threads that do not spin, no 16-bit or
TF32 matrix products behind the back, and 64-bit numbers in JAX where they are asked for. The variables are set for
the child alone, and a variable that the caller had set stays.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from gptj.backends.surroundings import address_limit, memory, processors, require_current_folder
from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import schema
from gptj.errors import GPTJError, harmless
from gptj.writing.output_file import whole_file

__all__ = [
    "PROCESS_TIMEOUT_S",
    "BackendProcessError",
    "Job",
    "child_environment",
    "memory_of",
    "run_in_process",
    "run_side_by_side",
]

PROCESS_TIMEOUT_S = 3600.0

_FRAMEWORK_BYTES = 1.5e9
"""Of a framework that has been imported and has compiled something."""

_LINES_KEPT = 200
"""The bytes that are kept of what a process says, of which the last is what an error tells."""


class BackendProcessError(GPTJError, RuntimeError):
    """A backend's own process ended without a record."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One backend's process, to be started.

    Attributes:
        name: what it is called in an error and while it runs: the backend, or the backend and what it does.
        command: of `python -m`; each line that it prints says what it is at.
        backend: whose.
        dtype: what it computes in, which its environment follows.
        nbytes: of memory that it may take.
        folder: where it puts temporary files; None is the system's place.
    """

    name: str
    command: Sequence[str]
    backend: str
    dtype: str = "float32"
    nbytes: float = _FRAMEWORK_BYTES
    folder: str | os.PathLike[str] | None = None


def memory_of(config: GPTJConfig, dtype: str, *, copies: float = 2.5) -> float:
    """Bytes that a backend's process takes: its framework, and the weights so many times."""
    values = sum(math.prod(spec.shape) for spec in schema(config))
    return _FRAMEWORK_BYTES + copies * values * numpy_dtype(dtype).itemsize


def run_side_by_side(
    jobs: Sequence[Job], *, timeout_s: float = PROCESS_TIMEOUT_S, progress: Callable[[str], None] | None = None
) -> list[str]:
    """Run jobs, each in a process of its own, and return what each prints.

    They start in their order: one a processor, as far as two thirds of the free memory reach, and one in any case.

    Args:
        jobs: one at least.
        timeout_s: how long each may take.
        progress: told who runs and how many are done, in words, whenever that changes, from any thread.

    Raises:
        BackendProcessError: the first that failed, was ended by a signal, or took longer than `timeout_s`; the others
            have been ended.
        BackendError: the current folder is gone.
    """
    for job in jobs:
        require_current_folder(job.backend)
    free = memory()[1]
    room, most = math.inf if free is None else free * 2 / 3, processors()
    board = _Board(len(jobs), progress)
    said = [""] * len(jobs)
    ahead, running = [*range(len(jobs))][::-1], dict[Future[str], int]()
    with ThreadPoolExecutor(max(1, len(jobs))) as pool, _Processes() as alive:
        while ahead or running:
            while ahead and _fits(jobs[ahead[-1]], [jobs[number] for number in running.values()], room, most):
                number = ahead.pop()
                board.begin(jobs[number])
                running[pool.submit(_run, jobs[number], timeout_s, alive, board)] = number
            # Woken now and then, to hear an interrupt that another thread was given.
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                number = running.pop(future)
                said[number] = future.result()
                board.end(jobs[number])
    return said


def run_in_process(command: Sequence[str], backend: str) -> str:
    """Run `python -m COMMAND` in a new process with a backend's environment, and return what it prints.

    Raises:
        BackendProcessError: the process failed, was ended by a signal, or took longer than PROCESS_TIMEOUT_S.
        BackendError: the current folder is gone.
    """
    [said] = run_side_by_side([Job(backend, command, backend)])
    return said


def child_environment(dtype: str) -> dict[str, str]:
    """The environment of a backend's process: the caller's, and what it left unsaid."""
    defaults = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KERAS_BACKEND": "tensorflow",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "NVIDIA_TF32_OVERRIDE": "0",
        "OPENBLAS_NUM_THREADS": "1",  # of NumPy, which the frameworks do not compute with: see gptj.parity.threads
    }
    environment = defaults | os.environ
    if dtype == "float64":
        environment["JAX_ENABLE_X64"] = "1"
    return environment


def _fits(job: Job, others: Sequence[Job], room: float, most: int) -> bool:
    """Whether a job may start beside others; alone it always may."""
    if not others:
        return True
    return len(others) < most and job.nbytes + sum(other.nbytes for other in others) <= room


class _Board:
    """Who is at work on what, in words."""

    def __init__(self, jobs: int, tell: Callable[[str], None] | None) -> None:
        self._jobs, self._done, self._tell = jobs, 0, tell
        self._at: dict[int, tuple[str, str]] = {}  # by the job itself, since two may have one name
        self._lock = threading.Lock()

    def begin(self, job: Job) -> None:
        self.at(job, "")

    def at(self, job: Job, doing: str) -> None:
        with self._lock:
            self._at[id(job)] = job.name, doing
            self._say()

    def end(self, job: Job) -> None:
        with self._lock:
            del self._at[id(job)]
            self._done += 1
            self._say()

    def _say(self) -> None:
        if self._tell is None or not self._at:
            return
        words = ", ".join(f"{name} ({doing})" if doing else name for name, doing in self._at.values())
        self._tell(words if self._jobs == 1 else f"{words}; {self._done} of {self._jobs} done")


class _Processes:
    """The processes that run: none is left when the context ends, and none starts after it."""

    def __init__(self) -> None:
        self._lock, self._over = threading.Lock(), False
        self._running: set[subprocess.Popen[str]] = set()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        with self._lock:
            self._over = True
            for process in self._running:
                process.kill()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start one.

        Raises:
            RuntimeError: the context has ended, and nobody asks any more.
        """
        with self._lock:
            if self._over:
                raise RuntimeError("interrupted: no further process is started")
            options: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(
                [*command], env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
            )
            self._running.add(process)
        return process

    def forget(self, process: subprocess.Popen[str]) -> None:
        """Take one off the list that has ended: its number may be another's by now."""
        with self._lock:
            self._running.discard(process)


def run_command(
    command: Sequence[str], *, environment: Mapping[str, str], timeout_s: float, alive: _Processes,
    told: Callable[[str], None],
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a command to its end, and tell each line that it prints.

    Raises:
        subprocess.TimeoutExpired: it took too long, and has been ended.
    """
    process = alive.start(command, environment)
    assert process.stdout is not None and process.stderr is not None
    late, errors = threading.Event(), list[str]()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    try:
        timer.start()
        reader.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            told(line.strip())
        status = process.wait()
        reader.join()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        alive.forget(process)
        process.stdout.close()
        process.stderr.close()
    if late.is_set():
        raise subprocess.TimeoutExpired([*command], timeout_s)
    return subprocess.CompletedProcess([*command], status, "".join(lines), "".join(errors[-_LINES_KEPT:]))


def _run(job: Job, timeout_s: float, alive: _Processes, board: _Board) -> str:
    """Run a job to its end, and return what it prints.

    Raises:
        BackendProcessError: it failed, was ended by a signal, or took too long.
    """
    environment = child_environment(job.dtype)
    if job.folder is not None:
        environment["TMPDIR"] = os.fspath(job.folder)
    # -P keeps the current folder out of sys.path, where a folder called `flax` would be imported as Flax.
    command = [sys.executable, "-P", "-m", *job.command]
    try:
        done = run_command(command, environment=environment, timeout_s=timeout_s, alive=alive,
                           told=lambda line: board.at(job, harmless(line[:40])))  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BackendProcessError(
            "the backend's process took too long", where=job.name, expected=f"at most {timeout_s:g} s"
        ) from None
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    raise BackendProcessError(
        f"the backend's process failed with {ended}: {lines[-1] if lines else 'it said nothing'}",
        where=job.name,
        hint=_hint_of(done.returncode),
    )


def record_rows(act: Callable[[], Sequence[Any]], out: str) -> int:
    """Write the dataclasses that `act` gives as JSON. See `end_of` for what is returned."""

    def write() -> None:
        rows = [dataclasses.asdict(row) for row in act()]
        with whole_file(Path(out)) as write_bytes:
            write_bytes(json.dumps(rows).encode())

    return end_of(write)


def end_of(act: Callable[[], object]) -> int:
    """The exit status of a recorder's process: 0, or 2 after an error, whose message is the last line of stderr."""
    try:
        act()
    except GPTJError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    return 0


def _hint_of(status: int) -> str | None:
    """A question that helps where a process ended so; None where none does."""
    limit = address_limit()
    if limit is not None:
        return f"Is the memory enough? ulimit -v allows {limit:,} bytes of address space"
    if status == -getattr(signal, "SIGKILL", 9):
        return "Is the memory enough? The system ends processes so where it runs out"
    return None
