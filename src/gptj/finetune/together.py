"""A run that several processes make as one: the first one speaks and names, each computes and writes its own parts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gptj.errors import GPTJError, InputError, WriteError, shown
from gptj.finetune.checkpoints import Identity, RunFolder
from gptj.finetune.curve import Row
from gptj.finetune.loop import Progress
from gptj.reading.folder import Checkpoint
from gptj.reading.same_model import require_same_model
from gptj.sharding import Processes
from gptj.writing.file_system import write_error

__all__ = ["SharedRunFolder", "Team"]

T = TypeVar("T")

_SIGN = ".sign-"
"""In OUT's checkpoints, for a moment: what the first process writes for the others to see."""

_PATIENCE_S = 10.0
"""Seconds for which the others look for it: a network's file system keeps what it saw of a folder for some seconds."""


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of a run, which all call each method, in one order.

    Attributes:
        talk: a wing's module `processes`.
        processes: which of them this is.
    """

    talk: Any
    processes: Processes

    @classmethod
    def of(cls, backend: str) -> Team:
        """The processes that the launcher started for that framework."""
        talk: Any = importlib.import_module(f"gptj.{backend}.processes")
        return cls(talk, talk.join_processes())

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
        failed = [rank for rank, text in enumerate(self.talk.gather_texts("failed" if error else "")) if text]
        if error is not None and failed[0] == self.processes.rank:
            raise error
        if failed:
            raise SystemExit(1)
        return result

    def require_alike(self, mine: Identity, checkpoint: Checkpoint) -> None:
        """Refuse to train what is not the same in every process, as where each host has files of its own.

        Args:
            mine: the facts of the run.
            checkpoint: the model that it begins with.

        Raises:
            InputError: naming what is another than the first process'.
            SystemExit: in another process it is.
        """
        now = json.loads(json.dumps(mine.to_dict()))
        first = json.loads(self.talk.gather_texts(json.dumps(now))[0])
        changed = mine.changes(first) or [(shown(key), first[key], now[key]) for key in now if first[key] != now[key]]

        def require() -> None:
            if changed:
                where, before, found = changed[0]
                raise InputError(
                    f"process {self.processes.rank} on {socket.gethostname()} has another than the first", where=where,
                    expected=shown(before), found=shown(found),
                    hint="Give every host the same command and the same files",
                )  # fmt: skip

        self.agree(require)
        self.agree(lambda: require_same_model(checkpoint, self.processes.rank, self.talk.gather_texts, facts={}))

    def any(self, mine: bool) -> bool:
        """Whether any process says so."""
        return any(self.talk.gather_texts("yes" if mine else ""))


class SharedRunFolder(RunFolder):
    """A `RunFolder` that all processes are in: the first makes, names and removes, and the others wait for it."""

    def __init__(self, folder: Path, *, resume: bool, team: Team) -> None:
        super().__init__(folder, resume=resume)
        self.team = team

    def __enter__(self) -> RunFolder:
        self.team.agree(lambda: super(SharedRunFolder, self).__enter__() if self.team.first else self)
        try:
            self._require_shared()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _require_shared(self) -> None:
        """Require that what the first process writes is there for the others.

        Raises:
            WriteError: in the first of those for which it is not.
            SystemExit: in the others.
        """
        token = self.team.talk.gather_texts(secrets.token_hex(8))[0]
        self.team.agree(lambda: self._sign(token) if self.team.first else None)
        try:
            self.team.agree(lambda: None if self.team.first else self._find(token))
        finally:
            if self.team.first:
                (self.checkpoints / f"{_SIGN}{token}").unlink()

    def _sign(self, token: str) -> None:
        path = self.checkpoints / f"{_SIGN}{token}"
        try:
            path.touch()
        except OSError as error:
            raise write_error(path, error) from error

    def _find(self, token: str) -> None:
        """Wait for it, on a file system that may take its time."""
        patience_s = time.monotonic() + _PATIENCE_S
        while not (self.checkpoints.is_dir() and f"{_SIGN}{token}" in os.listdir(self.checkpoints)):  # noqa: PTH208
            if time.monotonic() > patience_s:
                raise WriteError(
                    f"process {self.team.processes.rank} on {socket.gethostname()} does not see what the first one "
                    "writes", file=self.folder, expected="a folder that all processes share",
                    hint="Put OUT on a file system that every host has at the same path",
                )  # fmt: skip
            time.sleep(0.1)

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
        write(stage)  # where it fails the others may wait in the midst of theirs, and nobody would agree
        self.team.agree(lambda: None)
        self.team.agree(lambda: self.finish(progress, identity, rows) if self.team.first else None)
        return final
