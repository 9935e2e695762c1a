"""The one door of the converters: recognise what is there, write what is asked, say what a path is.

A format is known by what lies on the disk, never by what a caller hopes; where two fit (a folder with the
weights of two frameworks), none is guessed. Reading is lazy and writing streams, so a conversion holds one
tensor and some buffers, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.dtypes import numpy_dtype
from gptj.errors import (
    CheckpointWarning,
    ConfigError,
    FormatError,
    GPTJError,
    InputError,
    LimitError,
    MissingFileError,
    SchemaError,
    WriteError,
    shown,
    warn_of,
)
from gptj.json_file import read_json_object
from gptj.parity.fingerprint import FingerprintObserver
from gptj.paths import is_folder, likely_folder
from gptj.reading.buffers import Room
from gptj.reading.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    choose_set,
    refuse_folder,
    split_weights,
    weight_sets,
    weights_suffix,
)
from gptj.schema import TensorSpec, schema
from gptj.writing.checkpoint_writer import write_checkpoint
from gptj.writing.containers import NamedContainer
from gptj.writing.folder import ManifestFacts, WritingOptions
from gptj_conversion.common.dialects import Dialect
from gptj_conversion.common.foreign import ForeignCheckpoint
from gptj_conversion.common.foreign_writer import plan_foreign, write_foreign
from gptj_conversion.common.plan import ConversionPlan, PlannedFile, interim_dtype, make_plan, plan_files, plan_memory
from gptj_conversion.common.source import Facts, Source
from gptj_conversion.companions import settle_companions
from gptj_conversion.hf.canonical import describe_canonical, open_safetensors
from gptj_conversion.hf.flax_msgpack import FLAX_FILE, FLAX_INDEX, MsgpackWriter, open_flax
from gptj_conversion.hf.keras_h5 import H5_FILE, H5_INDEX, H5Writer, model_prefix, open_h5
from gptj_conversion.hf.torch_bin import BIN_FILE, BIN_INDEX, BinWriter, open_bin
from gptj_conversion.mesh.folder import DiskFolder, looks_like_mesh
from gptj_conversion.mesh.reader import MeshCheckpoint, open_mesh
from gptj_conversion.mesh.tar import is_tar, is_tar_name, open_tar
from gptj_conversion.mesh.training_config import TrainingConfig, config_of
from gptj_conversion.mesh.writer import plan_mesh, write_mesh
from gptj_conversion.proof import examiner, input_identity, origin_of
from gptj_conversion.wrong_paths import config_file_in, refuse_what_is_known, start_of

__all__ = ["Facts", "convert", "describe", "open_source", "plan", "source_formats", "target_formats"]

ConfigChoice = TrainingConfig | GPTJConfig | str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class _Options:
    config: TrainingConfig | GPTJConfig | None
    weights: str | None
    follow_links: bool


@dataclasses.dataclass(frozen=True)
class _Format:
    """One format that can be read.

    Attributes:
        name: what a caller says to choose it.
        sign: what it is known by, for the message that nothing was found.
        fits: whether a path looks like it; reads names only, or a few bytes.
        open: the source, everything checked that can be without reading data.
        describe: the facts; unlike `open`, with whatever keeps it from being converted as a problem.
        files: the stem and the suffix of its weights files, where it is known by these.
    """

    name: str
    sign: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, _Options], Source]
    describe: Callable[[Path, _Options], Facts]
    files: tuple[str, str] | None = None

    def sets(self, path: Path) -> list[str]:
        """The sets of weights of this format in a folder; none for a format without names of files."""
        return [] if self.files is None else weight_sets(path, *self.files)


def _open_mesh(path: Path, options: _Options) -> Source:
    return open_mesh(path, config=options.config, follow_links=options.follow_links)


def _open_tar(path: Path, options: _Options) -> Source:
    return open_tar(path, config=options.config)


def _open_canonical(path: Path, options: _Options) -> Source:
    return open_safetensors(
        path, config=_model_config(options), weights=options.weights, follow_links=options.follow_links
    )


def _describe_canonical(path: Path, options: _Options) -> Facts:
    return describe_canonical(
        path, config=_model_config(options), weights=options.weights, follow_links=options.follow_links
    )


def _model_config(options: _Options) -> GPTJConfig | None:
    return options.config.model_config() if isinstance(options.config, TrainingConfig) else options.config


def _named_format(name: str, files: tuple[str, str], opener: Callable[..., ForeignCheckpoint]) -> _Format:
    """A format of one weights file, or several and an index."""
    stem, suffix = Path(files[0]).stem, Path(files[0]).suffix

    def open_it(path: Path, options: _Options) -> Source:
        weights = options.weights or files[0]
        return opener(path, config=_model_config(options), weights=weights, follow_links=options.follow_links)

    return _Format(
        name,
        " or ".join(files),
        lambda path: bool(weight_sets(path, stem, suffix)),
        open_it,
        lambda path, options: open_it(path, options).facts(),
        (stem, suffix),
    )


_FORMATS = (
    _Format(
        "safetensors",
        f"{WEIGHTS_FILE} or {INDEX_FILE}",
        lambda path: bool(weight_sets(path, "model", ".safetensors")),
        _open_canonical,
        _describe_canonical,
        ("model", ".safetensors"),
    ),
    _Format(
        "mesh",
        "step_N or shard_0 folders",
        lambda path: path.is_dir() and looks_like_mesh(DiskFolder(path)),
        _open_mesh,
        lambda path, options: _open_mesh(path, options).facts(),
    ),
    _Format(
        "tar",
        "a file *.tar or *.tar.zst",
        lambda path: path.is_file() and (is_tar_name(path) or is_tar(*start_of(path))),
        _open_tar,
        lambda path, options: _open_tar(path, options).facts(),
    ),
    _named_format("bin", (BIN_FILE, BIN_INDEX), open_bin),
    _named_format("flax", (FLAX_FILE, FLAX_INDEX), open_flax),
    _named_format("tf", (H5_FILE, H5_INDEX), open_h5),
)

_SUFFIXES = {".safetensors": "safetensors", ".bin": "bin", ".msgpack": "flax", ".h5": "tf"}
_SUFFIXES |= dict.fromkeys((".pt", ".pth", ".ckpt"), "bin")


def source_formats() -> tuple[str, ...]:
    """The names of the formats that can be read."""
    return tuple(known.name for known in _FORMATS)


def open_source(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    config: ConfigChoice = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Source:
    """The checkpoint at `path`, of whatever format, its headers checked.

    Args:
        path: a folder, or a weights file in one.
        source_format: one of `source_formats()`, where several fit.
        config: the training config (or its file) of a TPU checkpoint; a GPTJConfig or config.json else.
        weights: the name of the weights file, where a folder holds several.
        follow_links: accept links that lead out of the folder.

    Raises:
        MissingFileError: there is nothing that any reader knows.
        FormatError: several formats fit, or a file is malformed.
        GPTJError: see the readers.
    """
    known, path, options = _recognise(path, source_format, config, weights, follow_links)
    return known.open(path, options)


def describe(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    config: ConfigChoice = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Facts:
    """What the checkpoint at `path` is, from its headers; see `open_source` for the arguments.

    Raises:
        GPTJError: it cannot be opened at all; what would only keep it from being converted is in `problems`.
    """
    known, path, options = _recognise(path, source_format, config, weights, follow_links)
    return known.describe(path, options)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: ConfigChoice = None,
    dtype: str | None = None,
    overwrite: bool = False,
    source_format: str | None = None,
    weights: str | None = None,
    to: str = "safetensors",
    max_shard_bytes: int = 5_000_000_000,
    shards: int | None = None,
    layout: Literal["slim", "full"] = "slim",
    follow_links: bool = False,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    fingerprint: bool = True,
    verify: bool = False,
    resume: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """The directory `dst`, the checkpoint at `src` in another format.

    Args:
        src, config, source_format, weights, follow_links: see `open_source`.
        dst: where; its parent must exist.
        dtype: of all tensors; None keeps what each is stored as.
        overwrite: whether a checkpoint at `dst` may be replaced.
        to: the format to write, one of `target_formats()`.
        max_shard_bytes: weights of more bytes than this are cut into several files and an index.
        shards, layout: of a TPU checkpoint (`to="mesh"`): the cores that will load it, and "slim" or "full".
        allow_overflow, allow_nonfinite: write values that became infinite in a narrowing cast; NaN and infinity.
        fingerprint: note some logits of the float64 oracle in the manifest; see `gptj.parity.fingerprint`.
        verify: run the oracle with the source's tensors and with what was written, and refuse a difference.
        resume: go on from what a killed conversion of the same input left; else it is cleared.
        tokenizer: to write beside the weights: "gpt2", which is GPT-J's and needs the extra `vocab`; one's folder; None
            for the one that lies beside the source, where one does; "none" for none. It also says which token ends a
            text; see `gptj_conversion.companions` for the rule, and `plan` for what it comes to.
        progress: told the name and bytes of each tensor when it has been written.

    Raises:
        GPTJError: see `open_source` and the writers; nothing is left behind at `dst`.
    """
    order = _settle(
        src, dst, config=config, dtype=dtype, source_format=source_format, weights=weights, to=to,
        max_shard_bytes=max_shard_bytes, shards=shards, layout=layout, follow_links=follow_links, tokenizer=tokenizer,
        overwrite=overwrite, allow_overflow=allow_overflow, allow_nonfinite=allow_nonfinite, fingerprint=fingerprint,
        verify=verify, resume=resume, progress=progress,
    )  # fmt: skip
    for oddity in order.source.oddities if isinstance(order.source, MeshCheckpoint) else ():
        warn_of(oddity, file=src)
    try:
        return _TARGETS[to].write(order)
    except GPTJError:
        raise
    except MemoryError:
        needed = plan_memory(order.rows, order.source, order.dtype, to)
        raise LimitError(
            f"needs about {needed / 1e9:.2g} GB of memory over what Python takes, more than there is",
            file=order.source.path,
        ) from None


def plan(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: ConfigChoice = None,
    dtype: str | None = None,
    source_format: str | None = None,
    weights: str | None = None,
    to: str = "safetensors",
    max_shard_bytes: int = 5_000_000_000,
    shards: int | None = None,
    layout: Literal["slim", "full"] = "slim",
    follow_links: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> ConversionPlan:
    """What `convert` with these arguments would do; only headers are read, and nothing is written.

    Raises:
        GPTJError: it would not begin; see `open_source`.
    """
    order = _settle(
        src, dst, config=config, dtype=dtype, source_format=source_format, weights=weights, to=to,
        max_shard_bytes=max_shard_bytes, shards=shards, layout=layout, follow_links=follow_links, tokenizer=tokenizer,
    )  # fmt: skip
    return make_plan(order.source, order.rows, Path(dst), to=to, dtype=order.dtype, files=_TARGETS[to].plan(order),
                     notes=order.notes)  # fmt: skip


def target_formats() -> tuple[str, ...]:
    """The names of the formats that can be written."""
    return tuple(_TARGETS)


@dataclasses.dataclass(frozen=True)
class _Order:
    """What is to be written, and where."""

    directory: Path
    source: Source
    config: GPTJConfig
    dtype: str | None
    max_shard_bytes: int
    shards: int
    layout: Literal["slim", "full"]
    companions: dict[str, bytes]
    notes: tuple[str, ...]
    overwrite: bool = False
    allow_overflow: bool = False
    allow_nonfinite: bool = False
    fingerprint: bool = True
    verify: bool = False
    resume: bool = False
    progress: Callable[[str, int], None] | None = None

    @property
    def rows(self) -> tuple[TensorSpec, ...]:
        """What is to be written."""
        return schema(self.config, self.source.head)

    def dtype_of(self, name: str) -> str:
        """The dtype that a tensor is to be written in."""
        return self.dtype or self.source.dtype_of(name)

    def read_for_cast(self, row: TensorSpec, room: Room | None = None) -> NDArray[Any]:
        """A tensor as a writer wants it that casts and counts by itself."""
        return self.source.read(row, interim_dtype(self.source.dtype_of(row.name), self.dtype), room=room)

    def read(self, row: TensorSpec) -> NDArray[Any]:
        """A tensor in the dtype to be written."""
        return self.source.read(row, self.dtype, allow_overflow=self.allow_overflow)

    def one_dtype(self) -> str:
        """The dtype to write, for formats that have one for all tensors."""
        stored = {self.source.dtype_of(row.name) for row in self.rows}
        if self.dtype is None and len(stored) > 1:
            raise InputError(
                "the tensors are of several dtypes",
                where="dtype",
                expected="one for all",
                found=", ".join(sorted(stored)),
            )
        return self.dtype or stored.pop()

    def require_language_model(self, name: str) -> None:
        """Refuse another head, for formats that have none."""
        if self.source.head != "causal_lm":
            raise SchemaError(
                f"{name} has no place for this head",
                file=self.source.path,
                expected="causal_lm",
                found=self.source.head,
            )


def _settle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: ConfigChoice,
    dtype: str | None,
    source_format: str | None,
    weights: str | None,
    to: str,
    max_shard_bytes: int,
    shards: int | None,
    layout: Literal["slim", "full"],
    follow_links: bool,
    tokenizer: str | os.PathLike[str] | None,
    **rest: Any,
) -> _Order:
    """The order that these arguments of `convert` and `plan` come to, everything checked that can be at once."""
    if to not in _TARGETS:
        raise InputError("no such format", where="to", expected="one of " + ", ".join(_TARGETS), found=shown(to))
    if shards is None and to == "mesh":
        raise InputError("is needed: how many cores will load it", where="shards", hint="GPT-J-6B was trained on 8")
    if shards is not None and to != "mesh":
        raise InputError("is for TPU checkpoints alone", where="shards", found=f"to={to!r}, shards={shards}")
    if dtype is not None:
        dtype = numpy_dtype(dtype).name
    source = open_source(src, source_format=source_format, config=config, weights=weights, follow_links=follow_links)
    settled = settle_companions(source, _require_config(source), Path(dst), tokenizer=tokenizer)
    _require_apart(Path(src), Path(dst))
    return _Order(
        Path(dst), source, settled.config, dtype, max_shard_bytes, 1 if shards is None else shards, layout,
        settled.files, (*_notes(source), *settled.notes), **rest,
    )  # fmt: skip


def _write_canonical(order: _Order) -> Path:
    head, room = order.source.head, Room()
    with FingerprintObserver(order.config, head) if order.fingerprint else contextlib.nullcontext() as witness:
        facts = _facts(order, "safetensors", witness)
        return write_checkpoint(
            order.directory,
            order.config,
            lambda row: order.read_for_cast(row, room),
            head=head,
            dtype=lambda row: order.dtype_of(row.name),  # known beforehand, so the room that is needed is too
            max_shard_bytes=order.max_shard_bytes,
            overwrite=order.overwrite,
            extra_files=order.companions,
            progress=order.progress,
            allow_overflow=order.allow_overflow,
            allow_nonfinite=order.allow_nonfinite,
            witness=witness,
            provenance=facts.provenance,
            origin=facts.origin,
            examine=facts.examine,
            input_identity=facts.input_identity,
            resume=facts.resume,
        )


def _facts(order: _Order, weights_format: str, witness: FingerprintObserver | None = None) -> ManifestFacts:
    """What the manifest says besides the tensors, the same for every format."""

    def reopen(stage: Path) -> Source:
        return open_source(stage, source_format=weights_format)

    return ManifestFacts(
        provenance=_provenance(order.source, order.config, order.dtype, order.notes),
        origin=lambda row: origin_of(order.source, row),
        examine=examiner(
            order.config,
            order.source.head,
            order.read,
            reopen,
            fingerprint=order.fingerprint,
            verify=order.verify,
            witness=witness,
        ),
        reopen=reopen,
        input_identity=input_identity(order.source.path),
        resume=order.resume,
    )


def _options(order: _Order, weights_format: str) -> WritingOptions:
    return WritingOptions(
        max_shard_bytes=order.max_shard_bytes,
        extra_files=order.companions,
        overwrite=order.overwrite,
        progress=order.progress,
        allow_overflow=order.allow_overflow,
        allow_nonfinite=order.allow_nonfinite,
        facts=_facts(order, weights_format),
    )


def _plan_canonical(order: _Order) -> tuple[PlannedFile, ...]:
    return plan_files(order.rows, {row.name: order.dtype_of(row.name) for row in order.rows}, order.max_shard_bytes)


def _plan_mesh(order: _Order) -> tuple[PlannedFile, ...]:
    order.require_language_model("a TPU checkpoint")
    return plan_mesh(order.config, shards=order.shards, layout=order.layout, dtype=order.one_dtype(), step=_step(order))


def _notes(source: Source) -> tuple[str, ...]:
    return source.notes if isinstance(source, MeshCheckpoint) else ()


def _step(order: _Order) -> int:
    return order.source.step if isinstance(order.source, MeshCheckpoint) else 0


def _write_mesh(order: _Order) -> Path:
    order.require_language_model("a TPU checkpoint")
    return write_mesh(
        order.directory,
        order.config,
        order.read_for_cast,
        shards=order.shards,
        layout=order.layout,
        dtype=order.one_dtype(),
        step=_step(order),
        options=_options(order, "mesh"),
    )


def _named_target(
    weights_format: str,
    file_name: str,
    dialect: Dialect,
    writer: type[NamedContainer],
    prefix: Callable[[str], str] = lambda head: "",
    *,
    lacks: str = "",
) -> _Target:
    """A format of one weights file, or several and an index, in which there is no dtype `lacks`."""

    def require_dtypes(order: _Order) -> None:
        for row in order.rows:
            if order.dtype_of(row.name) == lacks:
                raise SchemaError(
                    f"{file_name} has no {lacks}", where=row.name, hint="Choose float32, or float16 if it fits"
                )

    def write(order: _Order) -> Path:
        return write_foreign(
            order.directory,
            order.config,
            order.read_for_cast,
            writer,
            file_name=file_name,
            dialect=dialect,
            dtype_of=order.dtype_of,
            head=order.source.head,
            index_prefix=prefix(order.source.head),
            weights_format=weights_format,
            options=_options(order, weights_format),
        )

    def plan_it(order: _Order) -> tuple[PlannedFile, ...]:
        require_dtypes(order)
        return plan_foreign(
            order.config,
            file_name=file_name,
            dialect=dialect,
            dtype_of=order.dtype_of,
            head=order.source.head,
            max_shard_bytes=order.max_shard_bytes,
        )

    return _Target(write, plan_it)


@dataclasses.dataclass(frozen=True)
class _Target:
    """One format that can be written: how it is, and which weights files that makes."""

    write: Callable[[_Order], Path]
    plan: Callable[[_Order], tuple[PlannedFile, ...]]


_TARGETS = {
    "safetensors": _Target(_write_canonical, _plan_canonical),
    "mesh": _Target(_write_mesh, _plan_mesh),
    "bin": _named_target("bin", BIN_FILE, "pt", BinWriter),
    "flax": _named_target("flax", FLAX_FILE, "flax", MsgpackWriter),
    "tf": _named_target("tf", H5_FILE, "tf", H5Writer, model_prefix, lacks="bfloat16"),
}


def _recognise(
    path: str | os.PathLike[str],
    source_format: str | None,
    config: ConfigChoice,
    weights: str | None,
    follow_links: bool,
) -> tuple[_Format, Path, _Options]:
    """The one format that fits, the folder, and the options with the config read."""
    path = Path(path)
    if source_format is not None and source_format not in source_formats():
        raise InputError(
            "no such format",
            where="source_format",
            expected="one of " + ", ".join(source_formats()),
            found=shown(source_format),
        )
    try:
        exists = path.exists() and bool(path.resolve())  # which fails where the current folder is gone
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be looked at: {error}", file=shown(path)) from None
    if not exists:
        raise MissingFileError("no such file or folder", file=path, hint=likely_folder(path))
    path, weights = split_weights(path, weights)
    if weights is not None and source_format is None:
        source_format = _SUFFIXES.get(weights_suffix(weights))
    options = _Options(_read_config(config), weights, follow_links)
    fitting = [known for known in _FORMATS if source_format in (None, known.name) and known.fits(path)]
    if source_format is not None:
        fitting = [known for known in _FORMATS if known.name == source_format]
    if not any(known.fits(path) for known in fitting):
        refuse_what_is_known(path)
    if weights is None and (sets := {name: known for known in fitting for name in known.sets(path)}):
        named = [known for known in fitting if known.files is not None]
        if named == fitting:
            chosen = choose_set(
                path,
                [*sets],
                lambda name: _signature(sets[name], path, options, name),
                say_others=source_format is None,
            )
            return sets[chosen], path, dataclasses.replace(options, weights=chosen)
    if len(fitting) > 1:
        raise FormatError(
            "several formats fit",
            file=path,
            found=", ".join(f"{known.name} ({known.sign})" for known in fitting),
            hint=f"Choose one: source_format={fitting[0].name!r} or weights=FILE",
        )
    if not fitting:
        refuse_folder(path, "one of: " + "; ".join(f"{f.sign} ({f.name})" for f in _FORMATS))
    return fitting[0], path, options


def _signature(known: _Format, path: Path, options: _Options, name: str) -> tuple[Any, ...]:
    """The names and the shapes of a set of weights: those of its head's schema, which it has been found to fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        source = known.open(path, dataclasses.replace(options, weights=name))
    return source.head, source.config


