"""A directory written as a whole: made beside its place, forced to the disk, and swapped in with one rename.

At every moment, also after a crash, the target is the old directory or the new one, never a mixture. The stage
`.<name>.gptj-stage-<pid>` lies beside the target, so that the swap stays inside one file system. A lock
`.<name>.gptj-lock`, which the kernel lets go of when its holder dies, keeps a second writer out; so whoever
holds it knows that every stage that is still there belongs to nobody, and clears it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

import filelock

from gptj.errors import WriteError, shown
from gptj.writing.file_system import FileSystem, call_at, write_error
from gptj.writing.output_file import BLOCK_BYTES, OutputFile

__all__ = ["NO_LINKS", "Fate", "OutputDirectory"]

_log = logging.getLogger("gptj")
_P = ParamSpec("_P")
_T = TypeVar("_T")

Fate = Literal["keep", "replace", "refuse"]
"""The treatment of a file of the old directory: carried over, left behind, or a reason not to overwrite."""

_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Error numbers of a hard link where the file system has no links, or allows none to this file."""


class OutputDirectory:
    """`with OutputDirectory(target) as output:` write files with `create`, then `commit()`; else nothing happened.

    Args:
        target: where the directory will stand. Its parent must exist.
        overwrite: whether a directory with something in it may be replaced.
        fate: of each file that stands in the old directory.
        adopt: whether a stage that a dead writer left, given the names in it, is to be continued. Then `adopted`
            are those names; and when this writer is interrupted its stage is left for the next in its turn.
        fs: the system calls.

    Attributes:
        last: the file without which the directory is nothing, and which is therefore placed last (`SharedDirectory`).

    Raises:
        WriteError: the target may not be replaced, is being written by another process, or a system call failed.
    """

    last = "config.json"

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        fate: Callable[[str], Fate] = lambda name: "replace",
        adopt: Callable[[list[str]], bool] | None = None,
        fs: FileSystem | None = None,
    ) -> None:
        self.asked = Path(target)
        self.overwrite = overwrite
        self.fate = fate
        self.adopt = adopt
        self.adopted: list[str] = []
        self.fs = FileSystem() if fs is None else fs
        self.committed = False
        self._files: list[OutputFile] = []
        self._leaving: list[Callable[[], object]] = []

    # ---- the life of an output

    def __enter__(self) -> OutputDirectory:
        self._choose_names()
        self._require_writable_place()
        self._lock()
        try:
            abandoned = self._recover()
            self._require_replaceable()
            if abandoned is None:
                self.call(self.stage, self.fs.mkdir, self.stage)
            elif abandoned != self.stage:
                self.call(self.stage, self.fs.rename, abandoned, self.stage)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for callback in self._leaving:
                with contextlib.suppress(Exception):
                    callback()
            for file in self._files:
                with contextlib.suppress(WriteError):
                    file.close()
            interrupted = kind is not None and not issubclass(kind, Exception)
            if not self.committed and not (interrupted and self.adopt is not None):
                self._clear(self.stage)
        finally:
            self._unlock()

    def create(self, name: str) -> OutputFile:
        """A new file of the stage."""
        file = OutputFile(self.fs, self.stage / name)
        self._files.append(file)
        return file

    def on_leaving(self, callback: Callable[[], object]) -> None:
        """Call this when the directory is left in any way, before its files are closed."""
        self._leaving.append(callback)

    def is_file(self, name: str) -> bool:
        """Whether an adopted stage has a regular file of this name; a link or a FIFO is none."""
        if name not in self.adopted:
            return False
        status = self._status(self.stage / name)
        return status is not None and stat.S_ISREG(status.st_mode)

    def remove(self, name: str) -> None:
        """Remove a file, or an empty folder, of the stage."""
        self._remove(self.stage / name)

    def write_file(self, name: str, data: bytes) -> str:
        """Write a whole file; returns its sha256, which has been compared with what the disk gives back."""
        file = self.create(name)
        file.write(data)
        found, _ = file.finish()
        if found != hashlib.sha256(data).hexdigest():
            raise WriteError("what was read back differs from what was written", file=file.path)
        return found

    def rename(self, old: str, new: str) -> None:
        """Give a file of the stage another name."""
        self.call(self.stage / new, self.fs.rename, self.stage / old, self.stage / new)

    def require_space(self, nbytes: int) -> None:
        """Make sure, as well as can be known now, that `nbytes` fit on the file system."""
        try:
            free = self.fs.free_bytes(self.stage)
        except OSError:  # some network file systems do not say
            return
        if free < nbytes:
            raise WriteError(
                "not enough space", file=self.target.parent, expected=f"{nbytes} bytes free", found=f"{free} bytes"
            )

    def sync_tree(self) -> None:
        """Force to the disk what a library wrote into the stage by itself, in folders of it too."""
        for path in sorted(self.stage.rglob("*")):
            self._sync_folder(path)

    def commit(self) -> None:
        """Swap the stage in, durably; the old directory is then removed."""
        self._require_replaceable()  # it may have changed while the stage was written
        self._carry_over()
        self._sync_folder(self.stage)
        replaced = self._swap_in()
        self.committed = True
        if replaced is not None:
            self._clear(replaced)

    def call(self, path: Path, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """`function(*arguments)`, an OSError of which becomes a WriteError that names `path`."""
        return call_at(path, function, *arguments, **named)

    # ---- before

    def _choose_names(self) -> None:
        try:
            self.target = Path(os.path.realpath(self.asked))
        except (OSError, ValueError) as error:
            raise WriteError(f"cannot be a place to write to: {error}", file=shown(self.asked)) from None
        name = self.target.name
        if not name:
            raise WriteError("a file system's root cannot be replaced", file=self.target)
        if len(os.fsencode(name)) > 200:  # so that the stage's name stays under the usual 255 bytes
            name = hashlib.sha256(os.fsencode(name)).hexdigest()
        parent = self.target.parent
        self._stage_prefix = f".{name}.gptj-stage-"
        self._lock_path = parent / f".{name}.gptj-lock"
        self._backup = parent / f".{name}.gptj-old"
        self._placing_prefix = f".{name}.gptj-placing-"
        self._placing_path = parent / f"{self._placing_prefix}{os.getpid()}"
        self.stage = parent / f"{self._stage_prefix}{os.getpid()}"

    def _status(self, path: Path) -> os.stat_result | None:
        """lstat, or None where nothing stands."""
        try:
            return self.fs.status(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise write_error(path, error) from error

    def _require_writable_place(self) -> None:
        parent = self._status(self.target.parent)
        if parent is None or not stat.S_ISDIR(parent.st_mode):
            problem = "no such folder" if parent is None else "not a folder"
            raise WriteError(problem, file=self.target.parent, hint=f"Make it before {self.target.name} is written")

    def _lock(self) -> None:
        self._held = filelock.FileLock(self._lock_path, timeout=0)
        try:
            self._held.acquire()
        except filelock.Timeout:
            raise WriteError(f"is being written by {self._other_writer()}", file=self.target) from None
        except OSError as error:
            raise write_error(self.target, error) from error
        except RuntimeError:  # filelock's word for a lock that this very thread holds
            raise WriteError("is being written by this process", file=self.target) from None

    def _unlock(self) -> None:
        # Unlinked while it is held: whoever waits for the old file sees that it has no name and tries again.
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        self._held.release()

    def _other_writer(self) -> str:
        stages = [name for name in os.listdir(self.target.parent) if name.startswith(self._stage_prefix)]  # noqa: PTH208
        return f"process {stages[0].removeprefix(self._stage_prefix)}" if stages else "another process"

    def _recover(self) -> Path | None:
        """Undo what writers that died left behind: put the old directory back, clear their stages.

        Returns the one stage that is to be continued, or None.
        """
        backup, target = self._status(self._backup), self._status(self.target)
        if backup is not None and target is None:
            self.call(self.target, self.fs.rename, self._backup, self.target)
            _log.warning("%s: put back; a writer died while it was being replaced", self.target)
        elif backup is not None:
            self._clear(self._backup, strictly=True)
        continued: Path | None = None
        for name in self.call(self.target.parent, self.fs.names, self.target.parent):
            if name.startswith(self._placing_prefix) and name.removeprefix(self._placing_prefix).isdecimal():
                self._undo_placing(self.target.parent / name)
                continue
            if not name.startswith(self._stage_prefix) or not name.removeprefix(self._stage_prefix).isdecimal():
                continue
            stage = self.target.parent / name
            if continued is None and self.adopt is not None and self._is_folder(stage):
                self.adopted = self._tree(stage)
                if self.adopt(self.adopted):
                    continued = stage
                    continue
                self.adopted = []
            self._clear(stage, strictly=True)
            why = "" if self.adopt is None else "; it had finished no weights file, so all begins again"
            _log.warning("%s: cleared, the unfinished output of a process that died%s", stage, why)
        return continued

    def _undo_placing(self, placing: Path) -> None:
        """Clear a stage whose writer died while it gave its files names in the target, or just after.

        It died after that where the last one stands there; then the others are the target's own.
        """
        if self._status(self.target) is not None and self._status(self.target / self.last) is None:
            self._take_back(placing, self.call(placing, self.fs.names, placing))
        self._clear(placing, strictly=True)
        _log.warning("%s: cleared, the unfinished output of a process that died", placing)

    def _take_back(self, placing: Path, names: Sequence[str]) -> None:
        """Remove the files of these names, which stand in a stage, from the target too: the last one first.

        They are one file under two names; a file of anybody else's, or one that was written since, is another.
        """
        for name in reversed(names):
            mine, theirs = self._status(placing / name), self._status(self.target / name)
            if mine is not None and theirs is not None and os.path.samestat(mine, theirs):
                self.call(self.target / name, self.fs.unlink, self.target / name)

    def _look_at_old(self) -> list[str]:
        """Names of what stands at the target; none where there is no such folder.

        Raises:
            WriteError: it is a file, the current folder, or holds something that was not said to be replaced.
        """
        self._old = self._status(self.target)
        self._old_modes: dict[str, int] = {}
        self._carried: list[str] = []
        if self._old is None:
            return []
        if not stat.S_ISDIR(self._old.st_mode):
            raise WriteError("is a file; a directory is to be written", file=self.target)
        self._require_not_current(self._old)
        names = self.call(self.target, self.fs.names, self.target)
        if names and not self.overwrite:
            raise WriteError(
                f"is not empty: it holds {shown(names[0])}", file=self.target, hint="Say overwrite=True, or --overwrite"
            )
        return names

    def _require_replaceable(self) -> None:
        """Decide the fate of what stands at the target, before any work."""
        for name in self._look_at_old():
            status = self._status(self.target / name)
            if status is None or not stat.S_ISREG(status.st_mode):
                raise WriteError(
                    f"holds {shown(name)}, which is not a plain file",
                    file=self.target,
                    hint="A directory is replaced as a whole; write into a new one",
                )
            fate = self.fate(name)
            if fate == "refuse":
                raise WriteError(
                    f"holds {shown(name)}, which would be lost", file=self.target, hint="Move it away first"
                )
            self._old_modes[name] = stat.S_IMODE(status.st_mode)
            if fate == "keep":
                self._carried.append(name)

    def _require_not_current(self, status: os.stat_result) -> None:
        """Refuse the folder that this process stands in: it is replaced by another one, and whoever is in it stays."""
        try:
            here = Path.cwd().stat()
        except OSError:
            return  # it is gone, so it is not this one
        if os.path.samestat(status, here):
            raise WriteError(
                "is the current folder, which cannot be replaced while you are in it",
                file=self.target,
                hint="Name a new one",
            )

    # ---- after

    def _carry_over(self) -> None:
        """Bring along the old directory's other files, and the modes of those that are written anew."""
        if self._old is None:
            return
        written = set(self.call(self.stage, self.fs.names, self.stage))
        for name in self._carried:
            if name not in written:
                self._link_or_copy(name)
        for name in written & self._old_modes.keys():
            self.call(self.stage / name, self.fs.chmod, self.stage / name, self._old_modes[name])
        self.call(self.stage, self.fs.chmod, self.stage, stat.S_IMODE(self._old.st_mode))

    def _link_or_copy(self, name: str) -> None:
        old, new = self.target / name, self.stage / name
        try:
            self.fs.link(old, new)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise write_error(new, error) from error
        source = self.call(old, self.fs.open, old)
        try:
            file = self.create(name)
            buffer = memoryview(bytearray(BLOCK_BYTES))
            while count := self.call(old, self.fs.read_into, source, buffer):
                file.write(buffer[:count])
            file.finish()
        finally:
            self.call(old, self.fs.close, source)
        self.call(new, self.fs.chmod, new, self._old_modes[name])

    def _swap_in(self) -> Path | None:
        """The stage stands at the target, and the disk knows it; returns where the old directory went."""
        if self._old is None:
            self._rename_durably([(self.stage, self.target)])
            return None
        try:
            self.fs.exchange(self.stage, self.target)
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise write_error(self.target, error) from error
            self._rename_durably([(self.target, self._backup), (self.stage, self.target)])
            return self._backup
        try:
            self._sync_folder(self.target.parent)
        except BaseException:
            self.committed = True  # were the next call to fail, the stage would be the old directory: not to be cleared
            try:
                self.fs.exchange(self.stage, self.target)
            except OSError as error:
                raise WriteError(
                    f"was replaced, but neither could be forced to the disk nor taken back: {error.strerror}",
                    file=self.target,
                    hint=f"The old directory is {self.stage.name} beside it",
                ) from error
            self.committed = False
            raise
        return self.stage

    def _rename_durably(self, moves: list[tuple[Path, Path]]) -> None:
        """All the moves, then the parent's fsync; where one fails, those done are taken back."""
        done: list[tuple[Path, Path]] = []
        try:
            for old, new in moves:
                self.call(new, self.fs.rename, old, new)
                done.append((old, new))
            self._sync_folder(self.target.parent)
        except BaseException:
            for old, new in reversed(done):
                self.call(old, self.fs.rename, new, old)
            raise

    def _sync_folder(self, folder: Path) -> None:
        """Force a folder, or a file, to the disk."""
        if os.name == "nt":  # folders cannot be opened there
            return
        descriptor = self.call(folder, self.fs.open, folder)
        try:
            self.call(folder, self.fs.fsync, descriptor)
        finally:
            self.call(folder, self.fs.close, descriptor)

    def _clear(self, folder: Path, *, strictly: bool = False) -> None:
        """Remove a stage, or an old directory; what cannot be removed now is left for the next run, and said."""
        try:
            status = self._status(folder)
            if status is None:
                return
            if not stat.S_ISDIR(status.st_mode):  # a link, say, and what it leads to is not ours to clear
                self.call(folder, self.fs.unlink, folder)
                return
            for name in self._tree(folder):
                self._remove(folder / name)
            self.call(folder, self.fs.rmdir, folder)
        except WriteError as error:
            if strictly:
                raise
            _log.warning("%s: could not be removed: %s", folder, error.problem)

    def _tree(self, folder: Path, prefix: str = "") -> list[str]:
        """Every path below `folder`, what is in a folder before the folder; a link is a leaf, wherever it leads."""
        paths = []
        for name in self.call(folder, self.fs.names, folder):
            if self._is_folder(folder / name):
                paths += self._tree(folder / name, f"{prefix}{name}/")
            paths.append(prefix + name)
        return paths

    def _is_folder(self, path: Path) -> bool:
        return stat.S_ISDIR(self.call(path, self.fs.status, path).st_mode)

    def _remove(self, path: Path) -> None:
        self.call(path, self.fs.rmdir if self._is_folder(path) else self.fs.unlink, path)
