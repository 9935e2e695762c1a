"""Paths of folders: whether one is there, and which was meant where it is not."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

from gptj.errors import InputError, MissingFileError, shown

__all__ = ["is_folder", "likely_folder", "missing_folder", "require_path"]

_MOST_NAMES = 10_000
"""Names beside a missing folder that are looked through for the one that is meant."""


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