def _read_config(config: ConfigChoice) -> TrainingConfig | GPTJConfig | None:
    """The config of a file, or of the one in a folder: a training config or a config.json, which its keys tell."""
    if config is None or isinstance(config, TrainingConfig | GPTJConfig):
        return config
    if is_folder(config):
        config = config_file_in(Path(config))
    return config_of(read_json_object(config, error=ConfigError), file=config)


def _require_config(source: Source) -> GPTJConfig:
    if source.config is None:
        raise ConfigError(
            "the number of heads, the rotary width and the positions are not in the checkpoint",
            file=source.path,
            hint="Give the JSON file that the model was trained with: --config TRAIN.json",
        )
    return source.config


def _require_apart(src: Path, dst: Path) -> None:
    """Refuse an output that is, or lies in, what is being read."""
    try:
        one, other = src.resolve(), dst.resolve()
    except (OSError, ValueError) as error:  # such as a current folder that is gone
        raise WriteError(f"cannot be a place to write to: {error}", file=shown(dst)) from None
    if other == one or one in other.parents or other in one.parents:
        raise WriteError("is, holds or lies in what is being converted", file=dst, found=shown(src))


def _provenance(source: Source, config: GPTJConfig, dtype: str | None, notes: tuple[str, ...]) -> dict[str, Any]:
    """What was converted, for the manifest; each tensor's record says where it came from."""
    names = [row.name for row in schema(config, source.head)]
    return {
        "source": source.path.name,
        "format": source.format,
        "dtype": {"stored": sorted({source.dtype_of(name) for name in names}), "written": dtype or "as stored"},
        **({"notes": list(notes)} if notes else {}),
    }
