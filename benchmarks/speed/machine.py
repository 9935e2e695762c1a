"""What the figures were taken on, and how much of it others had meanwhile."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and system."""
    model = platform.processor() or platform.machine()
    information, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        model = found[1] if found else model
    return {
        "processor": model,
        "cores": CORES,
        "threads": threads,
        "memory_gb": int(memory.read_text().split()[1]) * 1024 / 1e9 if memory.exists() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


class Others:
    """How much of the machine everybody else has used since this was made: the share that spoils a measurement.

    Where the system does not say (it does on Linux), the share is 0.

    Args:
        own: the process ids of ours that are alive, now and then.
    """

    def __init__(self, own: Callable[[], Iterable[int]]) -> None:
        self.own = own
        self.began = self._now()

    def share(self) -> float:
        """Of the time of all cores, 0 to 1."""
        wall_s, busy_s, own_s = (now - began for now, began in zip(self._now(), self.began, strict=True))
        cores = os.cpu_count() or 1
        return min(1.0, max(0.0, (busy_s - own_s) / (wall_s * cores)))

    def _now(self) -> tuple[float, float, float]:
        """Seconds on the clock, of all cores at work or taken by other guests of the host, and of our processes."""
        statistics = Path("/proc/stat")
        if not statistics.exists():
            return time.perf_counter(), 0.0, 0.0
        user, nice, system, _, _, interrupts, soft, stolen = map(int, statistics.read_text().split()[1:9])
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = time.process_time() + ended.ru_utime + ended.ru_stime
        for process in self.own():
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own_s += tick_s * (int(fields[11]) + int(fields[12]))
        return time.perf_counter(), tick_s * (user + nice + system + interrupts + soft + stolen), own_s
