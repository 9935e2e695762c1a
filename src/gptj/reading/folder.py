"""A folder of safetensors, opened: its config, and the name, shape, dtype and place of every tensor; no data is read.

Safetensors has no place to say that n_head or rotary_dim is another, since neither changes a shape; so the header of a
file written here carries a hash of the config, and a config.json that was edited afterwards is noticed.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.schema import Head
from gptj.errors import ConfigError, FormatError, SchemaError, shown
from gptj.paths import missing_folder
from gptj.reading.kinds import describe_folder
from gptj.reading.manifest import CONFIG_HASH_KEY, VerifiedManifest, verify_manifest, warn_of_unchecked
from gptj.reading.safetensors_file import SafetensorsFile, StoredTensor
from gptj.reading.weight_files import INDEX_FILE, WEIGHTS_FILE, open_weights, safe_path, split_weights
from gptj.reading.weight_names import PlainNames, head_of, infer_dialect, plain_names

__all__ = ["Checkpoint", "open_checkpoint", "require_config", "require_directory", "verify_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened directory. Files are open only while something is read from them.

    Attributes:
        directory: where it is.
        config: of config.json, or the one that was passed.
        tensors: what is stored, by the name in the file, in the order of the data.
        metadata: the headers' `__metadata__`, of all files together.
        head: on top of the blocks, as the names say.
        files: the files that hold the tensors.
        names: the model's own names of the tensors.
    """

    directory: Path
    config: GPTJConfig
    tensors: Mapping[str, StoredTensor] = dataclasses.field(repr=False)
    metadata: Mapping[str, str] = dataclasses.field(repr=False)
    head: Head
    files: tuple[SafetensorsFile, ...] = dataclasses.field(repr=False)
    names: PlainNames = dataclasses.field(repr=False)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(file.path for file in self.files)

    def read(self, name: str, dtype: Any = None) -> NDArray[Any]:
        """The tensor in memory of its own, C-contiguous, in its own dtype or in `dtype`.

        Raises:
            FormatError: the file shrank or changed since it was opened.
            SchemaError: there is no such tensor, or a value overflows `dtype`.
            LimitError: there is not enough memory.
        """
        file, tensor = self._find(name)
        return file.read(tensor, dtype)

    def read_slice(self, name: str, axis: int, start: int, stop: int, dtype: Any = None) -> NDArray[Any]:
        """`read(name)` from `start` to `stop` along `axis`, without holding the rest.

        Raises:
            InputError: there is no such axis or part; and what `read` raises.
        """
        file, tensor = self._find(name)
        return file.read_slice(tensor, axis, start, stop, dtype)

    def read_part(self, name: str, parts: tuple[slice, ...], dtype: Any = None) -> NDArray[Any]:
        """`read(name)[parts]`, without reading a byte of the rest.

        Raises:
            SchemaError: there is no such tensor; and what `read` raises.
        """
        file, tensor = self._find(name)
        return file.read_part(tensor, parts, dtype)

    def map(self, name: str) -> NDArray[Any]:
        """The tensor as a writable view of the file, without a copy; writes stay in memory, the file never changes.

        Fast, and shared between processes; but a file that another process cuts short under a map ends this one
        by a signal, so tools that read what they do not own use `read`.
        """
        file, tensor = self._find(name)
        return file.map(tensor)

    def _find(self, name: str) -> tuple[SafetensorsFile, StoredTensor]:
        tensor = self.tensors.get(name)
        if tensor is None:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            raise SchemaError(
                "no such tensor",
                file=self.directory,
                where=shown(name),
                hint=f"Did you mean {close[0]}?" if close else None,
            )
        return next(file for file in self.files if file.path == tensor.file), tensor


