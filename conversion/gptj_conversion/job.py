"""A conversion's job: what the caller chose, and what it comes to once the source has been opened; one object each.

The doors make it, the formats read it: so a new choice is a field here, and no chain of arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import ConfigError, InputError, SchemaError, WriteError, shown
from gptj.parity.fingerprint import FingerprintObserver
from gptj.reading.buffers import ReusedBuffer
from gptj.writing.folder import ManifestFacts, WritingOptions
from gptj_conversion.common.plan import interim_dtype, plan_memory
from gptj_conversion.common.source import Source
from gptj_conversion.companions import choose_companions
from gptj_conversion.proof import describe_origin, identify_input, make_examiner

__all__ = ["Choices", "Job", "Reopen", "make_job"]

Reopen = Callable[[Path], Source]
"""Opens a finished stage in the format that was written there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """The arguments of `convert` but those that choose what is read."""

    to: str = "safetensors"
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000
    shards: int | None = None
    layout: Literal["slim", "full"] = "slim"
    tokenizer: str | os.PathLike[str] | None = None
    overwrite: bool = False
    allow_overflow: bool = False
    allow_nonfinite: bool = False
    fingerprint: bool = True
    verify: bool = False
    resume: bool = False
    progress: Callable[[str, int], None] | None = None

    def check(self) -> Choices:
        """The same with the dtype's own name, after each has been found to keep its rule.

        Raises:
            InputError: an argument breaks its rule, or contradicts another.
        """
        if self.shards is None and self.to == "mesh":
            raise InputError("is needed: how many cores will load it", where="shards", hint="GPT-J-6B was trained on 8")
        if self.shards is not None and self.to != "mesh":
            raise InputError(
                "is for TPU checkpoints alone", where="shards", found=f"to={self.to!r}, shards={self.shards}"
            )
        return self if self.dtype is None else dataclasses.replace(self, dtype=numpy_dtype(self.dtype).name)


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion, ready to be planned or done.

    Attributes:
        path: the path of the source as the caller gave it.
        directory: where the output goes.
        source: the opened checkpoint.
        config: the model, its bos and eos chosen.
        companions: the files to write besides, by name: the tokenizer's and generation_config.json.
        notes: sentences for the user and the manifest, without paths.
        choices: how it is to be done.
    """

    path: str | os.PathLike[str]
    directory: Path
    source: Source
    config: GPTJConfig
    companions: Mapping[str, bytes]
    notes: tuple[str, ...]
    choices: Choices

    @property
    def head(self) -> Head:
        """The head on top of the blocks."""
        return self.source.head

    @property
    def shards(self) -> int:
        """The cores that will load a TPU checkpoint; 1 for other formats."""
        return 1 if self.choices.shards is None else self.choices.shards

    @functools.cached_property
    def rows(self) -> tuple[TensorSpec, ...]:
        """The tensors to be written."""
        return schema(self.config, self.head)

    def with_progress(self, progress: Callable[[str, int], None]) -> Job:
        """The same job, which tells `progress` the name and bytes of each tensor when it has been written."""
        return dataclasses.replace(self, choices=dataclasses.replace(self.choices, progress=progress))

    def dtype_of(self, name: str) -> str:
        """The dtype that a tensor is to be written in."""
        return self.choices.dtype or self.source.dtype_of(name)

    def read_for_cast(self, row: TensorSpec, buffer: ReusedBuffer | None = None) -> NDArray[Any]:
        """A tensor as a writer wants it that casts and counts by itself."""
        return self.source.read(row, interim_dtype(self.source.dtype_of(row.name), self.choices.dtype), buffer=buffer)

    def read(self, row: TensorSpec) -> NDArray[Any]:
        """A tensor in the dtype to be written."""
        return self.source.read(row, self.choices.dtype, allow_overflow=self.choices.allow_overflow)

    def require_one_dtype(self) -> str:
        """The dtype to write, for formats that have one for all tensors.

        Raises:
            InputError: the tensors are stored in several, and none was chosen.
        """
        dtypes = {self.dtype_of(row.name) for row in self.rows}
        if len(dtypes) > 1:
            raise InputError(
                "the tensors are of several dtypes",
                where="dtype",
                expected="one for all",
                found=", ".join(sorted(dtypes)),
            )
        return dtypes.pop()

    def require_language_model(self) -> None:
        """Refuse another head, which a TPU checkpoint has no place for."""
        if self.head != "causal_lm":
            problem = "a TPU checkpoint has no place for this head"
            raise SchemaError(problem, file=self.source.path, expected="causal_lm", found=self.head)

    def estimate_memory(self) -> int:
        """The bytes that it needs over what Python takes."""
        return plan_memory(self.rows, self.source, self.choices.dtype, self.choices.to)

    def facts(self, reopen: Reopen, witness: FingerprintObserver | None = None) -> ManifestFacts:
        """The manifest's contents besides the tensors' records, the same for every format."""
        return ManifestFacts(
            provenance=self._provenance(),
            origin=lambda row: describe_origin(self.source, row),
            examine=make_examiner(
                self.config,
                self.head,
                self.read,
                reopen,
                fingerprint=self.choices.fingerprint,
                verify=self.choices.verify,
                witness=witness,
            ),
            reopen=reopen,
            input_identity=identify_input(self.source.path),
            resume=self.choices.resume,
        )

    def options(self, reopen: Reopen) -> WritingOptions:
        """The choices that every format's writer is told of."""
        choices = self.choices
        return WritingOptions(
            max_shard_bytes=choices.max_shard_bytes,
            extra_files=self.companions,
            overwrite=choices.overwrite,
            progress=choices.progress,
            allow_overflow=choices.allow_overflow,
            allow_nonfinite=choices.allow_nonfinite,
            facts=self.facts(reopen),
        )

    def _provenance(self) -> dict[str, Any]:
        """The source in the manifest's words; each tensor's record says where it came from."""
        return {
            "source": self.source.path.name,
            "format": self.source.format,
            "dtype": {
                "stored": sorted({self.source.dtype_of(row.name) for row in self.rows}),
                "written": self.choices.dtype or "as stored",
            },
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def make_job(
    path: str | os.PathLike[str], directory: Path, source: Source, choices: Choices, *, follow_links: bool = False
) -> Job:
    """The job that converts `source`, opened from `path`, into `directory`; everything checked that can be at once.

    Raises:
        ConfigError: the checkpoint does not say what its model computes; see `choose_companions` too.
        WriteError: the output is, holds or lies in what is being read.
    """
    companions = choose_companions(
        source, _require_config(source), directory, tokenizer=choices.tokenizer, follow_links=follow_links
    )
    _require_apart(Path(path), directory)
    notes = (*source.context.notes, *companions.notes)
    return Job(path, directory, source, companions.config, companions.files, notes, choices)


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
