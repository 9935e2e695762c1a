"""A directory written as a whole: made beside its place, forced to the disk, and swapped in with one rename.

At every moment, also after a crash, the target is the old directory or the new one, never a mixture. The stage
`.<name>.gptj-stage-<pid>` lies beside the target, so that the swap stays inside one file system. A lock
`.<name>.gptj-lock`, which the kernel lets go of when its holder dies, keeps a second writer out; so whoever
holds it knows that every stage that is still there belongs to nobody, and clears it.

Large runs of bytes that lie page by page go straight to the disk and come straight back from it (O_DIRECT), where
the file system knows how. To fill the page cache with gigabytes that nobody has asked for yet costs more CPU time than
all else that a writer does with them; and what is read back past it is what the disk holds, not what memory remembers.

Each system call goes through one `FileSystem` object, so that a test can fail the n-th of them for every n.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, Protocol, TypeVar

import filelock
import numpy as np

from gptj.errors import InputError, WriteError, shown
from gptj.reading.buffers import PAGE_BYTES, page_aligned

__all__ = [
    "Checksum",
    "Fate",
    "FileSystem",
    "OutputDirectory",
    "OutputFile",
    "check_extra_files",
    "require_plain_name",
    "whole_file",
    "write_error",
]

_log = logging.getLogger("gptj")
_P = ParamSpec("_P")
_T = TypeVar("_T")

Fate = Literal["keep", "replace", "refuse"]
"""What becomes of a file of the old directory: carried over, left behind, or a reason not to overwrite."""

_BLOCK_BYTES = 2**22  # of what is read back; into one buffer, since fresh memory costs more than reading
_DIRECT_BYTES = 2**20  # what is shorter goes through the page cache: a transfer of its own would wait for the disk
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What a link to a file says where the file system has none, or none of this file."""


class Checksum(Protocol):
    """What hashlib's objects are."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """The checksum of everything so far."""


class FileSystem:
    """The system calls that a writer makes, each a method; all raise OSError as the call does."""

    def mkdir(self, path: Path) -> None:
        """Make a folder; its mode follows the umask."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor of a new file, to write and to read; its mode follows the umask."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """How many bytes of `data` were written."""
        return os.write(descriptor, data)

    def seek(self, descriptor: int, offset: int) -> None:
        """Continue at `offset`."""
        os.lseek(descriptor, offset, os.SEEK_SET)

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        """How many of the next bytes were read into `buffer`."""
        with io.FileIO(descriptor, "rb", closefd=False) as stream:
            return stream.readinto(buffer)

    def set_direct(self, descriptor: int, wanted: bool) -> None:
        """Transfer past the page cache from now on, or through it; EINVAL where the system cannot."""
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))

    def open(self, path: Path) -> int:
        """A descriptor for reading, of a file or a folder."""
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def fsync(self, descriptor: int) -> None:
        """Force what was written to the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename; on POSIX an empty folder at `new` gives way."""
        old.rename(new)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two names in one step; ENOSYS where the system cannot."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
        if call is None:
            raise OSError(errno.ENOSYS, "no renameat2 here")
        if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(one))

    def link(self, old: Path, new: Path) -> None:
        """A second name for a file; of a link, for the link itself."""
        os.link(old, new, follow_symlinks=os.link not in os.supports_follow_symlinks)

    def set_times(self, path: Path, like: os.stat_result) -> None:
        """Set when it was last read and changed."""
        os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))

    def chmod(self, path: Path, mode: int) -> None:
        """Set the mode."""
        path.chmod(mode)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def names(self, path: Path) -> list[str]:
        """The names in a folder, sorted."""
        return sorted(os.listdir(path))  # noqa: PTH208 - names that are not UTF-8 stay what they are

    def status(self, path: Path) -> os.stat_result:
        """lstat."""
        return path.lstat()

    def free_bytes(self, path: Path) -> int:
        """What an ordinary user may still write on this file system."""
        import shutil

        return shutil.disk_usage(path).free


