"""Checks of a process before a framework is loaded in it: in some surroundings it would end the process.

Under a limit of its address space (`ulimit -v`, and some clusters' own), jax and TensorFlow abort where a thread or
an allocation fails, which no Python code can catch; and oneMKL, in PyTorch, ends the process where the current folder
is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

from gptj.backends import BACKENDS
from gptj.errors import BackendError, LimitError

__all__ = ["address_limit", "check_surroundings", "memory", "processors", "require_current_folder"]

ENOUGH_BYTES = 8_000_000_000
"""Of address space, for any framework: they were loaded with 1 (PyTorch), 2 (Flax) and 3 GB (TensorFlow) on 2 cores,
and each core has threads with stacks and arenas of their own."""

SPARE_BYTES = 200_000_000
"""Bytes that the caller may have in use and a fresh process has not."""


def address_limit() -> int | None:
    """Bytes of address space that this process may have, None where there is no limit."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows has none
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def processors() -> int:
    """Processors that this process may use, which a container or taskset may have made fewer."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all, and of them free, as the kernel or the container's limit has it; None if unknown."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024
    total, free = found.get("MemTotal"), found.get("MemAvailable")
    if total is None:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            page = os.sysconf("SC_PAGE_SIZE")
            total = page * os.sysconf("SC_PHYS_PAGES")
            free = page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, TypeError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if total is not None and limit < total:
            total, free = limit, min(limit - used, free if free is not None else limit)
    return total, free


def check_surroundings(backend: str) -> None:
    """Refuse to load a backend's framework where that would end the process.

    Under a limit of the address space that may be too small, a process of its own loads it first.

    Raises:
        BackendError: the current folder is gone.
        LimitError: there is too little address space.
    """
    require_current_folder(backend)
    where, framework = f"gptj.{backend}", BACKENDS[backend].framework
    limit = address_limit()
    if limit is None or limit >= ENOUGH_BYTES:
        return
    command = [sys.executable, "-P", "-m", "gptj.backends.surroundings", backend, str(limit - SPARE_BYTES)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise LimitError(f"cannot be tried: {error.strerror}", where=where) from None
    if done.returncode:
        raise LimitError(
            f"{framework} cannot be loaded in this little memory",
            where=where,
            found=f"a limit of {limit:,} bytes of address space",
            hint="Raise it: ulimit -v unlimited",
        )


def require_current_folder(backend: str) -> None:
    """Refuse to load a backend's framework where the current folder is gone.

    Raises:
        BackendError: it is.
    """
    try:
        os.getcwd()  # noqa: PTH109  (nothing but whether there is one)
    except OSError:
        problem, hint = "cannot be loaded from a current folder that is gone", "Change to a folder that is there"
        raise BackendError(problem, where=f"gptj.{backend}", hint=hint) from None


def _try(backend: str, limit: int) -> None:
    """Let the framework generate, which makes all of its threads, within a limit of the address space."""
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    wing = importlib.import_module(f"gptj.{backend}")
    config = wing.GPTJConfig(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    with wing.on_device("cpu"):
        wing.GPTJForCausalLM(config).generate([[1, 2]], max_new_tokens=2)


if __name__ == "__main__":
    _try(sys.argv[1], int(sys.argv[2]))
