"""The system calls that a writer makes, in one object, so that a test can fail the n-th of them for every n."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from gptj.errors import WriteError

__all__ = ["FileSystem", "call_at", "make_folder", "write_error"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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

    def write_direct(self, descriptor: int, data: memoryview) -> int:
        """How many bytes of `data`, pages to be put at a page of the file, were written past the page cache.

        EINVAL where the system or the file system has no such way.
        """
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        import fcntl  # where O_DIRECT is, this is

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            return os.write(descriptor, data)
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)

    def seek(self, descriptor: int, offset: int) -> None:
        """Continue at `offset`."""
        os.lseek(descriptor, offset, os.SEEK_SET)

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        """How many of the next bytes were read into `buffer`."""
        with io.FileIO(descriptor, "rb", closefd=False) as stream:
            return stream.readinto(buffer)

    def open(self, path: Path) -> int:
        """A descriptor for reading, of a file or a folder."""
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def fsync(self, descriptor: int) -> None:
        """Force what was written to the disk."""
        os.fsync(descriptor)

    def drop_pages(self, descriptor: int) -> None:
        """Ask the kernel to forget what it holds of a file in memory, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

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
        """The number of bytes that an ordinary user may still write on this file system."""
        import shutil

        return shutil.disk_usage(path).free


def write_error(path: Path, error: OSError) -> WriteError:
    """Convert an error of the operating system, met while writing `path`, to a WriteError, with a hint if one fits."""
    hints = {
        errno.ENOSPC: "Free some space, or write to another disk",
        errno.EDQUOT: "Your quota is used up",
        errno.EROFS: "The file system is read-only",
        errno.EFBIG: "Files are limited to a smaller size here (ulimit -f)",
        errno.EACCES: "You may not write there",
        errno.EPERM: "You may not write there",
        errno.EBUSY: "A mount point cannot be replaced; write into a folder inside it",
        errno.ENOTDIR: "A file stands in the way; give another name",
        errno.EEXIST: "Something else has that name, maybe a link to nowhere; give another",
        errno.EXDEV: "It is another file system than the folder above it; write into a folder inside it",
    }
    problem = f"could not be written: {error.strerror or error}"
    failure = WriteError(problem, file=path, hint=hints.get(error.errno or 0))
    failure.errno = error.errno
    return failure


def call_at(path: Path, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """`function(*arguments)`, an OSError of which becomes a WriteError that names `path`."""
    try:
        return function(*arguments, **named)
    except OSError as error:
        raise write_error(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        WriteError: it could not be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
