"""manifest.json: the hash of every file and tensor of a checkpoint, and where it came from.

Other tools ignore the file. It is what notices a flipped bit, or two layers of equal shape that changed places:
neither shows in any header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptj.errors import FormatError, MissingFileError, shown
from gptj.json_file import read_json_object
from gptj.safetensors_file import BLOCK_BYTES, file_identity, open_regular_file, read_into, read_safetensors
from gptj.tally import CastRecord, ValueRecord
from gptj.weight_files import LARGEST_INDEX_BYTES, listed, safe_path

__all__ = [
    "CONFIG_HASH_KEY",
    "MANIFEST_FILE",
    "CastRecord",
    "FileRecord",
    "Fingerprint",
    "Manifest",
    "Origin",
    "TensorRecord",
    "ValueRecord",
    "verify_manifest",
]

MANIFEST_FILE = "manifest.json"
CONFIG_HASH_KEY = "gptj.config_sha256"
"""The key of `GPTJConfig.architecture_sha256` in a weights file's metadata."""

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file's size, and the hash of its first `hashed_bytes`.

    That is all of a small file. Of a weights file it is the header: each tensor behind it has a hash of its own,
    and to hash 12 GB a second time would take as long as writing them.
    """

    nbytes: int
    sha256: str
    hashed_bytes: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a tensor came from: the source's files, by their path in it, and how the tensor was made of them."""

    files: tuple[str, ...]
    rule: str


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor as it is stored.

    Attributes:
        file, dtype, shape: where and what.
        sha256: of its bytes.
        values: its extremes, and its elements that are not finite.
        cast: what a narrowing cast did; None where nothing was narrowed.
        origin: where it came from; None where the writer was not told.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    values: ValueRecord
    cast: CastRecord | None = None
    origin: Origin | None = None

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> TensorRecord:
        """The record of its members in JSON; TypeError or KeyError where they are not those of one."""
        cast, origin = members.get("cast"), members.get("origin")
        settled = {
            "shape": tuple(members["shape"]),
            "values": ValueRecord(**members["values"]),
            "cast": None if cast is None else CastRecord(**cast),
            "origin": None if origin is None else Origin(tuple(origin["files"]), origin["rule"]),
        }
        return cls(**{**members, **settled})


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A few numbers of the reference's forward pass, by which a config or matrix that fits but is wrong is seen.

    Attributes:
        token_ids: the prompt.
        output: "logits", or "hidden_state" for a model without a language-model head; of the last position.
        places: which of its elements were kept.
        values: those elements.
        norm: the square root of the sum of the squares of all elements.
    """

    token_ids: tuple[int, ...]
    output: str
    places: tuple[int, ...]
    values: tuple[float, ...]
    norm: float

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint of its members in JSON; TypeError where they are not those of one."""
        lists = {key: tuple(members[key]) for key in ("token_ids", "places", "values")}
        return cls(**{**members, **lists})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        tool: what wrote the checkpoint, `gptj 0.1.0`.
        config_sha256: the config's `architecture_sha256`.
        files: by name.
        tensors: by name, in schema order.
        provenance: where the weights came from; whatever the writer was told.
        fingerprint: of the forward pass; None where none was asked for.
    """

    tool: str
    config_sha256: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    provenance: Mapping[str, Any]
    fingerprint: Fingerprint | None = None

    @property
    def sha256(self) -> str:
        """One hash of the whole: of every tensor's name, dtype, shape and hash, in schema order.

        It does not depend on how the tensors are cut into files, nor on where they came from.
        """
        rows = [[name, record.dtype, list(record.shape), record.sha256] for name, record in self.tensors.items()]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, "sha256": self.sha256, **dataclasses.asdict(self)}, indent=1) + "\n"

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
            whole, fingerprint = members.pop("sha256"), members.pop("fingerprint", None)
            files = {name: FileRecord(**record) for name, record in members.pop("files").items()}
            tensors = {name: TensorRecord.from_dict(record) for name, record in members.pop("tensors").items()}
            taken = None if fingerprint is None else Fingerprint.from_dict(fingerprint)
            manifest = cls(files=files, tensors=tensors, fingerprint=taken, **members)
            _require_kinds(manifest)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"not a manifest: {shown(error)}", file=path) from None
        if manifest.sha256 != whole:
            raise FormatError(
                "its tensors are not those of its hash: it was edited",
                file=path,
                where="sha256",
                expected=shown(whole),
                found=manifest.sha256,
            )
        return manifest


def _require_kinds(manifest: Manifest) -> None:
    """Raise TypeError unless everything that is computed with later is of its kind."""
    for name, record in manifest.files.items():
        if not name.isprintable() or set(name) & set("/\\:") or name in ("", ".", ".."):
            raise TypeError(f"{shown(name)} is not a plain file name")
        if not _are([record.nbytes, record.hashed_bytes], int) or min(record.nbytes, record.hashed_bytes) < 0:
            raise TypeError(f"the sizes of {shown(name)} are not whole numbers, 0 or above")
    for name, tensor in manifest.tensors.items():
        if not _are([tensor.file, tensor.dtype, tensor.sha256], str) or not _are(tensor.shape, int):
            raise TypeError(f"the record of {shown(name)} has a member of another kind")
    taken = manifest.fingerprint
    if taken is not None and not (
        _are([*taken.token_ids, *taken.places], int) and _are([*taken.values, taken.norm], float)
    ):
        raise TypeError("the fingerprint holds something else than numbers")
    if not isinstance(manifest.provenance, dict):
        raise TypeError("the provenance is not an object")


def _are(values: Iterable[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


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
    nbytes, sha256 = _hash_of_start(path, record.hashed_bytes)
    begins_right = sha256 == record.sha256
    if not recorded:
        return [] if begins_right and nbytes == record.nbytes else [f"{shown(name)} differs"]
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
    return problems or ([] if begins_right and nbytes == record.nbytes else [f"the header of {name} differs"])


def _hash_of_start(path: Path, hashed_bytes: int) -> tuple[int, str]:
    """A file's size, and the hash of its first bytes; it must not change meanwhile."""
    digest = hashlib.sha256()
    with open_regular_file(path) as stream:
        before = file_identity(stream)
        count = min(hashed_bytes, before[2])
        buffer = memoryview(bytearray(min(BLOCK_BYTES, count)))
        for start in range(0, count, BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, count - start)]
            read_into(stream, block, start, file=path, where="data")
            digest.update(block)
        if file_identity(stream) != before:
            raise FormatError("changed while being read", file=path)
    return before[2], digest.hexdigest()
