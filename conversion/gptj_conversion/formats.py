"""The formats, a row each: what one is known by, how it is opened, and how it is planned and written.

A format that is only read (an archive of a TPU checkpoint) has no writer. The writers do the work; here is which
facts of a job each of them is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from gptj.config import GPTJConfig
from gptj.errors import InputError, SchemaError, shown
from gptj.parity.fingerprint import FingerprintObserver
from gptj.reading.buffers import ReusedBuffer
from gptj.reading.weight_files import INDEX_FILE, WEIGHTS_FILE, weight_sets
from gptj.writing.checkpoint_writer import write_checkpoint
from gptj.writing.containers import NamedContainer
from gptj_conversion.common.dialects import Dialect
from gptj_conversion.common.foreign import open_named
from gptj_conversion.common.foreign_writer import plan_foreign, write_foreign
from gptj_conversion.common.plan import PlannedFile, plan_files
from gptj_conversion.common.source import Facts, Source
from gptj_conversion.common.stored_array import StoredArray
from gptj_conversion.hf.canonical import describe_safetensors, open_safetensors
from gptj_conversion.hf.flax_msgpack import FLAX_FILE, FLAX_INDEX, MsgpackWriter, read_msgpack
from gptj_conversion.hf.keras_h5 import H5_FILE, H5_INDEX, H5Writer, model_prefix, read_h5_files
from gptj_conversion.hf.torch_bin import BIN_FILE, BIN_INDEX, BinWriter, read_bin
from gptj_conversion.job import Job, Reopen
from gptj_conversion.mesh.folder import DiskFolder, looks_like_mesh
from gptj_conversion.mesh.reader import open_mesh
from gptj_conversion.mesh.tar import is_tar, is_tar_name, open_tar
from gptj_conversion.mesh.training_config import TrainingConfig
from gptj_conversion.mesh.writer import plan_mesh, write_mesh
from gptj_conversion.wrong_paths import read_start

__all__ = ["FORMATS", "Format", "Opening", "find_target"]


@dataclasses.dataclass(frozen=True)
class Opening:
    """The choices with which a checkpoint is opened.

    Attributes:
        config: in place of the checkpoint's own.
        weights: the weights file or index that was chosen.
        follow_links: accept links that lead out of the folder.
    """

    config: TrainingConfig | GPTJConfig | None = None
    weights: str | None = None
    follow_links: bool = False

    @property
    def model_config(self) -> GPTJConfig | None:
        """The config as a model's, whichever kind it is."""
        return self.config.model_config() if isinstance(self.config, TrainingConfig) else self.config


class Target(Protocol):
    """A format as it is planned and written."""

    def plan(self, job: Job) -> tuple[PlannedFile, ...]:
        """The weights files that the job would make; raises GPTJError where the format cannot hold the model."""

    def write(self, job: Job, reopen: Reopen) -> Path:
        """The finished directory; `reopen` opens a stage in this format."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: the word that chooses it.
        sign: the names that it is known by, for the message that nothing was found.
        fits: whether a path looks like it; reads names only, or a few bytes.
        open: the source, everything checked that can be without reading data.
        target: how it is written; None for a format that is only read.
        files: the stem and the suffix of its weights files, where it is known by these.
        describe_faulty: the facts of a checkpoint that may not fit its model, which is among the problems then; it is
            given the source where that is open already. None where only what opens is described.
    """

    name: str
    sign: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, Opening], Source]
    target: Target | None = None
    files: tuple[str, str] | None = None
    describe_faulty: Callable[[Path, Opening, Source | None], Facts] | None = None

    def list_sets(self, path: Path) -> list[str]:
        """The sets of weights of this format in a folder; none for a format without names of files."""
        return [] if self.files is None else weight_sets(path, *self.files)

    def describe(self, path: Path, opening: Opening, opened: Source | None = None) -> Facts:
        """The facts of the checkpoint at `path`; `opened` is it, where it is open already."""
        if self.describe_faulty is not None:
            return self.describe_faulty(path, opening, opened)
        return (self.open(path, opening) if opened is None else opened).facts()


# ---- safetensors


def _open_canonical(path: Path, opening: Opening) -> Source:
    return open_safetensors(
        path, config=opening.model_config, weights=opening.weights, follow_links=opening.follow_links
    )


def _describe_canonical(path: Path, opening: Opening, opened: Source | None) -> Facts:
    return describe_safetensors(
        path, opened, config=opening.model_config, weights=opening.weights, follow_links=opening.follow_links
    )


class _SafetensorsTarget:
    """A folder of config.json and safetensors."""

    def plan(self, job: Job) -> tuple[PlannedFile, ...]:
        """See `Target`."""
        dtypes = {row.name: job.dtype_of(row.name) for row in job.rows}
        return plan_files(job.rows, dtypes, job.choices.max_shard_bytes)

    def write(self, job: Job, reopen: Reopen) -> Path:
        """See `Target`."""
        choices, buffer = job.choices, ReusedBuffer()
        with FingerprintObserver(job.config, job.head) if choices.fingerprint else contextlib.nullcontext() as witness:
            facts = job.facts(reopen, witness)
            return write_checkpoint(
                job.directory,
                job.config,
                lambda row: job.read_for_cast(row, buffer),
                head=job.head,
                dtype=lambda row: job.dtype_of(row.name),  # known beforehand, so the buffer that is needed is too
                max_shard_bytes=choices.max_shard_bytes,
                overwrite=choices.overwrite,
                extra_files=job.companions,
                progress=choices.progress,
                allow_overflow=choices.allow_overflow,
                allow_nonfinite=choices.allow_nonfinite,
                witness=witness,
                provenance=facts.provenance,
                origin=facts.origin,
                examine=facts.examine,
                input_identity=facts.input_identity,
                resume=facts.resume,
            )


