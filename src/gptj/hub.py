"""Where a model's folder is: a local path, or a repository of the Hugging Face hub in its local cache.

`huggingface_hub` (the extra `hub`) does the fetching and keeps the cache; offline (HF_HUB_OFFLINE=1, or no network) it
gives what the cache has. Only configs, tokenizer files and safetensors are asked for, never code or pickles.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from gptj.errors import MissingFileError, shown
from gptj.extras import install_line

__all__ = ["locate"]

WANTED_FILES = ["*.json", "*.safetensors", "merges.txt"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a local path, or of a repository id such as "EleutherAI/gpt-j-6b".

    A path that exists is taken as it is. What cannot be a repository id is returned too, for its reader to refuse.

    Raises:
        MissingFileError: no such folder, and the hub's client is not installed, or neither it nor its cache has it.
    """
    path = Path(name_or_path)
    text = os.fspath(name_or_path)
    if path.exists() or not isinstance(text, str) or not _REPOSITORY.fullmatch(text):
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        hint = f"To take it from the Hugging Face hub: {install_line('hub')}"
        raise MissingFileError("no such folder", file=path, hint=hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=WANTED_FILES))
    except Exception as error:  # the client has a tree of its own, over those of its HTTP library
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingFileError(
            "no such folder, and the Hugging Face hub and its cache did not give it",
            file=path,
            found=shown(first),
            hint="Name an existing folder, or fetch the repository while online",
        ) from None
