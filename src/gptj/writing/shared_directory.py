"""A directory that is not the writer's alone, as a trainer's output folder: checkpoints and logs beside the model.

What counts is which files would be replaced, or taken for what is written; whatever else stands there, folders and
links included, stays where it is.

* Where nothing would be replaced, the finished stage's files get second names (hard links) in the folder, which no
  existing file gives way to, and nothing else is touched. The file that makes the folder a model's comes last and when
  the others are on the disk: until then a reader finds what it found before, no model. Meanwhile the stage is called
  `.<name>.gptj-placing-<pid>`, so that the next writer can take back what one that died had placed.
* Where something is to be replaced, and where there are no hard links, the whole folder is swapped as in
  `gptj.writing.output_directory`, and others' folders come along as new folders of the same files.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from gptj.errors import WriteError, shown
from gptj.writing.file_system import write_error
from gptj.writing.output_directory import NO_LINKS, OutputDirectory

__all__ = ["SharedDirectory"]


class SharedDirectory(OutputDirectory):
    """An output directory where the files and folders that `fate` keeps are no reason not to write."""

    _has_links = True

    def commit(self) -> None:
        """Place the finished files beside the others, or swap the stage in; durably."""
        self._require_replaceable()  # it may have changed while the stage was written
        if not self._only_adds or not self._place():
            super().commit()

    # ---- what stands there

    def _require_replaceable(self) -> None:
        self._others: list[str] = []
        self._only_adds = False
        old = self._status(self.target)
        if old is None or not stat.S_ISDIR(old.st_mode):
            super()._require_replaceable()
            return
        names = self.call(self.target, self.fs.names, self.target)
        fates = {name: self.fate(name) for name in names}
        for name, fate in fates.items():
            if fate == "refuse":
                raise WriteError(
                    f"holds {shown(name)}, which would be taken for this model's weights",
                    file=self.target,
                    hint="Move it away first",
                )
        replaced = [name for name, fate in fates.items() if fate == "replace"]
        if replaced and not self.overwrite:
            raise WriteError(
                f"is not empty: it holds {shown(replaced[0])}",
                file=self.target,
                hint="Say overwrite=True, or --overwrite",
            )
        self._old = old
        self._only_adds = bool(names) and not replaced and self._has_links
        if self._only_adds:
            self._require_room_for_names()
            return
        self._require_outside()
        self._sort_contents(names)

    def _require_room_for_names(self) -> None:
        """Refuse, before any work, a folder that cannot take the files: read-only, or on another file system."""
        parent = self.call(self.target.parent, self.fs.status, self.target.parent)
        assert self._old is not None
        if self._old.st_dev != parent.st_dev:
            raise write_error(self.target, OSError(errno.EXDEV, os.strerror(errno.EXDEV)))
        self._require_access(self.target)

    def _require_access(self, folder: Path) -> None:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise write_error(folder, OSError(errno.EACCES, os.strerror(errno.EACCES)))

    def _require_outside(self) -> None:
        """Refuse to swap a folder that this process stands in or below."""
        assert self._old is not None
        self._require_not_current(self._old)
        try:
            here = Path.cwd()
        except OSError:
            return  # it is gone, so it is not in this one
        if here.is_relative_to(self.target):
            raise WriteError(
                "holds the current folder, and cannot be replaced while you are in it",
                file=self.target,
                hint="Name a new one",
            )

    def _sort_contents(self, names: list[str]) -> None:
        """Note what of the old directory comes along: plain files, and others' folders, links and so on."""
        self._old_modes, self._carried = {}, []
        for name in names:
            status = self._status(self.target / name)
            keeps = self.fate(name) == "keep"
            if status is None or not (keeps or stat.S_ISREG(status.st_mode)):
                raise WriteError(f"holds {shown(name)}, which is not a plain file", file=self.target)
            if stat.S_ISREG(status.st_mode):
                self._old_modes[name] = stat.S_IMODE(status.st_mode)
            if keeps:
                (self._carried if stat.S_ISREG(status.st_mode) else self._others).append(name)

    # ---- beside the others

    def _place(self) -> bool:
        """Whether the finished files stand in the target, beside what was there; False where there are no links."""
        stage, placing = self.stage, self._placing_path
        names = self.call(stage, self.fs.names, stage)
        names.sort(key=lambda name: name == self.last)
        self._sync_folder(stage)
        self.call(placing, self.fs.rename, stage, placing)
        self.stage = placing
        placed: list[str] = []
        try:
            self._sync_folder(self.target.parent)
            for name in names:
                if name == self.last:
                    self._sync_folder(self.target)
                placed.append(name)  # before it is: a link may have been made although the call failed
                self._has_links = self._place_file(name)
                if not self._has_links:
                    break
            self._sync_folder(self.target)
        except BaseException:
            self._undo(placed)
            raise
        if not self._has_links:
            self._undo(placed[:-1])
            self.call(stage, self.fs.rename, placing, stage)
            self.stage = stage
            return False
        self.committed = True
        self._clear(placing)
        return True

    def _place_file(self, name: str) -> bool:
        """Give a file of the stage its name in the target; False where the file system has no links."""
        try:
            self.fs.link(self.stage / name, self.target / name)
        except OSError as error:
            if error.errno in NO_LINKS:
                return False
            raise write_error(self.target / name, error) from error
        return True

    def _undo(self, placed: list[str]) -> None:
        self.committed = True  # were the next call to fail, the stage would say what is left to take back
        self._take_back(self.stage, placed)
        self.committed = False

    # ---- with the others, where the folder is swapped

    def _carry_over(self) -> None:
        super()._carry_over()
        for name in self._others:
            self._carry(name)

    def _carry(self, name: str) -> None:
        """Another's folder with all that is in it, or a link or the like, stands in the stage too."""
        old, new = self.target / name, self.stage / name
        status = self.call(old, self.fs.status, old)
        if stat.S_ISDIR(status.st_mode):
            self._require_access(old)
            self.call(new, self.fs.mkdir, new)
            for inner in self.call(old, self.fs.names, old):
                self._carry(f"{name}/{inner}")
            self._sync_folder(new)
            self.call(new, self.fs.chmod, new, stat.S_IMODE(status.st_mode))
            self.call(new, self.fs.set_times, new, status)
        elif stat.S_ISREG(status.st_mode):
            self._old_modes[name] = stat.S_IMODE(status.st_mode)
            self._link_or_copy(name)
        else:
            self.call(new, self.fs.link, old, new)
