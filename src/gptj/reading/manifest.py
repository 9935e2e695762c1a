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
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.errors import FormatError, GPTJError, MissingFileError, naming_file, shown, warn_of
from gptj.paths.json_file import read_json_object
from gptj.reading.files import BLOCK_BYTES, file_identity, open_regular_file, read_into
from gptj.reading.manifest_records import (
    FileRecord,
    Fingerprint,
    Origin,
    TensorRecord,
    file_record,
    fingerprint,
    hash_of,
    records_of,
    require_file_name,
    tensor_record,
    text_of,
)
from gptj.reading.safetensors_file import read_safetensors
from gptj.reading.tally import CastRecord, ValueRecord, ValueTally
from gptj.reading.weight_files import LARGEST_INDEX_BYTES, list_some, safe_path

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
    "VerifiedManifest",
    "examine_tensor",
    "find_tensors",
    "hash_of_start",
    "tool_name",
    "verify_manifest",
    "warn_of_unchecked",
]

MANIFEST_FILE = "manifest.json"
CONFIG_HASH_KEY = "gptj.config_sha256"
"""The key of `GPTJConfig.architecture_sha256` in a weights file's metadata."""

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

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
    def weights_files(self) -> set[str]:
        """The files that hold the tensors."""
        return {name for record in self.tensors.values() for name in record.files}

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
        with naming_file(path):
            return _manifest_of(members)


@dataclasses.dataclass(frozen=True)
class VerifiedManifest(Manifest):
    """A manifest whose files and tensors have all been read and found to have its hashes.

    Attributes:
        unchecked: what else lies in the directory, and no hash covers; a folder ends with a slash.
    """

    unchecked: tuple[str, ...] = ()


def _manifest_of(members: dict[str, Any]) -> Manifest:
    """The manifest of its members in JSON.

    Raises:
        FormatError: a member is missing, unknown, of another kind, or contradicts another.
    """
    if members.get("format") != FORMAT or type(members["format"]) is not int:
        found = shown(members.get("format"))
        raise FormatError("not a manifest of this kind", where="format", expected=FORMAT, found=found)
    known = {"format", "sha256", *(field.name for field in dataclasses.fields(Manifest))}
    if odd := sorted(known - members.keys() - {"fingerprint", "weights_format"}):
        raise FormatError("a member is missing", where=odd[0])
    if odd := sorted(members.keys() - known):
        raise FormatError("no such member is known", where=shown(odd[0]))
    taken, provenance = members.get("fingerprint"), members["provenance"]
    if not isinstance(provenance, dict):
        raise FormatError("breaks its rule", where="provenance", expected="an object", found=shown(provenance))
    manifest = Manifest(
        text_of(members["tool"], "tool"),
        hash_of(members["config_sha256"], "config_sha256"),
        records_of(members["files"], "files", file_record),
        records_of(members["tensors"], "tensors", tensor_record),
        provenance,
        None if taken is None else fingerprint(taken, "fingerprint"),
        text_of(members.get("weights_format", "safetensors"), "weights_format"),
    )
    _require_consistent(manifest)
    if manifest.sha256 != hash_of(members["sha256"], "sha256"):
        raise FormatError(
            "its tensors are not those of its hash: it was edited",
            where="sha256",
            expected=members["sha256"],
            found=manifest.sha256,
        )
    return manifest


def _require_consistent(manifest: Manifest) -> None:
    """Make sure that files and tensors cover each other, and that the hashes cover all of both."""
    if not manifest.tensors:
        raise FormatError("no tensor is recorded", where="tensors", expected="every tensor of the model")
    for name, tensor in manifest.tensors.items():
        where = f"tensors[{shown(name)}].files"
        if not tensor.files or (manifest.weights_format == "safetensors" and len(tensor.files) != 1):
            raise FormatError("breaks its rule", where=where, expected="where it lies", found=shown([*tensor.files]))
        if unknown := set(tensor.files) - manifest.files.keys():
            raise FormatError("is not among the files", where=where, found=shown(min(unknown)))
    behind_a_header = manifest.weights_files if manifest.weights_format == "safetensors" else set()
    for name, record in manifest.files.items():
        where = f"files[{shown(name)}]"
        require_file_name(name, where, folders=manifest.weights_format == "mesh")
        if name == MANIFEST_FILE:
            raise FormatError("cannot hold a hash of itself", where=where)
        if name not in behind_a_header and record.hashed_bytes != record.nbytes:
            found = f"{record.hashed_bytes} bytes"
            raise FormatError("is not hashed as a whole", where=f"{where}.hashed_bytes", expected=record.nbytes,
                              found=found)  # fmt: skip


def tool_name() -> str:
    """The name and version of this writer, for `Manifest.tool`."""
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
    for name in sorted(manifest.weights_files):
        file = read_safetensors(directory / name)
        header_bytes = min((tensor.offset for tensor in file.tensors.values()), default=-1)
        if manifest.files[name].hashed_bytes != header_bytes:
            raise FormatError(
                "is not the length of its header",
                file=directory / MANIFEST_FILE,
                where=f"files[{shown(name)}].hashed_bytes",
                expected=header_bytes,
                found=manifest.files[name].hashed_bytes,
            )
        for key, tensor in file.tensors.items():
            found[key] = FoundTensor(tensor.dtype, tensor.shape, functools.partial(file.blocks, tensor))
    return found


