"""A whole fine-tuning: data and settings checked first, then the framework, the loop, and the folder at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import gptj
from gptj.adapters import Adapter, adapter_rows, read_adapter, write_adapter
from gptj.adapters.files import is_adapter
from gptj.adapters.merge import read_companions
from gptj.backends import choose_backend, install_line
from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema
from gptj.errors import InputError, WriteError, counted, shown
from gptj.finetune.checkpoints import CURVE_FILE, PARTS, Identity, RunFolder, Saved, write_moments
from gptj.finetune.curve import can_draw, curve_text, draw_curve, perplexity, write_curve
from gptj.finetune.data import Batches, Windows, describe, make_windows, read_documents
from gptj.finetune.loop import Progress, Report, Training, TrainingStep
from gptj.finetune.settings import Settings
from gptj.finetune.together import SharedRunFolder, Team
from gptj.paths.hub import locate
from gptj.reading.folder import Checkpoint, open_checkpoint, require_config, require_directory
from gptj.reading.load_plan import plan_causal_lm
from gptj.sharding import Mesh, ReadTogether, Strategy, check_mesh, choose_mesh
from gptj.text.tokenizer import GPTJTokenizer
from gptj.writing.checkpoint_writer import write_checkpoint
from gptj.writing.output_file import whole_file

__all__ = ["Outcome", "check_cut", "finetune"]

PICTURE = "loss.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run.

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
    cut: tuple[Strategy, Mesh | None] | None = None,
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
        cut: the strategy by which the processes that the launcher started share the model, each of which calls this,
            and how many along each axis, None for all along the strategy's own. The losses are those of one process;
            a run may go on with another strategy, and on another number of processes.
        note: told what a user may want to know, a sentence each.
        report: told of every update.
        stop: asked after every update; on True a checkpoint is written and the run ends.

    Raises:
        GPTJError: see `Settings`, `read_documents`, `make_windows`, `RunFolder`, `Identity.require_same` and
            `from_pretrained`.
    """
    settings, place = settings or Settings(), Path(output)
    note, report = note or (lambda sentence: None), report or (lambda line: None)
    if cut is None and resume and _is_in_parts(place):
        cut = "fsdp", Mesh()
        note("several processes wrote the last checkpoint: this one goes on as they did (--strategy fsdp)")
    team = None if cut is None else Team.of(choose_backend(backend))
    if team is not None and not team.first:
        note, report = (lambda sentence: None), (lambda line: None)

    def prepare() -> _Job:
        if cut is not None and team is not None:
            strategy, mesh = cut
            check_cut(settings, device, choose_backend(backend), strategy)
            mesh = choose_mesh(mesh, strategy, team.talk.count_devices(), processes=team.processes.size)
            check_mesh(GPTJConfig.from_file(Path(directory)), strategy, mesh, batch=settings.batch)
        if team is None or team.first:
            RunFolder(place, resume=resume).require_usable()
        return _prepare(
            Path(directory), Path(data), None if evaluation is None else Path(evaluation), settings, backend
        )

    if team is None or cut is None:
        job = prepare()
        with RunFolder(place, resume=resume) as run:
            saved = _begin(job, run, resume, note)
            return _train(job, run, saved, device, note, report, stop or (lambda: False))
    job = team.agree(prepare)
    team.require_alike(job.identity, job.checkpoint)
    shared = SharedRunFolder(place, resume=resume, team=team)
    with shared:
        saved = _begin(job, shared, resume, note)
        return _train_cut(job, shared, saved, cut, note, report, stop or (lambda: False))


def _begin(job: _Job, run: RunFolder, resume: bool, note: Callable[[str], None]) -> Saved | None:
    """The checkpoint that the run goes on from, None where it begins, and what a user may want to know of either."""
    saved = run.last() if resume else None
    if saved is not None:
        job.identity.require_same(saved.stored, saved.folder)
        note(f"goes on from update {saved.step} of {job.steps}")
    elif resume:
        note(f"{run.folder}: no checkpoint yet, so it begins at the beginning")
    _require_room(job, run.folder, saved)
    for sentence in job.describe():
        note(sentence)
    return saved


