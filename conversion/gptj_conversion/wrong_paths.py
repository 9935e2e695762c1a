"""Messages for a path that no reader knows: the kind of thing that it is, and which path was meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from gptj.errors import ConfigError, FormatError, MissingFileError, shown
from gptj.reading.file_kinds import HEAD_BYTES, kind_of
from gptj.reading.files import open_regular_file
from gptj_conversion.mesh.folder import TRAINING_FILE, DiskFolder, looks_like_mesh

__all__ = ["find_config_file", "read_start", "refuse_what_is_known"]

_SHARD = re.compile(r"shard_\d+")
_NPZ = re.compile(r"\d+\.npz")
_REPOSITORY = "models--"
_MOST_NAMED = 10


def read_start(path: Path) -> tuple[bytes, int]:
    """A regular file's first bytes, and its size; nothing where it is none."""
    try:
        with open_regular_file(path) as stream:
            return stream.read(HEAD_BYTES) or b"", os.fstat(stream.fileno()).st_size
    except (FormatError, OSError):
        return b"", 0


def refuse_what_is_known(path: Path) -> None:
    """Raise the error that names the kind of `path` and the path to give in its place; return where none is known."""
    if path.is_dir():
        _refuse_folder(path)
    elif path.is_file():
        _refuse_file(path)


def _refuse_file(path: Path) -> None:
    head, size = read_start(path)
    if _NPZ.fullmatch(path.name) and _SHARD.fullmatch(path.parent.name):
        _refuse_shard(path, path.parent)
    kind = kind_of(head, size)
    if path.suffix == ".json":
        kind = "a JSON file"
    if kind is None or kind in ("a tar archive", "a zstandard file"):
        return
    raise FormatError(
        f"this is {kind}, no checkpoint",
        file=path,
        expected="a checkpoint's folder, a .tar or .tar.zst, or a weights file",
        found=f"{size} bytes",
        hint=f"Give the folder that holds it: {shown(path.parent)}" if kind == "a JSON file" else None,
    )


def _refuse_shard(path: Path, shard: Path) -> None:
    raise FormatError(
        "one shard of a TPU checkpoint", file=path, expected="the step folder, with all its shards",
        hint=f"Give {shown(shard.resolve().parent)}",
    )  # fmt: skip


def _refuse_folder(path: Path) -> None:
    names = _list_names(path)
    if _SHARD.fullmatch(path.resolve().name) or any(_NPZ.fullmatch(name) for name in names):
        _refuse_shard(path, path)
    if snapshots := list(_find_snapshots(path)):
        raise MissingFileError(
            "the cache of the Hugging Face Hub, not the folder of a model", file=path, expected="a snapshot's folder",
            found=f"{len(snapshots)} snapshots" if len(snapshots) > 1 else "one snapshot",
            hint="Give " + " or ".join(shown(one) for one in snapshots[:_MOST_NAMED]),
        )  # fmt: skip
    inside = [path / name for name in names if (path / name).is_dir() and looks_like_mesh(DiskFolder(path / name))]
    inside += [path / name for name in names if name.lower().endswith((".tar", ".tar.zst", ".tar.zstd"))]
    if inside:
        raise MissingFileError(
            "no checkpoint itself, but it holds TPU checkpoints" if len(inside) > 1 else "the folder above one",
            file=path, hint="Give " + " or ".join(shown(one) for one in inside[:_MOST_NAMED]),
        )  # fmt: skip


def _list_names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - names that are not UTF-8 stay what they are
    except OSError:
        return []


def _find_snapshots(path: Path) -> Iterator[Path]:
    """The snapshots of a repository's folder in the cache, of its `snapshots`, of the cache, or of the folder above."""
    names = _list_names(path)
    if path.resolve().name == "snapshots" and path.resolve().parent.name.startswith(_REPOSITORY):
        yield from _sort_snapshots(path, path.resolve().parent)
    elif path.resolve().name.startswith(_REPOSITORY) or {"blobs", "snapshots"} <= set(names):
        yield from _sort_snapshots(path / "snapshots", path)
    else:
        for name in names:
            if name.startswith(_REPOSITORY):
                yield from _sort_snapshots(path / name / "snapshots", path / name)
        if "hub" in names and any(name.startswith(_REPOSITORY) for name in _list_names(path / "hub")):
            yield from _find_snapshots(path / "hub")


def _sort_snapshots(snapshots: Path, repository: Path) -> list[Path]:
    """A repository's snapshots, the one that `main` is first."""
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8")[:100].strip()
    except (OSError, ValueError):
        main = ""
    return sorted((snapshots / name for name in _list_names(snapshots)), key=lambda path: path.name != main)


def find_config_file(folder: Path) -> Path:
    """The one config in a folder that was given as a config.

    Raises:
        ConfigError: it has none, or both a training config and a config.json.
    """
    found = [name for name in (TRAINING_FILE, "config.json") if (folder / name).is_file()]
    if len(found) == 1:
        return folder / found[0]
    others = [name for name in _list_names(folder) if name.endswith(".json")][:_MOST_NAMED]
    raise ConfigError(
        "a folder, not a file" if not found else "a folder with two configs",
        file=folder,
        expected=f"the JSON file that the model was trained with, or a folder with one {TRAINING_FILE} or config.json",
        found=shown(", ".join(found or others) or "no JSON file"),
        hint=f"Give the file: {shown(folder / (found or others)[0])}" if found or others else None,
    )