class OutputFile:
    """A file of the stage, written from the front; `rewrite` goes back to room that was left."""

    def __init__(self, directory: OutputDirectory, name: str) -> None:
        self.name = name
        self.path = directory.stage / name
        self._directory = directory
        self._may_be_direct = True
        self._direct = False
        self._descriptor = directory.call(self.path, directory.fs.create, self.path)
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        while view:
            pages = len(view) - len(view) % PAGE_BYTES
            direct = pages >= _DIRECT_BYTES and self.nbytes % PAGE_BYTES == 0 and _begins_a_page(view)
            part = view[:pages] if self._set_direct(direct) else view
            count = self._transfer(self._directory.fs.write, part)
            if count <= 0:
                raise WriteError("nothing was written", file=self.path)
            view = view[count:]
            self.nbytes += count

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`, over what stands there or beyond the end, for formats that are not streamed."""
        end = self.nbytes
        self._directory.call(self.path, self._directory.fs.seek, self._descriptor, offset)
        self.nbytes = offset
        self.write(data)
        self.nbytes = max(end, self.nbytes)

    def read_at(self, offset: int, count: int) -> bytes:
        """The bytes at `offset`, fewer than `count` where the file or the system gives no more."""
        self._set_direct(False)
        self._directory.call(self.path, self._directory.fs.seek, self._descriptor, offset)
        buffer = memoryview(bytearray(count))
        found = self._directory.call(self.path, self._directory.fs.read_into, self._descriptor, buffer)
        return bytes(buffer[:found])

    def rewrite(self, data: bytes) -> None:
        """Put `data` at the front, over what stands there, and finish."""
        assert len(data) <= self.nbytes
        self.write_at(0, data)

    def finish(self) -> tuple[str, list[str]]:
        """Force the file to the disk and read it again; returns the sha256 of what it now holds, and []."""
        [whole] = self.read_back([sys.maxsize], hashlib.sha256)
        return whole, []

    def read_back(self, parts: Sequence[int], checksum: Callable[[], Checksum]) -> list[str]:
        """Force the file to the disk, read it again and close it.

        Args:
            parts: the bytes of each part, one after the other, that is to have a checksum of its own.
            checksum: makes one.

        Returns:
            The checksum of each part of what the file now holds. Bytes after the last part count into none, and
            are for the caller to rule out by the file's size.
        """
        fs, call = self._directory.fs, self._directory.call
        call(self.path, fs.fsync, self._descriptor)
        call(self.path, fs.seek, self._descriptor, 0)
        sums = [checksum() for _ in parts]
        left = [*parts]
        number = 0
        for block in self._blocks():
            while len(block) and number < len(parts):
                taken = block[: left[number]]
                sums[number].update(taken)
                left[number] -= len(taken)
                block = block[len(taken) :]
                number += left[number] == 0
        self.close()
        return [part.hexdigest() for part in sums]

    def close(self) -> None:
        """Close the file; closing it twice does no harm."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self._directory.call(self.path, self._directory.fs.close, descriptor)

    def _set_direct(self, wanted: bool) -> bool:
        """Whether the next transfer goes past the page cache."""
        wanted = wanted and self._may_be_direct
        if wanted != self._direct:
            try:
                self._directory.fs.set_direct(self._descriptor, wanted)
                self._direct = wanted
            except OSError as error:
                if self._direct:
                    raise self._directory.error_at(self.path, error) from error
                self._may_be_direct = False
        return self._direct

    def _transfer(self, function: Callable[[int, memoryview], int], part: memoryview) -> int:
        """Write or read `part`; through the page cache where a file system takes O_DIRECT and then refuses it."""
        try:
            return function(self._descriptor, part)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise self._directory.error_at(self.path, error) from error
        self._may_be_direct = False
        self._set_direct(False)
        return self._directory.call(self.path, function, self._descriptor, part)

    def _blocks(self) -> Iterator[memoryview]:
        """The file from here to its end; each block is overwritten by the next."""
        buffer = page_aligned(_BLOCK_BYTES).data
        position = 0
        while True:
            self._set_direct(self.nbytes >= _DIRECT_BYTES and position % PAGE_BYTES == 0)
            count = self._transfer(self._directory.fs.read_into, buffer)
            if not count:
                return
            position += count
            yield buffer[:count]


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
        self._settle_names()
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
        file = OutputFile(self, name)
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
        try:
            return function(*arguments, **named)
        except OSError as error:
            raise self.error_at(path, error) from error

    # ---- before

    def _settle_names(self) -> None:
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
            raise self.error_at(path, error) from error

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
            raise self.error_at(self.target, error) from error
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

    def _require_replaceable(self) -> None:
        """Decide the fate of what stands at the target, before any work."""
        self._old = self._status(self.target)
        self._old_modes: dict[str, int] = {}
        self._carried: list[str] = []
        if self._old is None:
            return
        if not stat.S_ISDIR(self._old.st_mode):
            raise WriteError("is a file; a directory is to be written", file=self.target)
        self._require_not_current(self._old)
        names = self.call(self.target, self.fs.names, self.target)
        if names and not self.overwrite:
            raise WriteError(
                f"is not empty: it holds {shown(names[0])}", file=self.target, hint="Say overwrite to replace it"
            )
        for name in names:
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
                raise self.error_at(new, error) from error
        source = self.call(old, self.fs.open, old)
        try:
            file = self.create(name)
            buffer = page_aligned(_BLOCK_BYTES).data
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
                raise self.error_at(self.target, error) from error
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

    def error_at(self, path: Path, error: OSError) -> WriteError:
        """What a system call's error is to the caller."""
        return write_error(path, error)


def write_error(path: Path, error: OSError) -> WriteError:
    """What an error of the system is to whoever asked for `path` to be written."""
    hints = {
        errno.ENOSPC: "Free some space, or write to another disk",
        errno.EDQUOT: "Your quota is used up",
        errno.EROFS: "The file system is read-only",
        errno.EFBIG: "Files are limited to a smaller size here (ulimit -f)",
        errno.EACCES: "You may not write there",
        errno.EPERM: "You may not write there",
        errno.EBUSY: "A mount point cannot be replaced; write into a folder inside it",
        errno.EXDEV: "It is another file system than the folder above it; write into a folder inside it",
    }
    problem = f"could not be written: {error.strerror or error}"
    failure = WriteError(problem, file=path, hint=hints.get(error.errno or 0))
    failure.errno = error.errno
    return failure


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Callable[[bytes | memoryview], object]]:
    """Give what writes a single file, which takes its place when all of it is on the disk, or not at all.

    Raises:
        WriteError: it could not be written.
    """
    stage = path.with_name(f".{path.name}.gptj-stage-{os.getpid()}")
    try:
        stage.unlink(missing_ok=True)
        with stage.open("xb") as stream:
            yield stream.write
            stream.flush()
            os.fsync(stream.fileno())
        stage.replace(path)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            stage.unlink()


def _begins_a_page(view: memoryview) -> bool:
    return bool(np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0)


def require_plain_name(name: str, *, where: str) -> str:
    """`name`, which is one plain file name.

    Raises:
        InputError: it is empty, a path, hidden, too long, or has control characters in it.
    """
    fits = (
        isinstance(name, str)
        and name
        and name.isprintable()
        and not set(name) & set("/\\:")
        and not name.startswith(".")
    )
    if not fits or len(os.fsencode(name)) > 255:
        raise InputError("not a plain file name", where=where, expected="a name without folders", found=shown(name))
    return name


def check_extra_files(files: Mapping[str, bytes], is_own: Callable[[str], bool]) -> None:
    """Make sure that files can be written beside a checkpoint.

    Args:
        files: by name.
        is_own: whether a name is one that the checkpoint itself uses.

    Raises:
        InputError: a name is no plain file name, or the checkpoint's own; or what it holds is not bytes.
    """
    for name, data in files.items():
        require_plain_name(name, where="extra_files")
        if not isinstance(data, bytes):
            raise InputError("not bytes", where=f"extra_files[{shown(name)}]", found=type(data).__name__)
        if is_own(name):
            raise InputError("a name that the checkpoint itself uses", where="extra_files", found=shown(name))
