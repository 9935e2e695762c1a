"""Files that are written beside a model, as a tokenizer's: which names they may have, the same in every format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from gptj.errors import InputError, shown

__all__ = ["check_extra_files", "require_plain_name"]


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
