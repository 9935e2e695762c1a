"""`gptj.writing.output_directory` for formats that are folders in folders: the same promises, one level or three."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gptj.errors import WriteError, shown
from gptj.writing.file_system import FileSystem
from gptj.writing.output_directory import OutputDirectory

__all__ = ["OutputTree"]


class OutputTree(OutputDirectory):
    """A directory with folders in it, made beside its place and swapped in with one rename.

    Args:
        target, overwrite, adopt, fs: as for OutputDirectory.
        replaceable: whether a path below the old directory, as `step_3/shard_0/0.npz`, is one that this kind of
            output writes. Anything else in the old directory is a reason not to replace it.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        replaceable: Callable[[str], bool],
        overwrite: bool = False,
        adopt: Callable[[list[str]], bool] | None = None,
        fs: FileSystem | None = None,
    ) -> None:
        super().__init__(target, overwrite=overwrite, adopt=adopt, fs=fs)
        self.replaceable = replaceable
        self._folders: list[Path] = []

    def __enter__(self) -> OutputTree:
        super().__enter__()
        return self

    def make_folder(self, name: str) -> None:
        """A folder of the stage, unless it was adopted; the one above it must have been made."""
        folder = self.stage / name
        if self._status(folder) is None:
            self.call(folder, self.fs.mkdir, folder)
        self._folders.append(folder)

    def commit(self) -> None:
        """Swap the stage in, durably, its folders' entries included."""
        for folder in reversed(self._folders):
            self._sync_folder(folder)
        super().commit()

    def _require_replaceable(self) -> None:
        if not self._look_at_old():
            return
        for name in self._tree(self.target):
            if not self.replaceable(name):
                raise WriteError(
                    f"holds {shown(name)}, which would be lost", file=self.target, hint="Move it away first"
                )