def _require_room(job: _Job, folder: Path, saved: Saved | None) -> None:
    """Refuse a run for whose checkpoints the disk has no room, as well as can be known before it.

    Raises:
        WriteError: with how many bytes would do.
    """
    settings = job.settings
    rows = adapter_rows(settings.adapter_config(), job.config) if settings.lora else schema(job.config)
    numbers = sum(row.size for row in rows)
    left = job.steps - (0 if saved is None else saved.step)
    checkpoint, model = 12 * numbers, 4 * numbers  # a float32 of each parameter, and two moments
    if left == 0:
        need = model
    elif saved is not None:
        need = checkpoint  # beside the one that is there
    else:
        need = checkpoint + (checkpoint if left > (settings.save_every or max(1, job.steps // 10)) else model)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # some network file systems do not say
        return
    if free < need:
        hint = "Free some space, or give an OUT on another disk"
        raise WriteError(
            "no room for its checkpoints", file=folder, expected=f"{need:,} bytes free", found=f"{free:,}", hint=hint
        )


def _is_in_parts(folder: Path) -> bool:
    """Whether several processes wrote the last checkpoint there."""
    run = RunFolder(folder, resume=True)
    steps = run.steps() if run.checkpoints.is_dir() else []
    return bool(steps) and run.parts_of(steps[-1]) is not None


def check_cut(settings: Settings, device: str, backend: str, strategy: Strategy) -> None:
    """Refuse what a run across processes cannot do.

    Raises:
        InputError: naming the option.
    """
    if backend == "tf" and strategy != "dp":
        hint = "Train whole copies with --strategy dp, or in parts in PyTorch or Flax"
        raise InputError(
            "TensorFlow trains no model in parts", where="--strategy", expected="dp", found=strategy, hint=hint
        )
    if settings.lora:
        hint = "Leave out --strategy: an adapter is small, and its base needs no gradient"
        raise InputError("an adapter is trained by one process", where="--lora", found=settings.lora, hint=hint)
    if device != "auto":
        raise InputError("the processes say where it runs", where="--device", expected="auto", found=shown(device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """A run before any framework: its model, data and settings."""

    checkpoint: Checkpoint
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
            f"{windows.learnt:,} tokens in {counted(len(windows), 'window')} of at most {windows.ids.shape[1]}; "
            f"{counted(self.steps, 'update')} of {counted(self.settings.micro_batches, 'window')}, "
            f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"
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
    require_directory(directory)
    if is_adapter(directory):
        hint = "Give its base; model.load_adapter(DIR, is_trainable=True) trains it further in a loop of yours"
        raise InputError("a LoRA adapter without its base model", where=str(directory), hint=hint)
    require_config(directory)
    config = GPTJConfig.from_file(directory)
    checkpoint = open_checkpoint(directory)
    plan_causal_lm(checkpoint)
    tokenizer = GPTJTokenizer.from_pretrained(directory)
    tokenizer.check_fits(config)
    length = config.n_positions if settings.length is None else settings.length
    if length > config.n_positions:
        expected = f"at most n_positions = {config.n_positions}"
        raise InputError("longer than the model's positions", where="--length", expected=expected, found=length)

    def windows_of(path: Path) -> Windows:
        return make_windows(path, read_documents(path), tokenizer, length=length, pack=settings.pack)

    if settings.lora is not None and settings.lora > config.n_embd:
        expected = f"at most n_embd = {config.n_embd}"
        hint = "A larger rank adds nothing; without --lora all is trained"
        raise InputError("more than a matrix has", where="--lora", expected=expected, found=settings.lora, hint=hint)
    training = windows_of(data)
    measured = None if evaluation is None else windows_of(evaluation)
    batches = Batches(training, settings.batch, settings.accumulate, settings.seed)
    steps = settings.steps or (settings.epochs or 1) * batches.per_epoch
    if settings.warmup > steps:
        hint = "Its share of all updates may be said too: 0.03"
        raise InputError(
            "longer than the run",
            where="--warmup",
            expected=f"at most {steps}",
            found=f"{settings.warmup:g}",
            hint=hint,
        )
    files = read_companions(directory)
    model = {"config_sha256": config.architecture_sha256}
    if settings.lora:  # whose base is read again, and must be the same
        model["weights_sha256"] = _hash_weights(checkpoint)
    identity = Identity(
        backend=chosen, settings=settings, steps=steps, model=model,
        data=describe(training), evaluation=None if measured is None else describe(measured),
    )  # fmt: skip
    return _Job(
        checkpoint=checkpoint, config=config, files=files, ends=tokenizer.eos_token_id is not None, batches=batches,
        identity=identity,
        evaluation=None if measured is None else Batches(measured, settings.batch),
    )  # fmt: skip


def _hash_weights(checkpoint: Checkpoint) -> str:
    """A hash of the model's weights files."""
    digest = hashlib.sha256()
    for path in checkpoint.weight_files:
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
            run.save(training.progress, job.identity, training.rows, write=lambda folder: _write(job, folder, step))
            write_curve(run.folder / CURVE_FILE, training.rows)

        finished = training.run(save=save, report=report, stop=stop)
    files = {CURVE_FILE: curve_text(training.rows)} | _picture(training, run.folder.name, note)
    if finished:
        _publish(job, run, training.progress, files)
    else:
        _write_files(run.folder, files)
    return _outcome(job, run, training, finished, PICTURE in files)


def _train_cut(
    job: _Job,
    run: SharedRunFolder,
    saved: Saved | None,
    cut: tuple[Strategy, Mesh | None],
    note: Callable[[str], None],
    report: Callable[[Report], None],
    stop: Callable[[], bool],
) -> Outcome:
    """`_train`, where each process holds a part of the model and of AdamW's moments, and computes its rows."""
    (strategy, mesh), team = cut, run.team
    progress, rows = (Progress(), []) if saved is None else (saved.progress, saved.rows)
    gptj.backend(job.identity.backend)
    room: Any = importlib.import_module(f"gptj.{job.identity.backend}.parallel_training")
    base = job.checkpoint.directory if saved is None or saved.parts is not None else saved.folder

    def open_step() -> TrainingStep:
        model = room.open_model(base, job.settings, mesh=mesh, strategy=strategy)
        if job.settings.checkpoint_gradients:
            model.gradient_checkpointing_enable()
        step: TrainingStep = room.TrainingStep(model, job.settings)
        return step

    step: Any = team.agree(open_step)
    if saved is not None and saved.parts is not None:
        step.load(saved.parts, updates=progress.updates)
    elif saved is not None:
        shapes = {row.name: row.shape for row in schema(job.config)}
        step.restore(team.agree(lambda: saved.moments(shapes)), updates=progress.updates)
    training = Training(step, job.settings, job.batches, job.evaluation, steps=job.steps, progress=progress, rows=rows)

    def write(folder: Path) -> None:
        if room.IN_PARTS:
            step.save(folder / PARTS)
        elif team.first:
            _write(job, folder, step)

    def save(training: Training) -> None:
        run.save(training.progress, job.identity, training.rows, write=write)
        if team.first:
            write_curve(run.folder / CURVE_FILE, training.rows)

    finished = training.run(save=save, report=report, stop=lambda: team.any(stop()))
    files = {CURVE_FILE: curve_text(training.rows)}
    if team.first:
        files |= _picture(training, run.folder.name, note)
    best = training.progress.best_step
    gone = best is not None and best != training.progress.step  # the best is no more what the processes hold
    parts = run.parts_of(best) if finished and gone and best is not None else None
    if parts is not None:
        step.load(parts, updates=progress.updates)
    if finished and (parts is not None or not gone):
        together = ReadTogether(schema(job.config), lambda row: step.read(row.name))
        team.agree(lambda: _publish_together(job, run, training.progress, files, together, first=team.first))
    elif team.first:
        _publish(job, run, training.progress, files) if finished else _write_files(run.folder, files)
    return _outcome(job, run, training, finished, PICTURE in files)


def _publish_together(
    job: _Job, run: RunFolder, progress: Progress, files: Mapping[str, bytes], together: ReadTogether, *, first: bool
) -> None:
    """Make OUT the model that the processes hold: the first writes it, a tensor at a time that all of them read."""
    try:
        if first:
            step = progress.step if progress.best_step is None else progress.best_step
            _write_out(job, run.folder, together, files, step)
    finally:
        together.finish()


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with whole_file(folder / name) as write:
            write(data)


def _outcome(job: _Job, run: RunFolder, training: Training, finished: bool, drawn: bool) -> Outcome:
    progress = training.progress
    return Outcome(
        folder=run.folder, finished=finished, checkpoint=run.path_of(progress.step), step=progress.step,
        steps=job.steps, loss=training.rows[-1].loss if training.rows else None, best_step=progress.best_step,
        best_loss=progress.best_loss, tokens=progress.tokens, seconds=progress.seconds,
        picture=run.folder / PICTURE if drawn else None,
    )  # fmt: skip


def _open(job: _Job, room: Any, saved: Saved | None) -> Any:
    """The model that is trained: the base or a checkpoint's, or the base with an adapter, new or a checkpoint's."""
    settings = job.settings
    model = room.open_model(job.checkpoint.directory if saved is None or settings.lora else saved.folder, settings)
    if settings.lora and saved is None:
        model.add_adapter(settings.adapter_config(str(job.checkpoint.directory)), seed=settings.seed)
    elif settings.lora:
        model.load_adapter(saved.folder, is_trainable=True)  # type: ignore[union-attr]
    if settings.checkpoint_gradients:
        model.gradient_checkpointing_enable()
    return model


def _write(job: _Job, folder: Path, step: TrainingStep) -> None:
    """Write the model as it is, or its adapter, and AdamW's moments into a new folder."""
    if job.settings.lora:
        step.trained_model().save_adapter(folder)
    else:
        write_checkpoint(
            folder, job.config, lambda row: step.read(row.name), dtype="float32", extra_files=job.files,
            provenance=_provenance(job),
        )  # fmt: skip
    write_moments(folder, step.moments())


def _provenance(job: _Job) -> dict[str, Any]:
    return {"fine_tuned": job.identity.to_dict()}


def _publish(job: _Job, run: RunFolder, progress: Progress, files: Mapping[str, bytes]) -> None:
    """Make OUT the model of the best evaluation, or of the last update where nothing was measured."""
    step = progress.step if progress.best_step is None else progress.best_step
    if job.settings.lora:
        _publish_adapter(read_adapter(run.path_of(step)), job.config, run.folder, files)
        return
    checkpoint = open_checkpoint(run.path_of(step))
    _write_out(job, run.folder, lambda row: checkpoint.read(row.name), files, step)


def _write_out(
    job: _Job, folder: Path, read: Callable[[TensorSpec], NDArray[Any]], files: Mapping[str, bytes], step: int
) -> None:
    """Write the folder of the model as it was after update `step`."""
    write_checkpoint(
        folder, job.config, read, dtype="float32", extra_files={**job.files, **files},
        provenance={**_provenance(job), "update": step}, overwrite=True, beside_others=True,
    )  # fmt: skip


def _publish_adapter(adapter: Adapter, config: GPTJConfig, folder: Path, files: Mapping[str, bytes]) -> None:
    """Make OUT the folder of an adapter."""
    write_adapter(folder, adapter.config, adapter.rows(config), adapter.read, overwrite=True)
    _write_files(folder, files)


def _picture(training: Training, name: str, note: Callable[[str], None]) -> dict[str, bytes]:
    """The drawn curve by its file's name; nothing where it cannot be drawn, which is said."""
    if not can_draw():
        note(f"the loss curve is not drawn, since matplotlib is not installed: {install_line('finetune')}")
        return {}
    return {PICTURE: draw_curve([("", training.rows)], title=f"{name}: {training.progress.step} updates")}