def open_checkpoint(
    directory: str | os.PathLike[str],
    *,
    weights: str | None = None,
    config: GPTJConfig | str | os.PathLike[str] | None = None,
    follow_links: bool = False,
) -> Checkpoint:
    """The checkpoint in a directory: its config and every file's header, checked; no data is read.

    Args:
        directory: the folder of config.json and the weights, or a weights file in it.
        weights: the name of the file or the index in it, where there are several.
        config: a config, or the path of one, in place of the directory's. What is passed here is believed: it
            is not compared with the hash that the weights carry.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: the directory, its config or its weights are missing.
        FormatError, LimitError, UnsafeFileError: a file is malformed, or a name or link leads out of the directory.
        SchemaError: index and files contradict each other, or a dtype is unknown.
        ConfigError: a field of config.json breaks its rule, or config.json is not the one the weights were
            written with.
    """
    directory, weights = split_weights(directory, weights)
    require_directory(directory)
    files = open_weights(directory, weights, follow_links=follow_links)
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    config = _choose_config(directory, config, metadata, follow_links=follow_links)
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    names = plain_names(tensors, file=directory, dialect=infer_dialect(metadata, tensors))
    head = head_of(names.plain.values(), tied=config.tie_word_embeddings)
    return Checkpoint(directory, config, tensors, metadata, head, files, names)


def verify_checkpoint(
    directory: str | os.PathLike[str], *, weights: str | None = None, follow_links: bool = False, warn: bool = True
) -> VerifiedManifest:
    """The manifest of a directory, all of whose files and tensors have been read and found to have its hashes.

    What else lies in the directory is not checked: the result's `unchecked` has the names, of which a warning is given.

    Args:
        directory: the folder of config.json, the weights and manifest.json.
        weights: the name of the file or the index in it that is to be loaded, where there are several.
        follow_links: accept links that lead out of the directory.
        warn: whether to warn of what is not checked.

    Raises:
        MissingFileError: the directory has no manifest.json, or a file that it lists is missing.
        FormatError: some file or tensor differs, and all of them are named; the config is another one; or the
            weights that would be loaded are not those of the manifest.
    """
    directory = Path(directory)
    require_directory(directory)
    manifest = verify_manifest(directory, follow_links=follow_links)
    present = [name for name in (WEIGHTS_FILE, INDEX_FILE) if os.path.lexists(directory / name)]
    chosen = present[0] if weights is None and present else weights
    loaded = {file.path.name for file in open_weights(directory, chosen, follow_links=follow_links)}
    if strange := sorted(loaded - manifest.weights_files):
        raise FormatError(
            "the weights that would be loaded are not those of the manifest",
            file=directory,
            expected=", ".join(sorted(manifest.weights_files)),
            found=", ".join(strange),
        )
    if warn:
        warn_of_unchecked(directory, manifest)
    return manifest


def require_directory(directory: Path) -> None:
    """Refuse what is no folder.

    Raises:
        MissingFileError: there is nothing.
        FormatError: it is a file, or cannot be looked at.
    """
    try:
        found = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise missing_folder(directory, "no such directory") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be looked at: {error}", file=shown(directory)) from None
    if not directory.is_dir():
        raise FormatError(
            "not a directory",
            file=directory,
            found=f"a file of {found.st_size} bytes",
            hint="Give the folder it lies in",
        )
    if not os.access(directory, os.R_OK | os.X_OK):
        raise FormatError("cannot be read: permission denied", file=directory)


def require_config(directory: Path) -> None:
    """Refuse a folder without config.json that is known to be something else.

    Raises:
        FormatError: with what it is, and what to do.
    """
    if not os.path.lexists(directory / CONFIG_FILE) and (kind := describe_folder(directory, by_weights=False)):
        raise FormatError(f"no model's folder, but {kind[0]}", file=directory, expected=CONFIG_FILE, hint=kind[1])


def _choose_config(
    directory: Path,
    config: GPTJConfig | str | os.PathLike[str] | None,
    metadata: Mapping[str, str],
    *,
    follow_links: bool,
) -> GPTJConfig:
    """The config that was passed, or the directory's, which must be the one that the weights were written with."""
    if isinstance(config, GPTJConfig):
        return config
    if config is not None:
        return GPTJConfig.from_file(config)
    path = safe_path(directory, CONFIG_FILE, follow_links=follow_links)
    stored = GPTJConfig.from_file(path)
    expected = metadata.get(CONFIG_HASH_KEY)
    if expected is not None and expected != stored.architecture_sha256:
        raise ConfigError(
            "not the config that the weights were written with: "
            "n_head, rotary_dim or another field that changes the result was edited",
            file=path,
            expected=f"{CONFIG_HASH_KEY} {expected[:16]}...",
            found=f"{stored.architecture_sha256[:16]}...",
            hint="Restore the field, or pass config= to open it all the same",
        )
    return stored
