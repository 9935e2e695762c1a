"""Files beside a model's weights: the names that new ones may have, and the fate of those that stand there.

The same in every format: a model's own files are replaced, another format's weights are not thrown away, and the rest
is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from gptj.config import CONFIG_FILE
from gptj.errors import InputError, shown
from gptj.reading.manifest import MANIFEST_FILE
from gptj.reading.weight_files import is_weights_name
from gptj.writing.output_directory import Fate

__all__ = ["check_extra_files", "choose_fate", "require_plain_name"]

_WEIGHTS = re.compile(
    r"((pytorch_model|tf_model|flax_model|model\.weights).*\.(bin|h5|msgpack)|model(.*\.[\w-]+)?\.safetensors)"
    r"(\.index(\.[\w-]+)?\.json)?"
)


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


def choose_fate(name: str, is_own: Callable[[str], bool]) -> Fate:
    """The fate of a file of an old directory, by its name.

    Args:
        name: the file's.
        is_own: whether the format that is written names its weights files or their index so.
    """
    if name in (CONFIG_FILE, MANIFEST_FILE) or is_own(name):
        return "replace"
    return "refuse" if _WEIGHTS.fullmatch(name) or is_weights_name(name) else "keep"


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
