"""A TPU checkpoint in a .tar or .tar.zst, as they are published, read without unpacking it.

The members of a tar lie in it as they are, so an .npz in it is read where it lies. A .tar.zst has no such places:
it is decompressed once into a file beside the temporary files, of at most a stated size, and read there; the file
goes when the checkpoint is let go of. Nothing is ever extracted under a name from the archive, so none can lead
anywhere; links, devices and sparse members, which no checkpoint has, are refused all the same, by name.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import FormatError, GPTJError, LimitError, MissingFileError, UnsafeFileError, WriteError, shown
from gptj.paths.json_file import parse_json_object
from gptj.reading.files import open_regular_file, read_into
from gptj.reading.kinds import HEAD_BYTES, describe_file
from gptj.reading.npz import NpzFile, open_npz
from gptj_conversion.mesh.checkpoint import MeshCheckpoint
from gptj_conversion.mesh.folder import LARGEST_META_BYTES, MeshFolder, looks_like_mesh
from gptj_conversion.mesh.reader import open_mesh_folder
from gptj_conversion.mesh.tar_members import TarMember, tar_members
from gptj_conversion.mesh.training_config import TrainingConfig
from gptj_conversion.mesh.zstd_frames import is_zstandard, unpack

__all__ = ["TAR_SUFFIXES", "is_tar", "is_tar_name", "open_tar"]

TAR_SUFFIXES = (".tar", ".tar.zst", ".tar.zstd")
SPOOL_BYTES = 200 * 10**9
SPOOL_RATIO = 30
"""How much more than itself an archive may unpack to; weights shrink by a third at best."""

_ROOM_BYTES = 2**20  # beyond that, for small archives


def is_tar_name(path: Path) -> bool:
    """Whether a file is called as such archives are."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def is_tar(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` is such an archive, whatever it is called."""
    return is_zstandard(head) or describe_file(head, size) == "a tar archive"


def open_tar(
    path: str | os.PathLike[str],
    *,
    config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None = None,
    spool_directory: str | os.PathLike[str] | None = None,
) -> MeshCheckpoint:
    """The checkpoint in an archive: a step directory or a model directory, at any depth.

    Args:
        path: the .tar, or .tar.zst.
        config: as for `open_mesh`.
        spool_directory: where a .tar.zst is decompressed to; None is the system's temporary folder.

    Raises:
        UnsafeFileError: a member is a link or device, or its name leads outside.
        LimitError: the archive unpacks to more than `SPOOL_BYTES`, or to more than 30 times its own size.
        BackendError: zstandard is not installed.
        GPTJError: it is malformed; and what `open_mesh` raises.
    """
    path = Path(path)
    with open_regular_file(path) as stream:
        nbytes = os.fstat(stream.fileno()).st_size
        start = bytearray(min(HEAD_BYTES, nbytes))
        read_into(stream, memoryview(start), 0, file=path, where="beginning")
    head = bytes(start)
    if not is_zstandard(head):
        kind = describe_file(head, nbytes)
        if kind not in (None, "a tar archive"):
            raise FormatError(f"this is {kind}", file=path, expected="a .tar, or a .tar.zst", found=f"{nbytes} bytes")
        return open_mesh_folder(_find_root(path, path), config)
    folder = Path(tempfile.mkdtemp(prefix="gptj-spool-", dir=spool_directory))
    try:
        spool = folder / "checkpoint.tar"
        _decompress(path, spool, min(SPOOL_BYTES, SPOOL_RATIO * nbytes + _ROOM_BYTES))
        checkpoint = open_mesh_folder(_find_root(spool, path), config)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


def _decompress(path: Path, spool: Path, limit: int) -> None:
    """Write what `path` unpacks to into `spool`."""
    written = 0
    try:
        with spool.open("xb") as out:
            for block in unpack(path):
                written += len(block)
                if written > limit:
                    raise LimitError(
                        "unpacks to more than is allowed",
                        file=path,
                        expected=f"at most {limit} bytes",
                        found="more",
                        hint="Unpack it yourself if it is what it should be",
                    )
                out.write(block)
    except OSError as error:
        if isinstance(error, GPTJError):
            raise
        raise WriteError(f"could not be unpacked: {error.strerror}", file=spool, hint="Choose another TMPDIR") from None


# ---- the members


@dataclasses.dataclass(frozen=True)
class _Member:
    """The place of a file in the archive."""

    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _TarFolder:
    """A folder in an archive.

    Attributes:
        path: the archive's path and the folder's, which errors name.
        file: the file to read.
        tree: for each name in it, a file or the same again.
    """

    path: Path
    file: Path
    tree: Mapping[str, Any]

    def names(self) -> list[str]:
        """The names in it, sorted."""
        return sorted(self.tree)

    def has_folder(self, name: str) -> bool:
        """Whether `name` is a folder in it."""
        return isinstance(self.tree.get(name), dict)

    def folder(self, name: str) -> MeshFolder:
        """The folder of this name in it."""
        tree = self.tree[name]
        if not isinstance(tree, dict):
            raise FormatError("not a folder", file=self.path / name)
        return _TarFolder(self.path / name, self.file, tree)

    def _member(self, name: str) -> _Member:
        member = self.tree[name]
        if not isinstance(member, _Member):
            raise FormatError("not a file", file=self.path / name)
        return member

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in one of its files."""
        member = self._member(name)
        if member.nbytes > LARGEST_META_BYTES:
            raise LimitError("too large", file=self.path / name, expected=f"at most {LARGEST_META_BYTES} bytes")
        data = bytearray(member.nbytes)
        with open_regular_file(self.file) as stream:
            read_into(stream, memoryview(data), member.offset, file=self.path, where=name)
        return parse_json_object(bytes(data), file=self.path / name)

    def open_npz(self, name: str) -> NpzFile:
        """One of its files as an .npz, headers checked."""
        member = self._member(name)
        return open_npz(self.path / name, container=self.file, begin=member.offset, nbytes=member.nbytes)

    def require_inside(self, names: Iterable[str]) -> None:
        """Links have been refused already."""


def _find_root(file: Path, label: Path) -> _TarFolder:
    """The folder of the archive that looks like a checkpoint: the top, or the one folder in it, and so on."""
    tree: dict[str, Any] = {}
    with open_regular_file(file) as stream:
        for member in tar_members(stream, label):
            _add(tree, member, label)
    folder = _TarFolder(label, file, tree)
    while not looks_like_mesh(folder):
        below = [name for name in folder.names() if folder.has_folder(name)]
        if len(below) != 1:
            raise MissingFileError("no checkpoint in it", file=folder.path, expected="step_N or shard_0 folders")
        folder = _TarFolder(folder.path / below[0], file, folder.tree[below[0]])
    return folder


def _add(tree: dict[str, Any], member: TarMember, label: Path) -> None:
    """Put a member into the tree, after it has been found to have a plain name."""
    where = shown(member.name)
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    leads_outside = member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name
    if leads_outside or not member.name.isprintable() or len(parts) > 16:
        raise UnsafeFileError(
            "the member's name leads outside", file=label, where=where, expected="a plain relative name"
        )
    if not member.is_folder and not parts:
        raise FormatError("a file without a name", file=label, where=where)
    folder = tree
    for part in parts if member.is_folder else parts[:-1]:
        folder = folder.setdefault(part, {})
        if not isinstance(folder, dict):
            raise FormatError("the member lies in a file", file=label, where=where)
    if not member.is_folder:
        if parts[-1] in folder:
            raise FormatError("the member stands twice in the archive", file=label, where=where)
        folder[parts[-1]] = _Member(member.offset, member.nbytes)
