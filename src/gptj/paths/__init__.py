"""Paths: whether a folder is there, which was meant where it is not, and files that no link leads out of their folder.

A model's folder may come from a stranger, and a link in it may lead to anything that this user may read. Its weights,
index, config and manifest, and an adapter's files, are refused as links out of it, and what is carried into another
folder as it is. What is read into a tokenizer or generation settings is followed, and said.

`hub.py` finds the folder of a repository of the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from gptj.errors import FormatError, InputError, MissingFileError, UnsafeFileError, shown, warn_of

__all__ = [
    "WEIGHTS_SUFFIXES",
    "find_beside",
    "is_folder",
    "kind_of_path",
    "likely_folder",
    "missing_folder",
    "path_called",
    "require_path",
    "safe_path",
]

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".ckpt")

_MOST_NAMES = 10_000
"""Names beside a missing folder that are looked through for the one that is meant."""


P = ParamSpec("P")
T = TypeVar("T")


def path_called(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator of a method whose first argument, a path, may be given by transformers' name for it too."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def called(*args: Any, **options: Any) -> T:
            if name not in options:
                return method(*args, **options)
            if len(args) > 1 or "directory" in options:
                raise InputError("is given already, as the first argument", where=name, found=shown(options[name]))
            return method(*args, options.pop(name), **options)

        return called

    return decorate


def likely_folder(path: str | os.PathLike[str]) -> str | None:
    """The sentence that names the neighbour which a folder's name is nearly spelt as, if there is one."""
    path = Path(path)
    try:
        with os.scandir(path.parent) as entries:
            beside = [entry.name for entry in itertools.islice(entries, _MOST_NAMES) if entry.is_dir()]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"Did you mean {shown(path.with_name(close[0]))}?" if close else None


def missing_folder(path: str | os.PathLike[str], problem: str) -> MissingFileError:
    """The error of a model's folder that is not there: the neighbour that is meant, else what can be given."""
    hint = likely_folder(path) or "Give a model's folder, or a repository of the Hugging Face hub as OWNER/NAME"
    return MissingFileError(problem, file=path, hint=hint)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there. A name that is too long, or behind a closed door, is none: its reader says so."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def require_path(value: str | os.PathLike[str], where: str = "directory") -> Path:
    """The path that a caller gave.

    Raises:
        InputError: it is none, such as None, bytes, or the empty text, which would mean the current folder.
    """
    if isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str) and text:
        return Path(text)
    raise InputError("not a path", where=where, expected="a text that is not empty, or a Path", found=shown(value))


def safe_path(directory: Path, name: str, *, follow_links: bool = False) -> Path:
    """The path of a regular file in the directory, which no link leads out of it.

    A link may lead to the directory's own files, or from a snapshot of the Hugging Face Hub's cache to its blobs
    (`models--x--y/snapshots/<revision>/name` to `models--x--y/blobs/<hash>`), or anywhere with `follow_links`.

    Raises:
        MissingFileError, FormatError, UnsafeFileError: it is not there, not a regular file, or outside.
    """
    path = directory / name
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = path.resolve(strict=True)
            if not follow_links and not _is_inside(directory.resolve(), target):
                raise UnsafeFileError(
                    "is a link out of its folder",
                    file=path,
                    found=shown(target),
                    hint="Put the file itself there, or say follow_links where that can be said: gptj convert, inspect "
                    "and verify have --follow-links",
                )
            status = target.stat()
    except FileNotFoundError:
        found = shown(f"a link to {path.readlink()}") if path.is_symlink() else None
        raise MissingFileError("no such file", file=path, found=found) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, UnsafeFileError):
            raise
        raise FormatError(f"cannot be looked at: {getattr(error, 'strerror', None) or error}", file=path) from None
    if not stat.S_ISREG(status.st_mode):
        found = kind_of_path(status.st_mode)
        raise FormatError("not a regular file", file=path, expected="a regular file", found=found)
    return path


def find_beside(directory: Path, name: str) -> Path | None:
    """The path of a file that a folder may have, None where it has none; a link out of the folder is said.

    Raises:
        MissingFileError, FormatError: it is a link that leads nowhere or in a circle, or not a regular file.
    """
    if not os.path.lexists(directory / name):
        return None
    try:
        return safe_path(directory, name)
    except UnsafeFileError as error:
        warn_of("is a link out of its folder, and is followed", file=error.file, found=error.found)
        return safe_path(directory, name, follow_links=True)


def _is_inside(directory: Path, target: Path) -> bool:
    """Whether the resolved target lies in the resolved directory, or in its Hub cache's blobs."""
    if target.is_relative_to(directory):
        return True
    is_snapshot = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")
    return is_snapshot and target.parent == directory.parent.parent / "blobs"


def kind_of_path(mode: int) -> str:
    """The kind of a path by its `stat` mode, in words."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
