"""A contender's own process: reads a request a line, answers a line, both JSON; the last line of a life is end of file.

    {"do": "bring_in"}                          ->  {"seconds": 1.9, "peak_bytes": 4e8, "made": {"torch": "2.13.0"}}
    {"do": "load"}                              ->  {"seconds": 0.2, "peak_bytes": 5e8, "made": null}
    {"do": "generate", "ids": [[1]], "new": 2}  ->  {"seconds": 0.1, "peak_bytes": 3e9, "made": [[7, 8]]}
    {"do": "what fails"}                        ->  {"error": "ModuleNotFoundError: No module named 'torch'"}

Nobody's library prints to the pipe: what they print goes to standard error. The time of a request is taken here.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.speed import engines


def main() -> None:
    """Serve until the input ends. The argument is the engine's name, folder, options and threads, as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.argv[1])
    bind_to_cores(order["threads"])
    engine = getattr(engines, order["engine"])(order["folder"], order["options"], order["threads"])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(engine, request.pop("do"), request)), file=answers, flush=True)


def answer(engine: engines.Engine, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the engine's method took and gave, or what it raised."""
    start = time.perf_counter()
    try:
        made = getattr(engine, what)(**arguments)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(), "made": made}


def bind_to_cores(threads: int) -> None:
    """Have no more cores than threads, so that a library that counts cores starts as many threads as the others."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def peak_bytes() -> int:
    """The most memory that this process has held, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
