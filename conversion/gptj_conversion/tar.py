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
import tarfile
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gptj.config import GPTJConfig
from gptj.errors import BackendError, FormatError, LimitError, MissingFileError, UnsafeFileError, WriteError, shown
from gptj.extras import install_line
from gptj.json_file import parse_json_object
from gptj.safetensors_file import open_regular_file, read_into
from gptj_conversion.mesh import MeshCheckpoint, open_mesh_folder
from gptj_conversion.mesh_folder import LARGEST_META_BYTES, MeshFolder, looks_like_mesh
from gptj_conversion.npz import NpzFile, open_npz
from gptj_conversion.training_config import TrainingConfig

__all__ = ["TAR_SUFFIXES", "is_tar_name", "open_tar"]

TAR_SUFFIXES = (".tar", ".tar.zst", ".tar.zstd")
MOST_MEMBERS = 100_000
LARGEST_HEADER_BYTES = 2**20  # of a member, PAX records included
SPOOL_BYTES = 200 * 10**9
SPOOL_RATIO = 30
"""How much more than itself an archive may unpack to; weights shrink by a third at best."""

_BLOCK = 2**20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def is_tar_name(path: Path) -> bool:
    """Whether a file is called as such archives are."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def open_tar(
    path: str | os.PathLike[str],
    *,
    config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None = None,
    spool_directory: str | os.PathLike[str] | None = None,
    spool_bytes: int = SPOOL_BYTES,
) -> MeshCheckpoint:
    """The checkpoint in an archive: a step directory or a model directory, at any depth.

    Args:
        path: the .tar, or .tar.zst.
        config: as for `open_mesh`.
        spool_directory: where a .tar.zst is decompressed to; None is the system's temporary folder.
        spool_bytes: how large it may become there.

    Raises:
        UnsafeFileError: a member is a link or device, or its name leads outside.
        LimitError: the archive unpacks to more than `spool_bytes`, or to more than 30 times its own size.
        BackendError: zstandard is not installed.
        GPTJError: it is malformed; and what `open_mesh` raises.
    """
    path = Path(path)
    with open_regular_file(path) as stream:
        compressed = stream.read(4) == _ZSTD_MAGIC
        nbytes = path.stat().st_size
    if not compressed:
        return open_mesh_folder(_root(path, path), config)
    folder = Path(tempfile.mkdtemp(prefix="gptj-spool-", dir=spool_directory))
    try:
        spool = folder / "checkpoint.tar"
        _decompress(path, spool, min(spool_bytes, SPOOL_RATIO * nbytes + _BLOCK))
        checkpoint = open_mesh_folder(_root(spool, path), config)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


def _decompress(path: Path, spool: Path, limit: int) -> None:
    """Write what `path` unpacks to into `spool`."""
    try:
        import zstandard
    except ImportError:
        raise BackendError("zstandard is not installed", file=path, hint=install_line("convert")) from None
    written = 0
    try:
        with open_regular_file(path) as packed, spool.open("xb") as out:
            decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
            with decompressor.stream_reader(packed, read_across_frames=True) as stream:
                while block := stream.read(_BLOCK):
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
    except zstandard.ZstdError as error:
        raise FormatError(f"malformed zstandard: {shown(str(error), longest=120)}", file=path) from None
    except OSError as error:
        raise WriteError(f"could not be unpacked: {error.strerror}", file=spool, hint="Choose another TMPDIR") from None


# ---- the members


@dataclasses.dataclass(frozen=True)
class _Member:
    """Where a file of the archive lies."""

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
        """What is in it, sorted."""
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


class _CappedReader:
    """A file that refuses to be read in large pieces: tarfile reads headers whole, however long they say they are."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= LARGEST_HEADER_BYTES:
            raise LimitError("a header too long", file=self._path, expected=f"at most {LARGEST_HEADER_BYTES} bytes")
        return self._stream.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _root(file: Path, label: Path) -> _TarFolder:
    """The folder of the archive that looks like a checkpoint: the top, or the one folder in it, and so on."""
    tree: dict[str, Any] = {}
    with open_regular_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            with tarfile.open(fileobj=_CappedReader(stream, label), mode="r:") as archive:  # type: ignore[call-overload]
                for number, member in enumerate(archive):
                    if number >= MOST_MEMBERS:
                        raise LimitError("too many members", file=label, expected=f"at most {MOST_MEMBERS}")
                    _add(tree, member, size, label)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, UnicodeError) as error:
            if isinstance(error, FormatError | UnsafeFileError):
                raise
            raise FormatError(f"malformed tar: {shown(str(error), longest=120)}", file=label) from None
    folder = _TarFolder(label, file, tree)
    while not looks_like_mesh(folder):
        below = [name for name in folder.names() if folder.has_folder(name)]
        if len(below) != 1:
            raise MissingFileError("no checkpoint in it", file=folder.path, expected="step_N or shard_0 folders")
        folder = _TarFolder(folder.path / below[0], file, folder.tree[below[0]])
    return folder


def _add(tree: dict[str, Any], member: tarfile.TarInfo, size: int, label: Path) -> None:
    """Put a member into the tree, after it has been found to be a plain file or folder with a plain name."""
    where = shown(member.name)
    kinds = (
        (member.issym(), "a symbolic link"),
        (member.islnk(), "a hard link"),
        (member.isdev(), "a device or FIFO"),
        (member.issparse(), "a sparse file"),
        (not (member.isreg() or member.isdir()), f"of type {shown(member.type)}"),
    )
    if kind := next((kind for holds, kind in kinds if holds), None):
        raise UnsafeFileError(f"the member is {kind}", file=label, where=where, expected="plain files and folders")
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    leads_outside = member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name
    if leads_outside or not member.name.isprintable() or len(parts) > 16:
        raise UnsafeFileError(
            "the member's name leads outside", file=label, where=where, expected="a plain relative name"
        )
    if member.isreg() and (not parts or member.size < 0 or member.offset_data + member.size > size):
        raise FormatError(
            "cut short",
            file=label,
            where=where,
            expected=f"{member.offset_data + member.size} bytes",
            found=f"{size} bytes",
        )
    folder = tree
    for part in parts[:-1] if member.isreg() else parts:
        folder = folder.setdefault(part, {})
        if not isinstance(folder, dict):
            raise FormatError("the member lies in a file", file=label, where=where)
    if member.isreg():
        if parts[-1] in folder:
            raise FormatError("the member stands twice in the archive", file=label, where=where)
        folder[parts[-1]] = _Member(member.offset_data, member.size)
