"""`gptj.output_directory` for formats that are folders in folders: the same promises, one level or three."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from gptj.errors import WriteError, shown
from gptj.output_directory import FileSystem, OutputDirectory

__all__ = ["OutputTree"]


class OutputTree(OutputDirectory):
    """A directory with folders in it, made beside its place and swapped in with one rename.

    Args:
        target, overwrite, fs: as for OutputDirectory.
        replaceable: whether a path below the old directory, as `step_3/shard_0/0.npz`, is one that this kind of
            output writes. Anything else in the old directory is a reason not to replace it.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        replaceable: Callable[[str], bool],
        overwrite: bool = False,
        fs: FileSystem | None = None,
    ) -> None:
        super().__init__(target, overwrite=overwrite, fs=fs)
        self.replaceable = replaceable
        self._folders: list[Path] = []

    def __enter__(self) -> OutputTree:
        super().__enter__()
        return self

    def make_folder(self, name: str) -> None:
        """A folder of the stage; the one above it must have been made."""
        folder = self.stage / name
        self.call(folder, self.fs.mkdir, folder)
        self._folders.append(folder)

    def commit(self) -> None:
        """Swap the stage in, durably, its folders' entries included."""
        for folder in reversed(self._folders):
            self._sync_folder(folder)
        super().commit()

    def _require_replaceable(self) -> None:
        self._old = self._status(self.target)
        self._old_modes = {}
        self._carried = []
        if self._old is None:
            return
        if not stat.S_ISDIR(self._old.st_mode):
            raise WriteError("is a file; a directory is to be written", file=self.target)
        names = self.call(self.target, self.fs.names, self.target)
        if names and not self.overwrite:
            raise WriteError(
                f"is not empty: it holds {shown(names[0])}", file=self.target, hint="Say overwrite to replace it"
            )
        for name in self._tree(self.target):
            if not self.replaceable(name):
                raise WriteError(
                    f"holds {shown(name)}, which would be lost", file=self.target, hint="Move it away first"
                )

    def _tree(self, folder: Path, prefix: str = "") -> list[str]:
        """Every path below `folder`; a link is a leaf, whatever it leads to."""
        paths = []
        for name in self.call(folder, self.fs.names, folder):
            paths.append(prefix + name)
            if stat.S_ISDIR(self.call(folder / name, self.fs.status, folder / name).st_mode):
                paths += self._tree(folder / name, f"{prefix}{name}/")
        return paths

    def _clear(self, folder: Path, *, strictly: bool = False) -> None:
        status = self._status(folder)
        if status is None:
            return
        with contextlib.nullcontext() if strictly else contextlib.suppress(WriteError):
            for name in sorted(self._tree(folder), key=lambda path: -path.count("/")):
                path = folder / name
                is_folder = stat.S_ISDIR(self.call(path, self.fs.status, path).st_mode)
                self.call(path, self.fs.rmdir if is_folder else self.fs.unlink, path)
        super()._clear(folder, strictly=strictly)
