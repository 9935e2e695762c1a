"""`from_pretrained` before any framework: which directory, config, rows and dtype, and what is wrong with them.

Rows of a model's head that the directory lacks altogether (a base model opened as a classifier) start from
`initial_tensor` and are announced; anything else that is missing is an error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig, is_field
from gptj.config.dtypes import PARAMETER_DTYPES, dtype_name, numpy_dtype
from gptj.config.initial import initial_tensor
from gptj.config.schema import HEADS, Head, TensorSpec, schema
from gptj.errors import ConfigError, InputError, MissingFileError, SchemaError, did_you_mean, shown, warn_of
from gptj.generation.config import GenerationConfig
from gptj.parity.fingerprint import check_fingerprint
from gptj.paths.hub import HUB_ARGUMENTS, is_repository_id, split_hub_arguments
from gptj.pretrained.foreign_arguments import FOREIGN_ARGUMENTS, place_of, take_foreign_arguments
from gptj.reading.folder import Checkpoint, open_checkpoint, verify_checkpoint
from gptj.reading.load_plan import LoadPlan, plan_load
from gptj.reading.weight_files import FOREIGN_WEIGHTS, split_weights, variant_sets


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
        place: the device that device_map means; see `gptj.pretrained.foreign_arguments.place_of`.
    """

    checkpoint: Checkpoint
    config: GPTJConfig
    head: Head
    dtype: str
    plan: LoadPlan
    seed: int
    place: str | None

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

    def read_part(self, spec: TensorSpec, part: tuple[slice, ...]) -> NDArray[Any]:
        """A part of a row in `dtype`, one slice an axis; no other bytes are read."""
        stored = self.plan.tensors.get(spec.name)
        if spec.name in self.plan.zeros:
            return np.zeros(tuple(cut.stop - cut.start for cut in part), numpy_dtype(self.dtype))
        if stored is None:
            whole = initial_tensor(spec, self.config, self.seed).astype(numpy_dtype(self.dtype))
            return np.ascontiguousarray(whole[part])
        return self.checkpoint.read_part(stored.name, part, self.dtype)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The folder's generation_config.json, None where it has none that can be read; see `of_folder`."""
        return GenerationConfig.of_folder(self.checkpoint.directory, self.config.vocab_size)

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
    device_map: Any = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loading:
    """Open `directory` for a model with this head, check everything, and say what there is to do.

    Args:
        directory: a folder with config.json and safetensors weights, a weights file in one, or a repository of the hub;
            see `gptj.paths.hub`.
        config: to use in place of the folder's own.
        dtype: the parameters' dtype, or "auto": as stored.
        weights: which weights file, where there are several.
        subfolder: a folder inside `directory`.
        ignore_mismatched_sizes: rows of another shape start afresh in place of an error.
        verify: first check the folder against its manifest.json: every hash, and the reference's forward pass, which
            alone notices another n_head or rotary_dim, or a transposed square matrix.
        seed: of rows that start afresh.
        device_map: the one device to place the model on; see `gptj.pretrained.foreign_arguments.place_of`.
        overrides: config fields to change, such as num_labels; the hub client's arguments (`gptj.paths.hub.HubPlace`);
            variant, for weights called model.<variant>.safetensors, or their index; and what
            `foreign_arguments` accepts.

    Raises:
        InputError: an argument of transformers that cannot be had here.
        GPTJError: see `gptj.checkpoint`; all missing, unexpected and misshapen tensors stand in one SchemaError. With
            `verify`, see `verify_checkpoint` and `check_fingerprint` too.
    """
    where, fields = split_hub_arguments({**(overrides or {}), "subfolder": subfolder})
    fields = take_foreign_arguments(fields)
    variant = fields.pop("variant", None)
    for name in fields:  # a field's own misspellings are the config's to name
        if (meant := did_you_mean(name, LOADING_ARGUMENTS)) and not is_field(name):
            raise ConfigError("no such field", where=shown(name), hint=meant)
    place = place_of(device_map)
    path, weights = split_weights(where.locate(directory) / subfolder, weights)
    weights = _variant_set(path, variant, weights)
    _require_safetensors(path, directory)
    checkpoint = open_checkpoint(path, weights=weights, config=config)
    settled = checkpoint.config.replace(**fields).opened_from(directory)
    if verify:
        verify_checkpoint(path, weights=weights)
        check_fingerprint(path, config=settled, weights=weights)
    plan = plan_load(checkpoint, settled, head, ignore_mismatched_sizes=ignore_mismatched_sizes)
    loading = Loading(checkpoint, settled, head, _choose_dtype(dtype, checkpoint, plan), plan, seed, place)
    fresh = [*plan.missing, *(row.name for row in plan.mismatched)]
    if fresh:
        said = f"{HEADS[head]} starts {', '.join(fresh)} from random values: the weights there have none that fit"
        warn_of(said, file=path, category=FreshWeightsWarning)
    return loading


def one_dtype(default: str = "auto", /, **spellings: Any) -> Any:
    """The parameters' dtype that the arguments say, where several names mean it; `default` where none says any.

    >>> one_dtype(dtype="auto", torch_dtype="float16", param_dtype=None)
    'float16'

    Raises:
        InputError: two say different ones.
    """
    said = {
        name: value
        for name, value in spellings.items()
        if value is not None and not (isinstance(value, str) and value == "auto")
    }
    names = {name: dtype_name(value) for name, value in said.items()}
    if len(set(names.values())) > 1:
        (first, expected), (second, found) = list(names.items())[:2]
        raise InputError(f"contradicts {first}", where=second, expected=expected, found=found)
    return next(iter(said.values()), default)


LOADING_ARGUMENTS = (
    *("config", "dtype", "param_dtype", "torch_dtype", "device_map", "weights", "variant", "ignore_mismatched_sizes"),
    *("mesh", "strategy", "output_loading_info", "mmap", "verify", "seed", "inference", "quantize", "_do_init"),
    *(*HUB_ARGUMENTS, *FOREIGN_ARGUMENTS),
)
"""Arguments of `from_pretrained` in any wing, besides the config's fields."""


def _require_safetensors(path: Path, name: str | os.PathLike[str]) -> None:
    """Say how a hub repository's other weights are had, where it has no safetensors.

    Raises:
        MissingFileError: with the command that converts them.
    """
    if is_repository_id(name) and path.is_dir() and not any(path.glob("*.safetensors")):
        raise MissingFileError(
            "the repository has no safetensors weights here",
            file=os.fspath(name),
            expected="model.safetensors",
            hint=f"Convert what it has: gptj convert {os.fspath(name)} DIR, then open DIR",
        )


def _variant_set(path: Path, variant: str | None, weights: str | None) -> str | None:
    """The weights that `variant` means, as in transformers: "fp16" is model.fp16.safetensors, or that one's index."""
    if variant is None:
        return weights
    if weights is not None:
        raise InputError("both choose the weights file", where="variant", expected="one of the two", found=weights)
    if not isinstance(variant, str) or not variant.isidentifier():
        raise InputError("no such variant", where="variant", expected='a word, such as "fp16"', found=shown(variant))
    formats = (("model", ".safetensors"), *FOREIGN_WEIGHTS)
    sets = [name for known in formats for name in variant_sets(path, *known, variant)]
    return sets[0] if sets else f"model.{variant}.safetensors"


def _choose_dtype(dtype: Any, checkpoint: Checkpoint, plan: LoadPlan) -> str:
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
