"""manifest.json: the hash of every file and tensor of a checkpoint, and where it came from.

Other tools ignore the file. It is what notices a flipped bit, or two layers of equal shape that changed places:
neither shows in any header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj.errors import FormatError, MissingFileError, shown
from gptj.json_file import read_json_object
from gptj.safetensors_file import BLOCK_BYTES, file_identity, open_regular_file, read_into, read_safetensors
from gptj.weight_files import LARGEST_INDEX_BYTES, listed, safe_path

__all__ = ["CONFIG_HASH_KEY", "MANIFEST_FILE", "FileRecord", "Manifest", "TensorRecord", "verify_manifest"]

MANIFEST_FILE = "manifest.json"
CONFIG_HASH_KEY = "gptj.config_sha256"
"""The key of `GPTJConfig.architecture_sha256` in a weights file's metadata."""

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file's size and hash."""

    nbytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor: its file, dtype and shape, and the hash of its bytes as they are stored."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        tool: what wrote the checkpoint, `gptj 0.1.0`.
        config_sha256: the config's `architecture_sha256`.
        files: by name.
        tensors: by name, in schema order.
        provenance: where the weights came from; whatever the writer was told.
    """

    tool: str
    config_sha256: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    provenance: Mapping[str, Any]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Manifest:
        """The manifest in a file.

        Raises:
            MissingFileError, FormatError: it is not there, or not a manifest.
        """
        members = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES)
        if members.pop("format", None) != FORMAT:
            raise FormatError("not a manifest of this kind", file=path, where="format", expected=FORMAT)
        try:
            files = {name: FileRecord(**record) for name, record in members.pop("files").items()}
            tensors = {
                name: TensorRecord(**{**record, "shape": tuple(record["shape"])})
                for name, record in members.pop("tensors").items()
            }
            return cls(files=files, tensors=tensors, **members)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"not a manifest: {shown(error)}", file=path) from None


def verify_manifest(directory: Path, *, follow_links: bool = False) -> Manifest:
    """The directory's manifest, after all files and tensors have been found to have its hashes.

    Raises:
        MissingFileError: there is no manifest.
        FormatError: some file or tensor differs; all of them are named.
    """
    path = safe_path(directory, MANIFEST_FILE, follow_links=follow_links)
    manifest = Manifest.from_file(path)
    problems: list[str] = []
    for name, record in manifest.files.items():
        try:
            problems += _differences(manifest, name, record, safe_path(directory, name, follow_links=follow_links))
        except MissingFileError:
            problems.append(f"{shown(name)} is missing")
    if problems:
        raise FormatError(
            f"not what was written: {listed(problems)}", file=directory, hint="Fetch or convert the checkpoint again"
        )
    return manifest


def _differences(manifest: Manifest, name: str, record: FileRecord, path: Path) -> list[str]:
    """What in a file is not as recorded: nothing, its tensors by name, or the file as a whole."""
    recorded = {key: tensor for key, tensor in manifest.tensors.items() if tensor.file == name}
    if _file_sha256(path) == record.sha256:
        return []
    if not recorded:
        return [f"{shown(name)} differs"]
    file = read_safetensors(path)
    problems = [f"tensor {shown(key)} in {name} is missing" for key in recorded.keys() - file.tensors.keys()]
    problems += [f"tensor {key} in {name} is not recorded" for key in file.tensors.keys() - recorded.keys()]
    for key, tensor in file.tensors.items():
        if key in recorded:
            digest = hashlib.sha256()
            for block in file.blocks(tensor):
                digest.update(block)
            if digest.hexdigest() != recorded[key].sha256:
                problems.append(f"tensor {key} in {name} differs")
    return problems or [f"the header of {name} differs"]


def _file_sha256(path: Path) -> str:
    """The hash of a whole file, which must not change while it is read."""
    digest = hashlib.sha256()
    with open_regular_file(path) as stream:
        before = file_identity(stream)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, before[2])))
        for start in range(0, before[2], BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, before[2] - start)]
            read_into(stream, block, start, file=path, where="data")
            digest.update(block)
        if file_identity(stream) != before:
            raise FormatError("changed while being read", file=path)
    return digest.hexdigest()
