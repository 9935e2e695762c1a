"""manifest.json: the hash of every file and tensor of a checkpoint, and where it came from.

Other tools ignore the file. It is what notices a flipped bit, or two layers of equal shape that changed places:
neither shows in any header.

A tensor's hash is of its canonical bytes: the schema's layout, in C order, little-endian, whatever the format of
the files that hold it. So the manifests of one model in two formats name the same hashes, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from gptj.errors import FormatError, GPTJError, MissingFileError, shown
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
    "FoundTensor",
    "Manifest",
    "Origin",
    "TensorRecord",
    "ValueRecord",
    "find_tensors",
    "tool_name",
    "verify_manifest",
]

MANIFEST_FILE = "manifest.json"
CONFIG_HASH_KEY = "gptj.config_sha256"
"""The key of `GPTJConfig.architecture_sha256` in a weights file's metadata."""

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file's size, and the hash of its first `hashed_bytes`.

    That is all of it, but for a safetensors file's header: each tensor behind it lies there as its own hash has it,
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
        files: those that hold it, by their path in the directory; several where a format cuts tensors.
        dtype, shape: what it is.
        sha256: of its canonical bytes.
        values: its extremes, and its elements that are not finite.
        cast: what a narrowing cast did; None where nothing was narrowed.
        origin: where it came from; None where the writer was not told.
    """

    files: tuple[str, ...]
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
            "files": tuple(members["files"]),
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
        weights_format: of the files, as `gptj convert --to` calls it.
    """

    tool: str
    config_sha256: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    provenance: Mapping[str, Any]
    fingerprint: Fingerprint | None = None
    weights_format: str = "safetensors"

    @property
    def sha256(self) -> str:
        """One hash of the whole: of every tensor's name, dtype, shape and hash, in schema order.

        It depends neither on the format, nor on how the tensors are cut into files, nor on where they came from.
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
        _require_inside(name)
        if not _are([record.nbytes, record.hashed_bytes], int) or min(record.nbytes, record.hashed_bytes) < 0:
            raise TypeError(f"the sizes of {shown(name)} are not whole numbers, 0 or above")
    for name, tensor in manifest.tensors.items():
        if not _are([*tensor.files, tensor.dtype, tensor.sha256], str) or not _are(tensor.shape, int):
            raise TypeError(f"the record of {shown(name)} has a member of another kind")
        if unknown := set(tensor.files) - manifest.files.keys():
            raise TypeError(f"{shown(name)} lies in {shown(min(unknown))}, which is not among the files")
    taken = manifest.fingerprint
    if taken is not None and not (
        _are([*taken.token_ids, *taken.places], int) and _are([*taken.values, taken.norm], float)
    ):
        raise TypeError("the fingerprint holds something else than numbers")
    if not isinstance(manifest.provenance, dict) or not isinstance(manifest.weights_format, str):
        raise TypeError("the provenance is not an object, or the weights' format not a name")


def _require_inside(path: str) -> None:
    """Raise TypeError unless the path is one of a file in the directory or a folder of it."""
    parts = path.split("/")
    if not path.isprintable() or set(path) & set("\\:") or not set(parts).isdisjoint(("", ".", "..")):
        raise TypeError(f"{shown(path)} is not a plain file name")


def _are(values: Iterable[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def tool_name() -> str:
    """What writes here, for `Manifest.tool`."""
    from gptj import __version__

    return f"gptj {__version__}"


@dataclasses.dataclass(frozen=True)
class FoundTensor:
    """A tensor that a directory holds: what its header says, and how to read its canonical bytes in turn."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[memoryview]]


def find_tensors(directory: Path, manifest: Manifest) -> dict[str, FoundTensor]:
    """The tensors in the safetensors files that the manifest names.

    Raises:
        GPTJError: a file cannot be opened.
    """
    if manifest.weights_format != "safetensors":
        raise FormatError(
            "its weights are not safetensors",
            file=directory,
            found=manifest.weights_format,
            hint="Say `gptj verify DIR`",
        )
    found: dict[str, FoundTensor] = {}
    for name in dict.fromkeys(name for record in manifest.tensors.values() for name in record.files):
        file = read_safetensors(directory / name)
        for key, tensor in file.tensors.items():
            found[key] = FoundTensor(tensor.dtype, tensor.shape, functools.partial(file.blocks, tensor))
    return found


def verify_manifest(
    directory: Path,
    *,
    find: Callable[[Path, Manifest], Mapping[str, FoundTensor]] = find_tensors,
    follow_links: bool = False,
) -> Manifest:
    """The directory's manifest, after all files and tensors have been found to have its hashes.

    Args:
        directory: where.
        find: opens the weights in the manifest's format.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: there is no manifest.
        FormatError: some file or tensor differs; all of them are named.
        GPTJError: the weights cannot be opened.
    """
    manifest = Manifest.from_file(safe_path(directory, MANIFEST_FILE, follow_links=follow_links))
    files = _file_problems(directory, manifest, follow_links=follow_links)
    of_weights = {name for record in manifest.tensors.values() for name in record.files}
    tensors: list[tuple[str, tuple[str, ...]]] = []
    if not any("missing" in problem for name, problem in files.items() if name in of_weights):
        try:
            tensors = _tensor_problems(manifest, find(directory, manifest), files.keys())
        except GPTJError:
            if not files:
                raise
    explained = {name for _, names in tensors for name in names}
    problems = [problem for problem, _ in tensors]
    problems += [problem for name, problem in files.items() if name not in explained]
    if problems:
        raise FormatError(
            f"not what was written: {listed(problems)}", file=directory, hint="Fetch or convert the checkpoint again"
        )
    return manifest


def _file_problems(directory: Path, manifest: Manifest, *, follow_links: bool) -> dict[str, str]:
    """What is wrong with files, by their names: nothing, or that one is missing or differs."""
    problems = {}
    for name, record in manifest.files.items():
        try:
            path = safe_path(directory, name, follow_links=follow_links)
            nbytes, sha256 = _hash_of_start(path, record.hashed_bytes)
        except MissingFileError:
            problems[name] = f"{shown(name)} is missing"
            continue
        if sha256 != record.sha256 or nbytes != record.nbytes:
            part = "the header of " if record.hashed_bytes < record.nbytes else ""
            problems[name] = f"{part}{shown(name)} differs"
    return problems


def _tensor_problems(
    manifest: Manifest, found: Mapping[str, FoundTensor], damaged: Collection[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """What is wrong with tensors, and the files that each lies in; where some of these are damaged, those are named."""
    problems: list[tuple[str, tuple[str, ...]]] = []
    for name, record in manifest.tensors.items():
        culprits = [file for file in record.files if file in damaged] or [*record.files]
        where = f"tensor {name} in {listed(culprits, most=3)}"
        tensor = found.get(name)
        if tensor is None:
            problems.append((f"{where} is missing", record.files))
            continue
        try:
            digest = hashlib.sha256()
            for block in tensor.blocks():
                digest.update(block)
        except FormatError as error:
            problems.append((f"{where} cannot be read ({error.where or error.file}: {error.problem})", record.files))
            continue
        if (tensor.dtype, tensor.shape, digest.hexdigest()) != (record.dtype, record.shape, record.sha256):
            problems.append((f"{where} differs", record.files))
    problems += [(f"tensor {shown(name)} is not recorded", ()) for name in found.keys() - manifest.tensors.keys()]
    return problems


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
