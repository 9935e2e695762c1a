"""The place of a model's folder: a local path, or a repository of the Hugging Face hub in its local cache.

`huggingface_hub` (the extra `hub`) does the fetching and keeps the cache; offline (HF_HUB_OFFLINE=1, or no network) it
gives what the cache has. Only configs, tokenizer files and weights are asked for, never code; pickles and the other
foreign weights only by the converter, and only where a repository has no safetensors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj.errors import InputError, MissingFileError, install_line, shown
from gptj.paths import likely_folder, require_path

__all__ = ["HUB_ARGUMENTS", "HubPlace", "is_repository_id", "locate", "locate_source", "split_hub_arguments"]

WANTED_FILES = ("*.json", "*.safetensors", "merges.txt")
FOREIGN_WEIGHTS = ("*.bin", "*.h5", "*.msgpack")
"""Weights that the converter reads besides, in the order in which it is looked for."""

_REPOSITORY = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A place in the hub and its cache: the arguments of `from_pretrained` that are the hub client's.

    A folder that exists is taken as it is; of these, only `subfolder` means something there.

    Attributes:
        revision: a branch, tag or commit; also said as "owner/name@revision".
        cache_dir: in place of the client's own cache.
        token: for private repositories; True means the one that the client has stored.
        local_files_only: take what the cache has, and ask nobody.
        force_download: fetch what the cache has already, too.
        subfolder: a folder inside the repository, or inside the folder.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def locate(self, name_or_path: str | os.PathLike[str], *, patterns: Sequence[str] = WANTED_FILES) -> Path:
        """The folder of a local path, or of a repository id such as "EleutherAI/gpt-j-6b".

        A path that exists is taken as it is. What cannot be a repository id is returned too, for its reader to refuse.

        Raises:
            MissingFileError: no such folder, and the hub's client is not installed, or neither it nor its cache has it.
            InputError: it is no path at all, such as None; or two revisions.
        """
        path = require_path(name_or_path)
        if not is_repository_id(name_or_path):
            return path
        if importlib.util.find_spec("huggingface_hub") is None:
            hint = likely_folder(path) or f"To take it from the Hugging Face hub: {install_line('hub')}"
            raise MissingFileError("no such folder", file=path, hint=hint)
        from huggingface_hub import snapshot_download

        repository, options = self._options(os.fspath(name_or_path))
        folder = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        try:
            return Path(
                snapshot_download(repository, **options, allow_patterns=[folder + pattern for pattern in patterns])
            )
        except Exception as error:  # the client has a tree of its own, over those of its HTTP library
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MissingFileError(
                "no such folder, and the Hugging Face hub and its cache did not give it",
                file=path,
                found=shown(first),
                hint=likely_folder(path) or "Name an existing folder, or fetch the repository while online",
            ) from None

    def _options(self, name: str) -> tuple[str, dict[str, Any]]:
        """The repository, and of what the client is asked that which differs from its own defaults."""
        parts = _REPOSITORY.fullmatch(name)
        assert parts is not None
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise InputError(
                "no revision", where="revision", expected="a branch, tag or commit", found=shown(self.revision)
            )
        if parts["revision"] and self.revision not in (None, parts["revision"]):
            raise InputError("two revisions", where="revision", expected=parts["revision"], found=self.revision)
        members = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del members["subfolder"]
        members["revision"] = parts["revision"] or self.revision
        defaults = HubPlace()
        given = {name: value for name, value in members.items() if value != getattr(defaults, name)}
        return parts["id"], given


HUB_ARGUMENTS = frozenset(field.name for field in dataclasses.fields(HubPlace))


def split_hub_arguments(arguments: Mapping[str, Any]) -> tuple[HubPlace, dict[str, Any]]:
    """The arguments that are the hub client's, and the others; None is as good as nothing."""
    mine = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS and value is not None}
    return HubPlace(**mine), {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}


def is_repository_id(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is no path that exists but could be a repository of the hub: owner/name, or owner/name@revision.

    Raises:
        InputError: it is no path at all.
    """
    require_path(name_or_path)
    text = os.fspath(name_or_path)
    return bool(_REPOSITORY.fullmatch(text)) and not os.path.lexists(text)


def locate(name_or_path: str | os.PathLike[str], *, place: HubPlace = HubPlace()) -> Path:
    """The folder of a local path or of a repository id; see `HubPlace.locate`."""
    return place.locate(name_or_path)


def locate_source(name_or_path: str | os.PathLike[str], *, place: HubPlace = HubPlace()) -> Path:
    """The same for a reader of every format: of a repository without safetensors, the other weights that it has.

    Raises:
        MissingFileError: see `HubPlace.locate`.
    """
    folder = place.locate(name_or_path)
    if not is_repository_id(name_or_path):
        return folder
    for pattern in FOREIGN_WEIGHTS:
        if any(any(folder.glob(known)) for known in ("*.safetensors", *FOREIGN_WEIGHTS)):
            break
        folder = place.locate(name_or_path, patterns=(*WANTED_FILES, pattern))
    return folder
