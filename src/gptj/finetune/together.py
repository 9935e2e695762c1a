"""A run that several processes make as one: the first one speaks and names, each computes and writes its own parts."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gptj.errors import GPTJError, InputError
from gptj.finetune.checkpoints import Identity, RunFolder
from gptj.finetune.curve import Row
from gptj.finetune.loop import Progress
from gptj.sharding import Processes

__all__ = ["SharedRunFolder", "Team"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of a run, which all call each method, in one order.

    Attributes:
        parallel: a wing's module of that name.
        processes: which of them this is.
    """

    parallel: Any
    processes: Processes

    @classmethod
    def of(cls, backend: str) -> Team:
        """The processes that the launcher started for that framework."""
        if backend == "tf":
            raise InputError("TensorFlow trains whole models", where="cut", expected="backend pt or flax")
        parallel: Any = importlib.import_module(f"gptj.{backend}.parallel")
        return cls(parallel, parallel.join_processes())

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks."""
        return self.processes.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """The work's result, once every process has done its own.

        Raises:
            GPTJError: its own work's, where no process before it failed too.
            SystemExit: another process' work failed, which says so.
        """
        error: GPTJError | None = None
        try:
            result = work()
        except GPTJError as raised:
            error = raised
        failed = [rank for rank, text in enumerate(self.parallel.gather_texts("failed" if error else "")) if text]
        if error is not None and failed[0] == self.processes.rank:
            raise error
        if failed:
            raise SystemExit(1)
        return result

    def any(self, mine: bool) -> bool:
        """Whether one of them says so."""
        return any(self.parallel.gather_texts("yes" if mine else ""))


class SharedRunFolder(RunFolder):
    """A `RunFolder` that all processes are in: the first makes, names and removes, and the others wait for it."""

    def __init__(self, folder: Path, *, resume: bool, team: Team) -> None:
        super().__init__(folder, resume=resume)
        self.team = team

    def __enter__(self) -> RunFolder:
        self.team.agree(lambda: super(SharedRunFolder, self).__enter__() if self.team.first else self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.team.first:
            super().__exit__(kind, error, trace)

    def save(
        self,
        progress: Progress,
        identity: Identity,
        rows: list[Row],
        *,
        write: Callable[[Path], object],
    ) -> Path:
        """Write a checkpoint of all processes' parts; see `RunFolder.save`."""
        final, stage = self.path_of(progress.step), self.stage_of(progress.step)
        if final.exists():
            return final
        self.team.agree(lambda: self.make(stage) if self.team.first else None)
        self.team.agree(lambda: write(stage))
        self.team.agree(lambda: self.finish(progress, identity, rows) if self.team.first else None)
        return final
