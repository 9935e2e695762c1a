"""Checkpoints of a run: OUT/checkpoints/step-00000100, each a model's folder with the optimizer and place beside it.

A checkpoint is written under a hidden name, forced to the disk, and renamed; so whatever has its plain name is whole,
also after a kill at any moment. The last and the best are kept. A lock keeps a second run out of the same folder.

    config.json, model.safetensors, tokenizer ...   a folder that every command opens
    optimizer.safetensors                           AdamW's moments, "first.NAME" and "second.NAME"
    loss.csv                                        the curve up to there
    training.json                                   settings, data, and the place

Where several processes train one model, parts/ is in place of model and optimizer: torch.distributed.checkpoint's or
orbax's format, whose reader cuts it anew for any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from gptj.errors import FormatError, InputError, SchemaError, WriteError, shown
from gptj.finetune.curve import Row, read_curve, write_curve
from gptj.finetune.loop import Progress
from gptj.finetune.schedule import LossScale
from gptj.finetune.settings import Settings
from gptj.paths.json_file import read_json_object
from gptj.reading.safetensors_file import pack_header, read_safetensors
from gptj.writing.file_system import write_error
from gptj.writing.output_file import whole_file

__all__ = ["CHECKPOINTS", "CURVE_FILE", "PARTS", "Identity", "RunFolder", "Saved", "write_moments"]

CHECKPOINTS = "checkpoints"
CURVE_FILE = "loss.csv"
PARTS = "parts"
"""In place of model and optimizer, where several processes train: the folder that each writes its own parts into."""

FORMAT = 1
"""Of training.json."""

_TRAINING, _OPTIMIZER = "training.json", "optimizer.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_LOCK = ".gptj-finetune-lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """The facts of a run but for its progress: a resumed one must have the same.

    Attributes:
        backend: the framework.
        settings: of the run.
        steps: updates of the whole run.
        model: facts of the model that is tuned, by name.
        data, evaluation: facts of the windows.
    """

    backend: str
    settings: Settings
    steps: int
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "backend": self.backend, "settings": self.settings.to_dict(), "steps": self.steps,
            "model": dict(self.model), "data": dict(self.data),
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
        }  # fmt: skip

    def changes(self, stored: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """The option or argument, what `to_dict` said of it, and what is so now, of all that is another."""
        changed: list[tuple[str, Any, Any]]
        changed = [] if stored.get("backend") == self.backend else [("--backend", stored.get("backend"), self.backend)]
        settings = stored.get("settings")
        changed += self.settings.changes(settings if isinstance(settings, Mapping) else {})
        mine = self.to_dict()
        for name, where in (("model", "DIR"), ("data", "DATA"), ("evaluation", "--eval")):
            if stored.get(name) != mine[name]:
                changed.append((where, *_difference(stored.get(name), mine[name])))
        if stored.get("steps") != self.steps and not changed:
            changed.append(("--steps", stored.get("steps"), self.steps))
        return changed

    def require_same(self, stored: Mapping[str, Any], file: Path) -> None:
        """Refuse to go on from a checkpoint of another run.

        Raises:
            InputError: naming the option, or the argument, that is another.
        """
        changed = self.changes(stored)
        if changed:
            where, before, now = changed[0]
            more = f"; and {len(changed) - 1} more: {', '.join(one[0] for one in changed[1:])}" if changed[1:] else ""
            raise InputError(
                f"another than the run that is to be resumed{more}", file=file, where=where, expected=shown(before),
                found=shown(now), hint="Give what it was begun with, or another OUT",
            )  # fmt: skip


def _difference(before: Any, now: Any) -> tuple[Any, Any]:
    """The first facts that differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        name = next(name for name in {**now, **before} if before.get(name) != now.get(name))
        return f"{name} {before.get(name)}", f"{name} {now.get(name)}"
    return "none" if before is None else "some", "none" if now is None else "some"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk.

    Attributes:
        folder: where it is.
        step: updates that are over.
        stored: its training.json.
    """

    folder: Path
    step: int
    stored: Mapping[str, Any]

    @property
    def parts(self) -> Path | None:
        """The folder of the parts that several processes wrote, None where one process did."""
        found = self.folder / PARTS
        return found if found.is_dir() else None

    @property
    def progress(self) -> Progress:
        """The place of the run.

        Raises:
            FormatError: training.json does not say.
        """
        found = self.stored.get("progress")
        try:
            members = dict(found)  # type: ignore[arg-type]
            progress = Progress(**{**members, "scale": LossScale(**members["scale"])})
            progress.check(self.step)
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError(
                f"not a run's progress: {error}", file=self.folder / _TRAINING, where="progress"
            ) from None
        return progress

    @property
    def rows(self) -> list[Row]:
        """The curve up to there.

        Raises:
            FormatError: it is none, or has other updates.
        """
        rows = read_curve(self.folder / CURVE_FILE)
        if [row.step for row in rows] != list(range(1, self.step + 1)):
            expected, found = f"updates 1 to {self.step}", f"{len(rows)} rows"
            raise FormatError("another run's curve", file=self.folder / CURVE_FILE, expected=expected, found=found)
        return rows

    def moments(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
        """AdamW's moments by name.

        Args:
            shapes: of the parameters that are trained.

        Raises:
            SchemaError: they are not those of these parameters, or not finite.
            FormatError: the file is damaged.
        """
        file = read_safetensors(self.folder / _OPTIMIZER)
        expected = {f"{moment}.{name}": shape for name, shape in shapes.items() for moment in ("first", "second")}
        stored = {name: tensor.shape for name, tensor in file.tensors.items()}
        odd = [name for name in {**expected, **stored} if expected.get(name) != stored.get(name)]
        if odd:
            raise SchemaError(
                "not the moments of what is trained", file=file.path, where=shown(odd[0]),
                expected=expected.get(odd[0]), found=stored.get(odd[0]),
            )  # fmt: skip
        found = {name: file.read(tensor, "float32") for name, tensor in file.tensors.items()}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise SchemaError("not finite", file=file.path, where=name, hint="Go on from another checkpoint")
        return found


class RunFolder:
    """`with RunFolder(out, resume=...) as run:` the checkpoints of a run, which no other process writes meanwhile.

    Args:
        folder: OUT. It is made; its parent must exist.
        resume: whether it may hold a run already.

    Raises:
        WriteError: there is something in it and `resume` is False, another process trains in it, or it cannot be made.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.resume = resume

    def __enter__(self) -> RunFolder:
        self.require_usable()
        try:
            made = not self.folder.exists()
            self.folder.mkdir(exist_ok=True)
            self._held = filelock.FileLock(self.folder / _LOCK, timeout=0)
            self._held.acquire()
        except filelock.Timeout:
            raise WriteError("another process fine-tunes into it", file=self.folder) from None
        except OSError as error:
            raise write_error(self.folder, error) from error
        self._made = made
        try:
            self.checkpoints.mkdir(exist_ok=True)
            self._clear_hidden()
        except OSError as error:
            raise write_error(self.checkpoints, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            (self.folder / _LOCK).unlink()
        self._held.release()
        if kind is not None and self._made:  # nothing was written: leave nothing
            with contextlib.suppress(OSError):
                self.checkpoints.rmdir()
                self.folder.rmdir()

    def require_usable(self) -> None:
        """Refuse a folder that a run cannot be in, before anything is made; `with` does too."""
        try:
            names = sorted(os.listdir(self.folder))  # noqa: PTH208 - names that are not UTF-8 stay what they are
        except FileNotFoundError:
            if not self.folder.parent.is_dir():
                raise WriteError("no such folder", file=self.folder.parent, hint="Make it first") from None
            return
        except OSError as error:
            raise write_error(self.folder, error) from error
        others = [name for name in names if name != _LOCK]
        begun = CHECKPOINTS in others
        if others and not self.resume:
            hint = "Give --resume to go on with it" if begun else "Give another OUT"
            raise WriteError("is not empty", file=self.folder, found=shown(others[0]), hint=hint)
        if others and not begun:
            raise WriteError(
                "no run was begun in it", file=self.folder, expected=f"{CHECKPOINTS}/", found=shown(others[0])
            )

    def _clear_hidden(self) -> None:
        """Remove what a run that was killed had not finished."""
        for path in self.checkpoints.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    # ---- reading

    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, rising."""
        found = (_NAME.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path_of(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / f"step-{step:08d}"

    def last(self) -> Saved | None:
        """The last checkpoint, None before the first.

        Raises:
            FormatError: its training.json cannot be read.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self.path_of(steps[-1])
        stored = read_json_object(folder / _TRAINING)
        if stored.get("format") != FORMAT:
            raise FormatError(
                "another format of checkpoints", file=folder / _TRAINING, where="format", expected=FORMAT,
                found=shown(stored.get("format")), hint="Resume it with the release that began it",
            )  # fmt: skip
        return Saved(folder, steps[-1], stored)

    def parts_of(self, step: int) -> Path | None:
        """`Saved.parts` of a checkpoint."""
        return Saved(self.path_of(step), step, {}).parts

    # ---- writing

    def save(
        self,
        progress: Progress,
        identity: Identity,
        rows: list[Row],
        *,
        write: Callable[[Path], object],
    ) -> Path:
        """Write a checkpoint, then let go of all but it and the best; returns its folder.

        Args:
            write: puts the model and AdamW's moments into a folder: a model's folder and `write_moments`, or PARTS.
        """
        final = self.path_of(progress.step)
        if not final.exists():  # else of a resumed run that had nothing left to do
            try:
                try:
                    write(self.stage_of(progress.step))
                except OSError as error:
                    if isinstance(error, WriteError):
                        raise
                    raise write_error(final, error) from error
                self.finish(progress, identity, rows)
            except Exception as error:  # what is there of it may be what the disk has no room for
                shutil.rmtree(self.stage_of(progress.step), ignore_errors=True)
                if isinstance(error, WriteError) and (steps := self.steps()):
                    way = f"Update {steps[-1]} is saved: with --resume it goes on from there"
                    error.hint = f"{error.hint.removesuffix('.')}. {way}" if error.hint else way
                raise
        return final

    def stage_of(self, step: int) -> Path:
        """Where a checkpoint is written, before it has its name."""
        return self.checkpoints / f".{self.path_of(step).name}"

    def make(self, folder: Path) -> None:
        """Make a folder, where there is none yet."""
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error

    def finish(self, progress: Progress, identity: Identity, rows: list[Row]) -> None:
        """Write the curve and the place of a run beside its parts, and give the checkpoint its name."""
        final, stage = self.path_of(progress.step), self.stage_of(progress.step)
        try:
            write_curve(stage / CURVE_FILE, rows)
            stored = {"format": FORMAT, **identity.to_dict(), "progress": dataclasses.asdict(progress)}
            with whole_file(stage / _TRAINING) as write:
                write((json.dumps(stored, indent=2) + "\n").encode())
            _sync(stage)
            stage.rename(final)
            _sync(self.checkpoints)
            self._prune({progress.step, progress.best_step})
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise write_error(final, error) from error

    def _prune(self, kept: set[int | None]) -> None:
        """Remove checkpoints but some, each under a hidden name, so that what has a plain name stays whole."""
        for step in self.steps():
            if step not in kept:
                hidden = self.checkpoints / f".old-{step:08d}"
                self.path_of(step).rename(hidden)
                shutil.rmtree(hidden)


def write_moments(folder: Path, moments: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Write AdamW's moments, by name, beside a model."""
    _write_tensors(folder / _OPTIMIZER, moments)


def _write_tensors(path: Path, tensors: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Write float32 arrays as safetensors, whole or not at all."""
    arrays = dict(tensors)
    with whole_file(path) as write:
        write(pack_header([(name, "float32", array.shape) for name, array in arrays.items()], {"format": "pt"}))
        for array in arrays.values():
            write(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data)


def _sync(folder: Path) -> None:
    """Force a folder's names to the disk, where that can be asked."""
    with _opened(folder) as descriptor, contextlib.suppress(OSError):
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
