"""`gptj` and `python -m gptj`: an interrupt ends it with status 130, without a traceback, from the first import on."""

from __future__ import annotations

import math
import os
import signal
from typing import NoReturn

LEAST_BYTES = 175_000_000
"""Of address space: with less, NumPy's own libraries end the process in words of theirs (measured on 2 cores)."""


def run() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until there is anything to put in order, an interrupt may fall into any library's import.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    if _address_limit() < LEAST_BYTES:
        _leave_for_memory()
    try:
        from gptj.command.main import main
    except MemoryError:
        _leave_for_memory()
    main()


def _address_limit() -> float:
    """Bytes of address space that this process may have; infinite where there is no limit, and on Windows."""
    try:
        import resource
    except ImportError:
        return math.inf
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if soft == resource.RLIM_INFINITY else soft


def _leave_for_memory() -> NoReturn:
    """End with a line that says so; what it takes to make an error of ours is not there."""
    os.write(2, b"gptj: LimitError: too little memory to begin. Where it is limited, raise it: ulimit -v unlimited\n")
    os._exit(1)


if __name__ == "__main__":
    run()
