"""What `from_pretrained` and `save_pretrained` mean, once for all three wings: which directory, config, rows, dtype.

A wing asks `prepare` what to load and then only moves arrays, one at a time, so that no more than the weights and
one tensor are ever in memory. Rows of a model's head that the directory lacks altogether (a base model opened as
a classifier) start from `initial_tensor` and are announced; anything else that is missing is an error.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.checkpoint import Checkpoint, LoadPlan, open_checkpoint, plan_load, verify_checkpoint
from gptj.config import GPTJConfig
from gptj.dtypes import PARAMETER_DTYPES, dtype_name, numpy_dtype
from gptj.errors import GPTJError, SchemaError, warn_of
from gptj.fingerprint import check_fingerprint
from gptj.generation.config import GENERATION_CONFIG_FILE, GenerationConfig
from gptj.generation.mixin import Generates
from gptj.hub import locate
from gptj.initial import initial_tensor
from gptj.schema import HEADS, Head, TensorSpec, schema
from gptj.weight_files import split_weights

__all__ = ["FreshWeightsWarning", "Loading", "prepare", "side_files"]


class FreshWeightsWarning(UserWarning):
    """Some parameters were not in the directory and start from random values: train them before use."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """A decided load: what goes where, in which dtype.

    Attributes:
        checkpoint: the opened directory.
        config: the model's config, with the call's overrides.
        head: the model class asked for.
        dtype: the parameters' dtype.
        plan: which stored tensor serves which row.
        seed: of the start values of the rows that the directory lacks.
    """

    checkpoint: Checkpoint
    config: GPTJConfig
    head: Head
    dtype: str
    plan: LoadPlan
    seed: int

    def arrays(self, *, mmap: bool) -> Iterator[tuple[TensorSpec, NDArray[Any]]]:
        """Every row of the schema with its values in `dtype`, one at a time.

        Args:
            mmap: map the file where it holds the asked dtype (no copy; private to the process), else read.
        """
        for spec in schema(self.config, self.head):
            stored = self.plan.tensors.get(spec.name)
            if spec.name in self.plan.zeros:
                yield spec, np.zeros(spec.shape, numpy_dtype(self.dtype))
            elif stored is None:
                yield spec, initial_tensor(spec, self.config, self.seed).astype(numpy_dtype(self.dtype))
            elif mmap and stored.dtype == self.dtype:
                yield spec, self.checkpoint.map(stored.name)
            else:
                yield spec, self.checkpoint.read(stored.name, self.dtype)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The folder's generation_config.json, None where it has none.

        As in transformers, a file that cannot be read does not keep the model from being opened: that is said, and the
        defaults stand in its place.
        """
        path = self.checkpoint.directory / GENERATION_CONFIG_FILE
        if not os.path.lexists(path):
            return None
        try:
            return GenerationConfig.from_file(path, vocab_size=self.config.vocab_size)
        except GPTJError as error:
            warn_of(
                f"cannot be read, so the defaults take its place: {error.problem}",
                file=path,
                where=error.where,
                expected=error.expected,
                found=error.found,
                hint="Mend or remove the file, or give each call a generation_config",
            )
            return None

    @property
    def info(self) -> dict[str, list[Any]]:
        """transformers' loading info: missing_keys, unexpected_keys, mismatched_keys, error_msgs."""
        return {
            "missing_keys": [*self.plan.missing, *self.plan.zeros],
            "unexpected_keys": list(self.plan.unexpected),
            "mismatched_keys": [(row.name, row.found, row.expected) for row in self.plan.mismatched],
            "error_msgs": [],
        }


def prepare(
    head: Head,
    directory: str | os.PathLike[str],
    *,
    config: GPTJConfig | None = None,
    dtype: Any = "auto",
    weights: str | None = None,
    subfolder: str = "",
    ignore_mismatched_sizes: bool = False,
    verify: bool = False,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Loading:
    """Open `directory` for a model with this head, check everything, and say what there is to do.

    Args:
        directory: a folder with config.json and safetensors weights, a weights file in one, or a repository of the hub;
            see `gptj.hub`.
        config: to use in place of the folder's own.
        dtype: the parameters' dtype, or "auto": as stored.
        weights: which weights file, where there are several.
        subfolder: a folder inside `directory`.
        ignore_mismatched_sizes: rows of another shape start afresh in place of an error.
        verify: first check the folder against its manifest.json: every hash, and the reference's forward pass, which
            alone notices another n_head or rotary_dim, or a transposed square matrix.
        seed: of rows that start afresh.
        overrides: config fields to change, such as num_labels.

    Raises:
        GPTJError: see `gptj.checkpoint`; all missing, unexpected and misshapen tensors stand in one SchemaError. With
            `verify`, see `verify_checkpoint` and `check_fingerprint` too.
    """
    path, weights = split_weights(locate(directory) / subfolder, weights)
    checkpoint = open_checkpoint(path, weights=weights, config=config)
    settled = checkpoint.config.replace(**overrides) if overrides else checkpoint.config
    if verify:
        verify_checkpoint(path, weights=weights)
        check_fingerprint(path, config=settled)
    plan = plan_load(checkpoint, settled, head, ignore_mismatched_sizes=ignore_mismatched_sizes)
    loading = Loading(checkpoint, settled, head, _settle_dtype(dtype, checkpoint, plan), plan, seed)
    fresh = [*plan.missing, *(row.name for row in plan.mismatched)]
    if fresh:
        warnings.warn(
            f"{path}: {HEADS[head]} starts {', '.join(fresh)} from random values: the weights there have none that fit",
            FreshWeightsWarning,
            stacklevel=3,
        )
    return loading


def side_files(model: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes besides config and weights: generation_config.json, where the model makes text."""
    if not isinstance(model, Generates):
        return {}
    settled = model.generation_config
    if settled is None:
        settled = GenerationConfig.from_model_config(model.config)
        if (settled.pad_token_id or 0) >= model.config.vocab_size:  # it would be left out when it is read
            settled = settled.replace(pad_token_id=None)
    return {GENERATION_CONFIG_FILE: settled.to_json().encode()}


def _settle_dtype(dtype: Any, checkpoint: Checkpoint, plan: LoadPlan) -> str:
    """The dtype asked for, or the one that all the stored tensors have."""
    if dtype is not None and not (isinstance(dtype, str) and dtype == "auto"):
        return dtype_name(dtype)
    stored = sorted({tensor.dtype for tensor in plan.tensors.values()})
    if len(stored) != 1 or stored[0] not in PARAMETER_DTYPES:
        raise SchemaError(
            "the tensors are not of one dtype",
            file=checkpoint.directory,
            found=", ".join(stored),
            hint=f"Say which to load: dtype={PARAMETER_DTYPES[0]!r}",
        )
    return stored[0]
