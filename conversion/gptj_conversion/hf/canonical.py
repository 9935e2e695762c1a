"""safetensors directories as sources: Hugging Face's names, or those of transformers' Flax and TensorFlow models.

transformers stores whatever names and layout the framework has and says which in the header (`format: pt | flax |
tf`); all three are called model.safetensors.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import Head, TensorSpec
from gptj.errors import GPTJError, SchemaError
from gptj.reading.buffers import ReusedBuffer
from gptj.reading.files import FileIdentity
from gptj.reading.folder import Checkpoint, open_checkpoint
from gptj.reading.load_plan import LoadPlan, describe_left, plan_load
from gptj.reading.safetensors_file import StoredTensor, cast
from gptj.reading.weight_names import infer_dialect
from gptj_conversion.common.foreign import LIKE, ZEROS_ORIGIN, ForeignCheckpoint, match_arrays
from gptj_conversion.common.source import Context, Facts, Source, describe_head
from gptj_conversion.common.stored_array import DTYPES, StoredArray

__all__ = ["CanonicalDirectory", "describe_safetensors", "open_safetensors"]


@dataclasses.dataclass(frozen=True)
class CanonicalDirectory:
    """A canonical directory whose tensors have all been found, with the right shapes."""

    checkpoint: Checkpoint
    plan: LoadPlan

    @property
    def path(self) -> Path:
        """The directory."""
        return self.checkpoint.directory

    @property
    def format(self) -> str:
        """The format's name in plans and manifests."""
        return "safetensors"

    @property
    def config(self) -> GPTJConfig:
        """The directory's config."""
        return self.checkpoint.config

    @property
    def head(self) -> Head:
        """The head on top of the blocks, as the names say."""
        return self.checkpoint.head

    @property
    def context(self) -> Context:
        """The directory, in which all lies that belongs to it."""
        return Context((self.path,))

    def dtype_of(self, name: str) -> str:
        """The dtype that the tensor is stored in."""
        return self.plan.tensors[LIKE if name in self.plan.zeros else name].dtype

    def read(
        self,
        row: TensorSpec,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        buffer: ReusedBuffer | None = None,
    ) -> NDArray[Any]:
        """The tensor in its own dtype or in `dtype`."""
        if row.name in self.plan.zeros:
            return np.zeros(row.shape, numpy_dtype(self.dtype_of(row.name) if dtype is None else dtype))
        name = self.plan.tensors[row.name].name
        if dtype is None or not allow_overflow:
            return self.checkpoint.read(name, dtype)
        return cast(self.checkpoint.read(name), numpy_dtype(dtype), where=name, allow_overflow=True)

    def origin(self, name: str) -> str:
        """The file, and the name in it."""
        if name in self.plan.zeros:
            return ZEROS_ORIGIN
        stored = self.plan.tensors[name]
        return f"{stored.name} in {stored.file.name}"

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The file that holds it."""
        return () if name in self.plan.zeros else (self.plan.tensors[name].file.name,)

    def facts(self) -> Facts:
        """Its sizes and kinds."""
        return _derive_facts(self.checkpoint, describe_left(self.plan.names, self.plan.dropped, self.plan.zeros))


def open_safetensors(
    directory: str | os.PathLike[str],
    *,
    config: GPTJConfig | str | os.PathLike[str] | None,
    weights: str | None,
    follow_links: bool,
) -> CanonicalDirectory | ForeignCheckpoint:
    """The directory in whichever of the three dialects it is, every tensor of its head found.

    Raises:
        GPTJError: see `gptj.checkpoint`.
    """
    return _match(open_checkpoint(directory, weights=weights, config=config, follow_links=follow_links))


def _match(checkpoint: Checkpoint) -> CanonicalDirectory | ForeignCheckpoint:
    """The checkpoint with every tensor of its head found."""
    dialect = infer_dialect(checkpoint.metadata, checkpoint.tensors)
    if dialect == "pt":
        return CanonicalDirectory(checkpoint, plan_load(checkpoint, checkpoint.config, checkpoint.head))
    arrays = [_stored_array(tensor, file.identity) for file in checkpoint.files for tensor in file.tensors.values()]
    if dialect == "flax":  # its tree is joined with dots there
        arrays = [dataclasses.replace(array, name=array.name.replace(".", "/")) for array in arrays]
    name = f"safetensors ({dialect})"
    return match_arrays(checkpoint.directory, name, dialect, checkpoint.config, arrays)


def _stored_array(tensor: StoredTensor, identity: FileIdentity) -> StoredArray:
    if tensor.dtype not in DTYPES:
        raise SchemaError("not a dtype of weights", file=tensor.file, where=tensor.name, found=tensor.dtype)
    extents = ((tensor.offset, tensor.nbytes),)
    return StoredArray(tensor.name, DTYPES[tensor.dtype], tensor.shape, tensor.file, identity, extents)


def describe_safetensors(
    directory: str | os.PathLike[str],
    opened: Source | None,
    *,
    config: GPTJConfig | None,
    weights: str | None,
    follow_links: bool,
) -> Facts:
    """The directory's facts; a schema that its tensors do not fit is among the problems, not an error.

    Args:
        directory, config, weights, follow_links: see `open_safetensors`.
        opened: the directory, where it is open already.
    """
    if opened is None:
        checkpoint = open_checkpoint(directory, weights=weights, config=config, follow_links=follow_links)
        try:
            opened = _match(checkpoint)
        except GPTJError as error:
            dialect = infer_dialect(checkpoint.metadata, checkpoint.tensors)
            name = "safetensors" if dialect == "pt" else f"safetensors ({dialect})"
            return _note_assumed_rotary(_derive_facts(checkpoint, [str(error)], name), checkpoint.config, config)
    assert opened.config is not None
    return _note_assumed_rotary(opened.facts(), opened.config, config)


def _note_assumed_rotary(facts: Facts, found: GPTJConfig, given: GPTJConfig | None) -> Facts:
    """The facts, and among the problems that config.json says nothing of the rotary width."""
    if given is not None or "rotary_dim" in GPTJConfig.read_members(Path(facts.path) / CONFIG_FILE)[1]:
        return facts
    problem = f"{CONFIG_FILE} has no rotary_dim: the default {found.rotary_dim} is taken"
    return dataclasses.replace(facts, problems=(*facts.problems, problem))


def _derive_facts(checkpoint: Checkpoint, problems: list[str], name: str = "safetensors") -> Facts:
    config = checkpoint.config
    stored = checkpoint.tensors.values()
    return Facts(
        path=str(checkpoint.directory),
        format=name,
        step=None,
        shards=len(checkpoint.weight_files),
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        rotary_width=config.rotary_width,
        positions=config.n_positions,
        vocab=config.vocab_size,
        dtype=", ".join(sorted({tensor.dtype for tensor in stored})),
        tensors=len(stored),
        parameters=sum(tensor.size for tensor in stored),
        bytes=sum(path.stat().st_size for path in checkpoint.weight_files),
        problems=(*problems, *describe_head(checkpoint.head)),
    )
