"""The place of a mesh-transformer-jax checkpoint: its folder and step, and whether all its files are there.

A folder may lie on the disk or in an archive; `MeshFolder` is what the search needs to know of either.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptj.errors import ConfigError, FormatError, GPTJError, MissingFileError, UnsafeFileError, shown
from gptj.paths.json_file import read_json_object
from gptj.reading.npz import NpzFile, open_npz

__all__ = [
    "FILES_PER_SHARD",
    "META_FILE",
    "TRAINING_FILE",
    "DiskFolder",
    "FoundStep",
    "MeshFolder",
    "find_step",
    "looks_like_mesh",
    "looks_like_mesh_v2",
    "open_shards",
]

FILES_PER_SHARD = 16
META_FILE = "meta.json"
TRAINING_FILE = "training_config.json"
"""The file of the training config beside meta.json, by our writer; the original never wrote one."""

LARGEST_META_BYTES = 2**24  # it lists every file that the data loader has used

_STEP = re.compile(r"step_(0|[1-9]\d{0,17})")
_SHARD = re.compile(r"shard_(0|[1-9]\d{0,5})")


class MeshFolder(Protocol):
    """A folder, on the disk or in an archive."""

    @property
    def path(self) -> Path:
        """The path that errors name."""

    def names(self) -> list[str]:
        """The names in it, sorted."""

    def folder(self, name: str) -> MeshFolder:
        """The folder of this name in it."""

    def has_folder(self, name: str) -> bool:
        """Whether `name` is a folder in it."""

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in one of its files."""

    def open_npz(self, name: str) -> NpzFile:
        """One of its files as an .npz, headers checked."""

    def require_inside(self, names: Iterable[str]) -> None:
        """Refuse those of its folders and files that are links out of it."""


@dataclasses.dataclass(frozen=True)
class DiskFolder:
    """A folder on the disk; `follow_links` accepts links that lead out of it."""

    path: Path
    follow_links: bool = False

    def names(self) -> list[str]:
        """The names in it, sorted."""
        try:
            return sorted(os.listdir(self.path))  # noqa: PTH208 - names that are not UTF-8 stay what they are
        except FileNotFoundError:
            raise MissingFileError("no such directory", file=self.path) from None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", file=self.path) from None

    def folder(self, name: str) -> DiskFolder:
        """The folder of this name in it."""
        return DiskFolder(self.path / name, self.follow_links)

    def has_folder(self, name: str) -> bool:
        """Whether `name` is a folder in it."""
        return (self.path / name).is_dir()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in one of its files."""
        error = ConfigError if name == TRAINING_FILE else FormatError
        return read_json_object(self.path / name, limit_bytes=LARGEST_META_BYTES, error=error)

    def open_npz(self, name: str) -> NpzFile:
        """One of its files as an .npz, headers checked."""
        return open_npz(self.path / name)

    def require_inside(self, names: Iterable[str]) -> None:
        """Refuse those of its folders and files that are links out of it."""
        if self.follow_links:
            return
        root = self.path.resolve()
        blobs = _find_hub_blobs(root)
        for name in names:
            try:
                target = (self.path / name).resolve(strict=True)
            except (OSError, RuntimeError) as error:
                raise FormatError(f"cannot be looked at: {error}", file=self.path / name) from None
            if not target.is_relative_to(root) and target.parent != blobs:
                raise UnsafeFileError(
                    "is a link out of its folder",
                    file=self.path / name,
                    found=shown(target),
                    hint="Say follow_links to allow it",
                )


def _find_hub_blobs(folder: Path) -> Path | None:
    """The folder of the files of a snapshot in the Hugging Face Hub's cache; None where the folder lies in none.

    They are links there, from models--x--y/snapshots/REVISION/... to models--x--y/blobs/HASH.
    """
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs"
    return None


def looks_like_mesh(folder: MeshFolder) -> bool:
    """Whether it is a step directory, or a model directory with one (of v1 or v2)."""
    names = folder.names()
    return (
        any(_SHARD.fullmatch(name) for name in names)
        or looks_like_mesh_v2(folder)
        or any(_STEP.fullmatch(name) and folder.has_folder(name) for name in names)
    )


def looks_like_mesh_v2(folder: MeshFolder) -> bool:
    """Whether it is a step directory of the repository's unrelated v2 model."""
    names = folder.names()
    if "params" in names and "opt_state" in names:
        return True
    if META_FILE not in names or any(_SHARD.fullmatch(name) for name in names):
        return False
    try:
        return not {"param_order", "total_hosts"}.isdisjoint(folder.read_json(META_FILE))
    except GPTJError:
        return False