# ---- TPU checkpoints


def _open_mesh(path: Path, opening: Opening) -> Source:
    return open_mesh(path, config=opening.config, follow_links=opening.follow_links)


def _open_tar(path: Path, opening: Opening) -> Source:
    return open_tar(path, config=opening.config)


class _MeshTarget:
    """A TPU checkpoint's folder."""

    def plan(self, job: Job) -> tuple[PlannedFile, ...]:
        """See `Target`."""
        job.require_language_model()
        return plan_mesh(
            job.config,
            shards=job.shards,
            layout=job.choices.layout,
            dtype=job.require_one_dtype(),
            step=job.source.context.step,
        )

    def write(self, job: Job, reopen: Reopen) -> Path:
        """See `Target`."""
        job.require_language_model()
        return write_mesh(
            job.directory,
            job.config,
            job.read_for_cast,
            shards=job.shards,
            layout=job.choices.layout,
            dtype=job.require_one_dtype(),
            step=job.source.context.step,
            options=job.options(reopen),
        )


# ---- one weights file, or several and an index


@dataclasses.dataclass(frozen=True)
class _NamedTarget:
    """A folder of config.json and weights files whose arrays have names.

    Attributes:
        file_name: of the weights, where they are in one file.
        dialect: how arrays are spelt and turned.
        container: writes one file.
        prefix: for a head, what the index puts before each name.
        lacks: a dtype that the container has not.
    """

    file_name: str
    dialect: Dialect
    container: type[NamedContainer]
    prefix: Callable[[str], str] = lambda head: ""
    lacks: str = ""

    def plan(self, job: Job) -> tuple[PlannedFile, ...]:
        """See `Target`."""
        for row in job.rows:
            if job.dtype_of(row.name) == self.lacks:
                raise SchemaError(
                    f"{self.file_name} has no {self.lacks}",
                    where=row.name,
                    hint="Choose float32, or float16 if it fits",
                )
        return plan_foreign(
            job.config,
            file_name=self.file_name,
            dialect=self.dialect,
            dtype_of=job.dtype_of,
            head=job.head,
            max_shard_bytes=job.choices.max_shard_bytes,
        )

    def write(self, job: Job, reopen: Reopen) -> Path:
        """See `Target`."""
        return write_foreign(
            job.directory,
            job.config,
            job.read_for_cast,
            self.container,
            file_name=self.file_name,
            dialect=self.dialect,
            dtype_of=job.dtype_of,
            head=job.head,
            index_prefix=self.prefix(job.head),
            weights_format=job.choices.to,
            options=job.options(reopen),
        )


def _make_named(
    name: str, index: str, read: Callable[[Iterable[Path]], Iterable[StoredArray]], target: _NamedTarget
) -> Format:
    """The row of a format that is known by the names of its weights file and its index."""
    files = (Path(target.file_name).stem, Path(target.file_name).suffix)

    def open_it(path: Path, opening: Opening) -> Source:
        return open_named(
            path,
            read,
            name=target.file_name,
            dialect=target.dialect,
            config=opening.model_config,
            weights=opening.weights,
            follow_links=opening.follow_links,
        )

    sign = f"{target.file_name} or {index}"
    return Format(name, sign, lambda path: bool(weight_sets(path, *files)), open_it, target, files)


def _each(read: Callable[[Path], list[StoredArray]]) -> Callable[[Iterable[Path]], list[StoredArray]]:
    """A reader of one file as one of several."""
    return lambda paths: [array for path in paths for array in read(path)]


# ---- the table


FORMATS = (
    Format(
        "safetensors",
        f"{WEIGHTS_FILE} or {INDEX_FILE}",
        lambda path: bool(weight_sets(path, "model", ".safetensors")),
        _open_canonical,
        _SafetensorsTarget(),
        ("model", ".safetensors"),
        _describe_canonical,
    ),
    Format(
        "mesh",
        "step_N or shard_0 folders",
        lambda path: path.is_dir() and looks_like_mesh(DiskFolder(path)),
        _open_mesh,
        _MeshTarget(),
    ),
    Format(
        "tar",
        "a file *.tar or *.tar.zst",
        lambda path: path.is_file() and (is_tar_name(path) or is_tar(*read_start(path))),
        _open_tar,
    ),
    _make_named("bin", BIN_INDEX, _each(read_bin), _NamedTarget(BIN_FILE, "pt", BinWriter)),
    _make_named("flax", FLAX_INDEX, _each(read_msgpack), _NamedTarget(FLAX_FILE, "flax", MsgpackWriter)),
    _make_named("tf", H5_INDEX, read_h5_files, _NamedTarget(H5_FILE, "tf", H5Writer, model_prefix, lacks="bfloat16")),
)


def find_target(name: str) -> Target:
    """The writer of the format of this name.

    Raises:
        InputError: there is no such format, or it is only read.
    """
    targets = {known.name: known.target for known in FORMATS if known.target is not None}
    if name not in targets:
        raise InputError("no such format", where="to", expected="one of " + ", ".join(targets), found=shown(name))
    return targets[name]
