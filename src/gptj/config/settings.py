"""Settings: the base of GPTJConfig and GenerationConfig: fields that can be assigned, and transformers' files.

An assignment is a `replace` in place: the whole is validated anew, and either holds afterwards or nothing changed.
A class says which of its fields cannot be assigned, and what to write instead. Attributes that are no fields are
kept in `extra`, where unknown keys of the file are too, and can be read as attributes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from gptj.config.dtypes import dtype_name
from gptj.config.file import ALIASES
from gptj.errors import ConfigError, WriteError, did_you_mean, shown
from gptj.paths import WEIGHTS_SUFFIXES, find_beside, is_folder, missing_folder, path_called, require_path
from gptj.paths.hub import split_hub_arguments
from gptj.paths.json_file import read_json_object

__all__ = ["DTYPE_KEYS", "READ_AS", "Settings", "default_members", "plain_extra"]

DTYPE_KEYS = ("torch_dtype", "dtype")

READ_AS: dict[str, Any] = {
    "model_type": "gptj",
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "architectures": None,
    "attribute_map": ALIASES,
    "pruned_heads": {},
    "is_composition": False,
    "name_or_path": "",
    "_name_or_path": "",
    "tokenizer_class": None,
    "task_specific_params": None,
    "_commit_hash": None,
}
"""Attributes of transformers' configs that its tools read of every model, and their values where no file says more."""


class Settings:
    """The base of both configs; each is a dataclass whose last field is `extra`.

    Its hash is that of what cannot change, so it stays good as the key of a dict after an assignment.
    """

    FILE: ClassVar[str]
    extra: Mapping[str, Any]

    def replace(self, /, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The members of the file."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """The members of the file that are not the defaults."""
        raise NotImplementedError

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The settings in the file, or in the folder that holds one."""
        raise NotImplementedError

    @classmethod
    def _file_in(cls, path: str | os.PathLike[str]) -> Path:
        """The file that is meant: `path` itself, or the one in that folder. A link out of the folder is said."""
        path = Path(path)
        inside = path / cls.FILE
        if not is_folder(path) or (path.name == cls.FILE and not os.path.lexists(inside)):
            return path
        return find_beside(path, cls.FILE) or inside

    @classmethod
    def read_members(cls, path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
        """The file that is meant by `path`, itself or the folder that holds it, and the members of its JSON object.

        Raises:
            ConfigError: not JSON, or no object, or a weights file.
        """
        path = cls._file_in(path)
        if path.suffix in WEIGHTS_SUFFIXES and path.is_file():
            hint = "Give the folder it lies in"
            raise ConfigError(f"a weights file, not a {cls.FILE}", file=path, hint=hint)
        return path, read_json_object(path, error=ConfigError)

    def opened_from(self, name: str | os.PathLike[str]) -> Self:
        """A copy whose `name_or_path` says where it was opened. No file says so: paths stay on their machine."""
        copy = self.replace()
        object.__setattr__(copy, "_opened_from", os.fspath(name))
        return copy

    # ---- attributes

    def __getattr__(self, name: str) -> Any:
        if name in ("name_or_path", "_name_or_path") and "_opened_from" in self.__dict__:
            return self.__dict__["_opened_from"]
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        meant = None if name.startswith("_") else did_you_mean(name, dir(type(self)))
        raise AttributeError(f"{type(self).__name__} has no {name!r}" + (f". {meant}" if meant else ""))

    def __setattr__(self, name: str, value: Any) -> None:
        if "extra" not in self.__dict__:  # the last field: until then the object is being made
            object.__setattr__(self, name, value)
            return
        self._become(self._with(name, value))

    def __delattr__(self, name: str) -> None:
        if name not in self.extra:
            raise ConfigError("cannot be deleted", where=name, hint="Assign None where that is allowed")
        self._become(self.replace(extra={key: value for key, value in self.extra.items() if key != name}))

    def _with(self, name: str, value: Any) -> Self:
        """A copy after the assignment of one attribute.

        Raises:
            ConfigError: it cannot be assigned, or breaks a rule.
        """
        raise NotImplementedError

    def _with_extra(self, name: str, value: Any) -> Self:
        """A copy with an attribute that is no field."""
        if isinstance(getattr(type(self), name, None), property):
            raise ConfigError("follows from the other fields", where=name, found=shown(value))
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot be kept in {self.FILE}: {error}", where=name, found=shown(value)) from None
        return self.replace(extra={**self.extra, name: value})

    def _become(self, other: Self) -> None:
        """Take on every field of `other`."""
        self.__dict__.update(copy.copy(other).__dict__)

    def update(self, config_dict: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """Assign several at once, validated as a whole; nothing is left over, so the returned dict is empty.

        Raises:
            ConfigError: as an assignment does. Then nothing changed.
        """
        changes = {**(config_dict or {}), **changes}
        together = {name: value for name, value in changes.items() if self._is_plain(name)}
        changed = self.replace(**together)
        for name, value in changes.items():
            changed = changed if name in together else changed._with(name, value)
        self._become(changed)
        return {}

    def _is_plain(self, name: str) -> bool:
        """Whether an assignment of this attribute is a `replace` of one field and nothing more."""
        raise NotImplementedError

    # ---- files

    @classmethod
    @path_called("pretrained_model_name_or_path")
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> Self:
        """The settings in a folder, or in a repository of the hub, with some fields changed.

        Args:
            directory: a folder, the file itself, or a repository id.
            overrides: fields to change; and revision, cache_dir, token, local_files_only, force_download, subfolder.

        Raises:
            MissingFileError: there is no such folder, repository or file.
            ConfigError: the file, or an override, breaks a rule.
        """
        place, overrides = split_hub_arguments(overrides)
        path = place.locate(directory, patterns=("*.json",)) / place.subfolder
        if not os.path.lexists(path):
            raise missing_folder(path, "no such file or folder")
        found = cls.from_file(path)
        return (found.replace(**overrides) if overrides else found).opened_from(directory)

    @path_called("save_directory")
    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """The file stands in the folder, which is made if need be.

        Raises:
            WriteError: it cannot be written. What stood there stays.
        """
        self.to_json_file(require_path(directory) / self.FILE, use_diff=False)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of the file, by default without the fields that are at their defaults."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the text of `to_json_string` into a file.

        Raises:
            WriteError: it cannot be written. What stood there stays.
        """
        path = require_path(json_file_path, "json_file_path")
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("x") as stream:
                stream.write(self.to_json_string(use_diff))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            raise WriteError(f"cannot be written: {error.strerror or error}", file=path) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def default_members(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not what its constructor gives them, by name; without `extra`."""
    plain = type(config)()
    names = (field.name for field in dataclasses.fields(config) if field.name != "extra")
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(plain, name)}


def plain_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` in a dict of its own, a framework's dtype object by its name."""
    return {
        key: dtype_name(value) if key in DTYPE_KEYS and value is not None and not isinstance(value, str) else value
        for key, value in extra.items()
    }