@dataclasses.dataclass(frozen=True)
class FoundStep:
    """A step directory.

    Attributes:
        above: the model directory, where it is known.
        folder: the step directory.
        note: why it is not the newest one; None where it is, or was given.
    """

    above: MeshFolder | None
    folder: MeshFolder
    note: str | None = None

    @property
    def number(self) -> int | None:
        """The step in the folder's name; None where it is called otherwise."""
        name = self.folder.path.name
        return int(name.removeprefix("step_")) if _STEP.fullmatch(name) else None


def find_step(folder: MeshFolder, require_whole: Callable[[MeshFolder], object]) -> FoundStep:
    """The step directory: `folder` itself, or the newest in it.

    The newest is the one that meta.json names; without meta.json (slim checkpoints have none) it is the complete
    one with the highest number, and a note says that a newer one is not complete. `require_whole` raises a GPTJError
    where a step directory is not.

    Raises:
        MissingFileError: there is none, or the one that meta.json names is not there.
        FormatError: meta.json breaks its rule; or the error of the newest where no step is complete.
    """
    names = folder.names()
    if looks_like_mesh_v2(folder) or any(_SHARD.fullmatch(name) for name in names):
        return FoundStep(DiskFolder(folder.path.parent) if isinstance(folder, DiskFolder) else None, folder)
    found = [name for name in names if _STEP.fullmatch(name)]
    folder.require_inside(found)
    steps = sorted((int(name.removeprefix("step_")) for name in found), reverse=True)
    if META_FILE in names:
        return FoundStep(folder, _read_step_of_meta(folder, steps))
    if not steps:
        raise MissingFileError(
            "no mesh-transformer-jax checkpoint", file=folder.path, expected="shard_0, shard_1, ... or step_N folders"
        )
    newest_error: GPTJError | None = None
    for step in steps:
        candidate = folder.folder(f"step_{step}")
        try:
            require_whole(candidate)
        except GPTJError as error:
            newest_error = newest_error or error
        else:
            if newest_error is None:
                return FoundStep(folder, candidate)
            place = _place_in(newest_error, folder.path) or f"step_{steps[0]}"
            note = f"step_{step} is taken, and not the newest: {place}: {newest_error.problem}"
            return FoundStep(folder, candidate, note)
    assert newest_error is not None
    raise newest_error


def _place_in(error: GPTJError, folder: Path) -> str:
    """The file that an error names, by its path in the folder; nothing where it lies elsewhere."""
    place = Path(error.file or "")
    return str(place.relative_to(folder)) if place.is_relative_to(folder) else ""


def _read_step_of_meta(folder: MeshFolder, steps: Sequence[int]) -> MeshFolder:
    step = folder.read_json(META_FILE).get("step")
    if type(step) is not int or step < 0:
        raise FormatError(
            "breaks its rule",
            file=folder.path / META_FILE,
            where="step",
            expected="a whole number, 0 or above",
            found=shown(step),
        )
    if step not in steps:
        raise MissingFileError(
            f"the step that {META_FILE} names is missing",
            file=folder.path / f"step_{step}",
            found=", ".join(f"step_{n}" for n in sorted(steps)[:10]) or "none",
            hint="Give the step folder itself to convert another one",
        )
    return folder.folder(f"step_{step}")


def open_shards(step: MeshFolder) -> tuple[tuple[NpzFile, ...], ...]:
    """Every file of every shard, headers checked; shards and files numbered without a gap.

    Raises:
        MissingFileError: a shard or a file is missing.
        GPTJError: a file is malformed, or a link leads out of the folder.
    """
    numbers = sorted(int(name.removeprefix("shard_")) for name in step.names() if _SHARD.fullmatch(name))
    if not numbers:
        raise MissingFileError("no shards", file=step.path, expected="shard_0, shard_1, ...")
    for wanted, number in enumerate(numbers):
        if number != wanted:
            raise MissingFileError(
                f"shard {wanted} of at least {numbers[-1] + 1} is missing", file=step.path / f"shard_{wanted}"
            )
    step.require_inside(f"shard_{number}" for number in numbers)
    return tuple(_open_shard(step.folder(f"shard_{number}"), number) for number in numbers)


def _open_shard(folder: MeshFolder, shard: int) -> tuple[NpzFile, ...]:
    expected = [f"{n}.npz" for n in range(FILES_PER_SHARD)]
    present = {name for name in folder.names() if name.endswith(".npz") and not name.startswith("._")}  # of macOS
    if missing := [name for name in expected if name not in present]:
        raise MissingFileError(
            f"shard {shard} is not complete",
            file=folder.path / missing[0],
            expected=f"0.npz to {expected[-1]}",
            found=f"{len(present)} of {FILES_PER_SHARD}",
        )
    if strange := sorted(present - set(expected)):
        raise FormatError(
            "a file that no v1 checkpoint has", file=folder.path / strange[0], expected=f"0.npz to {expected[-1]}"
        )
    folder.require_inside(expected)
    return tuple(folder.open_npz(name) for name in expected)
