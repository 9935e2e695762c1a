"""A whole fine-tuning: data and settings checked first, then the framework, the loop, and the folder at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gptj
from gptj.adapters import Adapter, read_adapter, write_adapter
from gptj.adapters.merge import COMPANIONS, LARGEST_COMPANION_BYTES
from gptj.backends import choose_backend, install_line
from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.finetune.checkpoints import CURVE_FILE, Identity, RunFolder, Saved
from gptj.finetune.curve import can_draw, curve_text, draw_curve, perplexity, write_curve
from gptj.finetune.data import Batches, Windows, describe, make_windows, read_documents
from gptj.finetune.loop import Progress, Report, Training, TrainingStep
from gptj.finetune.settings import Settings
from gptj.hub import locate
from gptj.json_file import read_small_file
from gptj.paths import missing_folder
from gptj.text.tokenizer import GPTJTokenizer
from gptj.writing.output_file import whole_file

__all__ = ["Outcome", "finetune"]

PICTURE = "loss.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run.

    Attributes:
        folder: OUT.
        finished: whether it came to its end; else OUT holds checkpoints alone, and can be resumed.
        checkpoint: the last one.
        step, steps: updates that are over, and of the whole run.
        loss: of the last update, None where there was none.
        best_step, best_loss: the best evaluation, whose weights are OUT's.
        tokens, seconds: that were learnt from, and of training, earlier runs included.
        picture: the drawn curve, None where matplotlib is missing.
    """

    folder: Path
    finished: bool
    checkpoint: Path
    step: int
    steps: int
    loss: float | None
    best_step: int | None
    best_loss: float | None
    tokens: int
    seconds: float
    picture: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The same, as JSON can hold it, with the perplexity."""
        facts = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        facts["best_perplexity"] = None if self.best_loss is None else perplexity(self.best_loss)
        return facts


def finetune(
    directory: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    backend: str | None = None,
    device: str = "auto",
    evaluation: str | os.PathLike[str] | None = None,
    resume: bool = False,
    note: Callable[[str], None] | None = None,
    report: Callable[[Report], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Fine-tune the model in `directory` on `data`, and leave in `output` a folder that every command opens.

    Args:
        directory: a folder of weights and a tokenizer, or a repository of the hub.
        data: text, or JSON lines; see `gptj.finetune.data.read_documents`.
        output: a new folder, or with `resume` one that a run was begun in.
        backend: which framework; None for the chosen or only one.
        device: "auto", "cpu", "cuda" or "mps".
        evaluation: data that is measured and never learnt. The weights in `output` are then those of the best
            evaluation, else the last.
        resume: go on from the last checkpoint in `output`; from the beginning where there is none.
        note: told what a user may want to know, a sentence each.
        report: told of every update.
        stop: asked after every update; on True a checkpoint is written and the run ends.

    Raises:
        GPTJError: see `Settings`, `read_documents`, `make_windows`, `RunFolder`, `Identity.require_same` and
            `from_pretrained`.
    """
    settings = settings or Settings()
    note = note or (lambda sentence: None)
    run = RunFolder(Path(output), resume=resume)
    run.require_usable()
    job = _prepare(Path(directory), Path(data), None if evaluation is None else Path(evaluation), settings, backend)
    with run:
        saved = run.last() if resume else None
        if saved is not None:
            job.identity.require_same(saved.stored, saved.folder)
            note(f"goes on from update {saved.step} of {job.steps}")
        elif resume:
            note(f"{output}: no checkpoint yet, so it begins at the beginning")
        for sentence in job.describe():
            note(sentence)
        return _train(job, run, saved, device, note, report or (lambda line: None), stop or (lambda: False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """A run before any framework: its model, data and settings."""

    directory: Path
    config: GPTJConfig
    files: Mapping[str, bytes]
    ends: bool
    batches: Batches
    evaluation: Batches | None
    identity: Identity

    @property
    def settings(self) -> Settings:
        return self.identity.settings

    @property
    def steps(self) -> int:
        return self.identity.steps

    def describe(self) -> list[str]:
        """The run in a sentence, and what of it may surprise."""
        windows, epochs = self.batches.windows, self.steps / self.batches.per_epoch
        said = [
            f"{windows.learnt:,} tokens in {len(windows):,} windows of at most {windows.ids.shape[1]}; {self.steps:,} "
            f"updates of {self.settings.micro_batches} windows, {epochs:.3g} epochs"
        ]
        dropped = max(self.config.embd_pdrop, self.config.attn_pdrop, self.config.resid_pdrop)
        if dropped > 0:
            said.append(f"nothing is dropped, though the config says {dropped}, so that frameworks agree")
        if not self.ends:
            said.append("documents have no end: the tokenizer has no eos token")
        return said


def _prepare(directory: Path, data: Path, evaluation: Path | None, settings: Settings, backend: str | None) -> _Job:
    chosen = choose_backend(backend)
    directory = locate(directory)
    if not os.path.lexists(directory):
        raise missing_folder(directory, "no such directory")
    config = GPTJConfig.from_file(directory)
    tokenizer = GPTJTokenizer.from_pretrained(directory)
    tokenizer.check_fits(config)
    length = config.n_positions if settings.length is None else settings.length
    if length > config.n_positions:
        expected = f"at most n_positions = {config.n_positions}"
        raise InputError("longer than the model's positions", where="--length", expected=expected, found=length)

    def windows_of(path: Path) -> Windows:
        return make_windows(path, read_documents(path), tokenizer, length=length, pack=settings.pack)

    training = windows_of(data)
    measured = None if evaluation is None else windows_of(evaluation)
    batches = Batches(training, settings.batch, settings.accumulate, settings.seed)
    steps = settings.steps or (settings.epochs or 1) * batches.per_epoch
    files = {
        name: read_small_file(directory / name, limit_bytes=LARGEST_COMPANION_BYTES)
        for name in COMPANIONS
        if os.path.lexists(directory / name)
    }
    model = {"config_sha256": config.architecture_sha256}
    if settings.lora:  # whose base is read again, and must be the same
        model["weights_sha256"] = _hash_weights(directory)
    identity = Identity(
        backend=chosen, settings=settings, steps=steps, model=model,
        data=describe(training), evaluation=None if measured is None else describe(measured),
    )  # fmt: skip
    return _Job(
        directory=directory, config=config, files=files, ends=tokenizer.eos_token_id is not None, batches=batches,
        identity=identity,
        evaluation=None if measured is None else Batches(measured, settings.batch),
    )  # fmt: skip


def _hash_weights(directory: Path) -> str:
    """A hash of the model's weights files."""
    digest = hashlib.sha256()
    for path in open_checkpoint(directory).weight_files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _train(
    job: _Job,
    run: RunFolder,
    saved: Saved | None,
    device: str,
    note: Callable[[str], None],
    report: Callable[[Report], None],
    stop: Callable[[], bool],
) -> Outcome:
    progress, rows = (Progress(), []) if saved is None else (saved.progress, saved.rows)
    wing = gptj.backend(job.identity.backend)
    room: Any = importlib.import_module(f"gptj.{job.identity.backend}.finetune")
    with wing.on_device(device) as loading:
        with loading:
            step = room.TrainingStep(_open(job, room, saved), job.settings)
        if saved is not None:
            shapes = {name: tuple(parameter.shape) for name, parameter in step.parameters.items()}
            step.restore(saved.moments(shapes), updates=progress.updates)
        training = Training(
            step, job.settings, job.batches, job.evaluation, steps=job.steps, progress=progress, rows=rows
        )

        def save(training: Training) -> None:
            run.save(
                training.progress, job.identity, training.rows, write_model=lambda folder: _write(job, folder, step),
                moments=step.moments(),
            )  # fmt: skip
            write_curve(run.folder / CURVE_FILE, training.rows)

        finished = training.run(save=save, report=report, stop=stop)
    progress = training.progress
    files = {CURVE_FILE: curve_text(training.rows)} | _picture(training, run.folder.name, note)
    if finished:
        _publish(job, run, progress, files)
    else:
        for name, data in files.items():
            with whole_file(run.folder / name) as write:
                write(data)
    picture = run.folder / PICTURE if PICTURE in files else None
    return Outcome(
        folder=run.folder, finished=finished, checkpoint=run.path_of(progress.step), step=progress.step,
        steps=job.steps, loss=training.rows[-1].loss if training.rows else None, best_step=progress.best_step,
        best_loss=progress.best_loss, tokens=progress.tokens, seconds=progress.seconds, picture=picture,
    )  # fmt: skip


def _open(job: _Job, room: Any, saved: Saved | None) -> Any:
    """The model that is trained: the base or a checkpoint's, or the base with an adapter, new or a checkpoint's."""
    settings = job.settings
    model = room.open_model(job.directory if saved is None or settings.lora else saved.folder, settings)
    if settings.lora and saved is None:
        model.add_adapter(settings.adapter_config(str(job.directory)), seed=settings.seed)
    elif settings.lora:
        model.load_adapter(saved.folder, is_trainable=True)  # type: ignore[union-attr]
    if settings.checkpoint_gradients:
        model.gradient_checkpointing_enable()
    return model


def _write(job: _Job, folder: Path, step: TrainingStep) -> None:
    """Write the model as it is, or its adapter, into a new folder."""
    if job.settings.lora:
        step.settled().save_adapter(folder)
        return
    write_checkpoint(
        folder, job.config, lambda row: step.read(row.name), dtype="float32", extra_files=job.files,
        provenance=_provenance(job),
    )  # fmt: skip


def _provenance(job: _Job) -> dict[str, Any]:
    return {"fine_tuned": job.identity.to_dict()}


def _publish(job: _Job, run: RunFolder, progress: Progress, files: Mapping[str, bytes]) -> None:
    """Make OUT the model of the best evaluation, or of the last update where nothing was measured."""
    step = progress.step if progress.best_step is None else progress.best_step
    if job.settings.lora:
        _publish_adapter(read_adapter(run.path_of(step)), job.config, run.folder, files)
        return
    checkpoint = open_checkpoint(run.path_of(step))
    write_checkpoint(
        run.folder, job.config, lambda row: checkpoint.read(row.name), dtype="float32",
        extra_files={**job.files, **files}, provenance={**_provenance(job), "update": step}, overwrite=True,
        beside_others=True,
    )  # fmt: skip


def _publish_adapter(adapter: Adapter, config: GPTJConfig, folder: Path, files: Mapping[str, bytes]) -> None:
    """Make OUT the folder of an adapter."""
    write_adapter(folder, adapter.config, adapter.rows(config), adapter.read, overwrite=True)
    for name, data in files.items():
        with whole_file(folder / name) as write:
            write(data)


def _picture(training: Training, name: str, note: Callable[[str], None]) -> dict[str, bytes]:
    """The drawn curve by its file's name; nothing where it cannot be drawn, which is said."""
    if not can_draw():
        note(f"the loss curve is not drawn, since matplotlib is not installed: {install_line('finetune')}")
        return {}
    return {PICTURE: draw_curve([("", training.rows)], title=f"{name}: {training.progress.step} updates")}
