"""Processes that belong together, started with the variables that torchrun sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any


def start(processes: int, *words: Any, **variables: Any) -> list[subprocess.Popen[str]]:
    """`python WORDS` in so many processes."""
    while True:
        with socket.socket() as free, socket.socket() as next_one:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            try:
                next_one.bind(("127.0.0.1", port + 1))
                break
            except OSError:  # somebody has that one
                continue
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
              "JAX_ENABLE_X64": 0, **variables}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **{name: str(value) for name, value in shared.items()}, "RANK": str(n),
                 "LOCAL_RANK": str(n)},
        )
        for n in range(processes)
    ]  # fmt: skip


def run(processes: int, *words: Any, timeout_s: float = 300, **variables: Any) -> list[tuple[int, str, str]]:
    """The status of each, and what it said on stdout and stderr."""
    running = start(processes, *words, **variables)
    said = [process.communicate(timeout=timeout_s) for process in running]
    return [(process.returncode, *words) for process, words in zip(running, said, strict=True)]
