"""File systems whose n-th call fails, or ends the process: `for n in 1, 2, ...` until a run meets none."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from gptj.writing.file_system import FileSystem

CALLS = [name for name in vars(FileSystem) if not name.startswith("_")]


def _wrapped(name: str) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any) -> Any:
        self.before(name, *arguments)
        return None if name == "fsync" else getattr(FileSystem, name)(self, *arguments)

    return call


class WatchedFileSystem(FileSystem):
    """Calls `before` ahead of every system call. Does not wait for the disk, which no test here takes power from."""

    def __init__(self) -> None:
        self.count = 0

    def before(self, name: str, *arguments: Any) -> None:
        self.count += 1


for _name in CALLS:
    setattr(WatchedFileSystem, _name, _wrapped(_name))


class FailingFileSystem(WatchedFileSystem):
    """Fails the n-th call, and with `for_good` every call after it; `without` are calls that the system has not."""

    def __init__(self, n: int, number: int, *, for_good: bool = False, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.n, self.number, self.for_good, self.without = n, number, for_good, without
        self.failed: str | None = None

    def before(self, name: str, *arguments: Any) -> None:
        super().before(name)
        if self.count == self.n or (self.for_good and self.count > self.n):
            self.failed = self.failed or name
            if name == "close":  # which gives the descriptor up even when it fails
                os.close(arguments[0])
            raise OSError(self.number, os.strerror(self.number))
        if name in self.without:
            raise OSError(errno.EPERM if name == "link" else errno.ENOSYS, "not here")


class KillingFileSystem(FailingFileSystem):
    """Ends the process, as a power cut would, ahead of the n-th call."""

    def before(self, name: str, *arguments: Any) -> None:
        if self.count + 1 == self.n:
            os.kill(os.getpid(), signal.SIGKILL)
        super().before(name, *arguments)
