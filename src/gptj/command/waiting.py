"""A line on the terminal while a command works: nothing if it is quick, else what it is doing.

It goes to stderr and is wiped away afterwards. In a pipe or a file there is nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["QUICK_S", "waiting"]

QUICK_S = 2.0
"""Seconds of work that are not worth a line."""


@contextlib.contextmanager
def waiting(
    doing: str, console: Console | None = None, *, after_s: float = QUICK_S, shown: bool = True
) -> Iterator[Callable[[str], None]]:
    """Show on a terminal, from `after_s` on, what is being done and for how long already.

    What it gives is told, from any thread, what is being done instead.

    Args:
        doing: such as "loading gpt-j-6b".
        console: where; None is stderr.
        after_s: seconds of silence.
        shown: whether it is shown at all.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = console or Console(stderr=True, highlight=False)
    if not (shown and console.is_terminal):
        yield lambda doing: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(doing)
    bar.tasks[task].start_time = time.monotonic()
    lock, over = threading.Lock(), False

    def show() -> None:
        with lock:
            if not over:
                bar.start()

    timer = threading.Timer(after_s, show)
    timer.daemon = True
    timer.start()
    try:
        yield lambda doing: bar.update(task, description=doing)
    finally:
        timer.cancel()
        with lock:
            over = True
        bar.stop()