def examine_tensor(tensor: FoundTensor) -> tuple[str, ValueRecord]:
    """The hash of a tensor of one of `WEIGHT_DTYPES`, and what its values are; all of it is read."""
    dtype = numpy_dtype(tensor.dtype)
    digest, tally = hashlib.sha256(), ValueTally(dtype)
    for block in tensor.blocks():
        digest.update(block)
        tally.add(np.frombuffer(block, dtype))
    return digest.hexdigest(), tally.record()


def verify_manifest(
    directory: Path,
    *,
    config: Callable[[Manifest], GPTJConfig] | None = None,
    find: Callable[[Path, Manifest], Mapping[str, FoundTensor]] = find_tensors,
    follow_links: bool = False,
) -> VerifiedManifest:
    """The directory's manifest, after all files and tensors have been found to have its hashes.

    Args:
        directory: where.
        config: gives the directory's config, which must be the one that the weights were written with; None reads
            its config.json.
        find: opens the weights in the manifest's format.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: there is no manifest.
        FormatError: some file or tensor differs; all of them are named. Or the manifest contradicts itself.
        GPTJError: the weights or the config cannot be opened.
    """
    path = safe_path(directory, MANIFEST_FILE, follow_links=follow_links)
    manifest = Manifest.from_file(path)
    files = _file_problems(directory, manifest, follow_links=follow_links)
    tensors: list[tuple[str, tuple[str, ...]]] = []
    if not any("missing" in problem for name, problem in files.items() if name in manifest.weights_files):
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
            f"not what was written: {list_some(problems)}", file=directory, hint="Fetch or convert the checkpoint again"
        )
    if config is None:
        there = GPTJConfig.from_file(safe_path(directory, CONFIG_FILE, follow_links=follow_links))
    else:
        there = config(manifest)
    found = there.architecture_sha256
    if found != manifest.config_sha256:
        raise FormatError(
            "the config is not the one that the weights were written with",
            file=path,
            where="config_sha256",
            expected=manifest.config_sha256,
            found=found,
        )
    members = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(Manifest)}
    return VerifiedManifest(**members, unchecked=tuple(_unlisted_paths(directory, manifest.files)))


_READ = (".json", ".txt", ".safetensors", ".bin", ".h5", ".msgpack", ".npz")


def warn_of_unchecked(directory: Path, manifest: VerifiedManifest) -> None:
    """Warn of files of a verified directory that no hash covers, though a program may read them."""
    if read := [shown(name) for name in manifest.unchecked if name.endswith(_READ)]:
        names = list_some(read)
        warn_of(f"not checked, since {MANIFEST_FILE} has no hash of it: {names}", file=directory)


def _unlisted_paths(directory: Path, files: Collection[str], prefix: str = "") -> Iterator[str]:
    """The paths in the directory that are not among the files; a folder that holds none of them as one."""
    with os.scandir(directory / prefix) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in found:
        path = f"{prefix}{name}"
        if is_folder and any(file.startswith(f"{path}/") for file in files):
            yield from _unlisted_paths(directory, files, f"{path}/")
        elif path not in files and path != MANIFEST_FILE:
            yield f"{path}/" if is_folder else path


def _file_problems(directory: Path, manifest: Manifest, *, follow_links: bool) -> dict[str, str]:
    """Problems of files by their names: one is missing, or differs."""
    problems = {}
    for name, record in manifest.files.items():
        try:
            path = safe_path(directory, name, follow_links=follow_links)
            nbytes, sha256 = hash_of_start(path, record.hashed_bytes)
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
    """Problems of tensors, with the files that each lies in; where some of these are damaged, those alone."""
    problems: list[tuple[str, tuple[str, ...]]] = []
    for name, record in manifest.tensors.items():
        culprits = [file for file in record.files if file in damaged] or [*record.files]
        where = f"tensor {name} in {list_some(culprits, most=3)}"
        tensor = found.get(name)
        if tensor is None:
            problems.append((f"{where} is missing", record.files))
            continue
        if (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            problems.append((f"{where} differs", record.files))
            continue
        try:
            sha256, values = examine_tensor(tensor)
        except FormatError as error:
            problems.append((f"{where} cannot be read ({error.where or error.file}: {error.problem})", record.files))
            continue
        if sha256 != record.sha256:
            problems.append((f"{where} differs", record.files))
        elif values != record.values:
            problems.append((f"{where} has other values than {MANIFEST_FILE} says", record.files))
    problems += [(f"tensor {shown(name)} is not recorded", ()) for name in found.keys() - manifest.tensors.keys()]
    return problems


def hash_of_start(path: Path, hashed_bytes: int) -> tuple[int, str]:
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
