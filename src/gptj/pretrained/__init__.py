"""What `from_pretrained` and `save_pretrained` mean, once for all three wings: which directory, config, rows, dtype.

A wing asks `prepare` what to load and then only moves arrays, one at a time, so that no more than the weights and
one tensor are ever in memory. Rows of a model's head that the directory lacks altogether (a base model opened as
a classifier) start from `initial_tensor` and are announced; anything else that is missing is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gptj.checkpoint import Checkpoint, LoadPlan, open_checkpoint, plan_load, verify_checkpoint
from gptj.config import BUILT_IN, GPTJConfig, is_field
from gptj.dtypes import PARAMETER_DTYPES, dtype_name, numpy_dtype
from gptj.errors import ConfigError, GPTJError, InputError, MissingFileError, SchemaError, did_you_mean, shown, warn_of
from gptj.generation.config import GENERATION_CONFIG_FILE, GenerationConfig
from gptj.generation.mixin import Generates
from gptj.hub import HUB_ARGUMENTS, is_repository_id, split_hub_arguments
from gptj.initial import initial_tensor
from gptj.parity.fingerprint import check_fingerprint
from gptj.pretrained.foreign_arguments import FOREIGN_ARGUMENTS, place_of, take_foreign_arguments
from gptj.reading.weight_files import FOREIGN_WEIGHTS, split_weights, variant_sets
from gptj.schema import HEADS, Head, TensorSpec, schema

__all__ = ["Configured", "FreshWeightsWarning", "Loading", "one_dtype", "prepare", "shard_bytes", "side_files"]


class FreshWeightsWarning(UserWarning):
    """Some parameters were not in the directory and start from random values: train them before use."""


class Configured:
    """A model that has a config, and what other libraries ask of any model.

    Attributes:
        head: which rows of the schema the class has.
        main_input_name: the first argument of a call.
        base_model_prefix: where a head keeps the GPTJModel inside it.
    """

    head: ClassVar[Head]
    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = "transformer"
    config_class: ClassVar[type[GPTJConfig]] = GPTJConfig
    _own_config: GPTJConfig | None = None

    @property
    def config(self) -> GPTJConfig:
        """The model's config: one object for a head and the GPTJModel inside it.

        Its fields can be assigned, and take effect with the next call, but for those that the model is built by
        (`gptj.config.BUILT_IN`). Another config can be assigned that has those the same.

        Raises:
            ConfigError: on assignment, what is given is no config, or describes another model.
        """
        inner = None if self.head == "base" else getattr(self, self.base_model_prefix, None)
        config = self._own_config if inner is None else inner.config
        if config is None:  # Keras looks whether there is one before it is set
            raise AttributeError("the model has no config yet")
        found: GPTJConfig = config
        return found

    @config.setter
    def config(self, config: GPTJConfig) -> None:
        if not isinstance(config, GPTJConfig):
            raise ConfigError(
                "not a GPTJConfig", where="model.config", expected="a GPTJConfig", found=type(config).__name__
            )
        if self._own_config is not None:
            check_same_build(self.config, config, self.head)
        self._set_config(config)

    def _set_config(self, config: GPTJConfig) -> None:
        """Make it the config, of the GPTJModel inside too, without looking at it."""
        self._own_config = config
        inner = None if self.head == "base" else getattr(self, self.base_model_prefix, None)
        if inner is not None:
            inner._own_config = config

    @property
    def num_labels(self) -> int:
        """The config's: how many labels a classifier scores."""
        return int(self.config.num_labels or 0)

    def can_generate(self) -> bool:
        """Whether the class makes text."""
        return isinstance(self, Generates)


def check_same_build(old: GPTJConfig, new: GPTJConfig, head: Head) -> None:
    """Refuse a config in which a field differs that the model was built by.

    Raises:
        ConfigError: naming the first such field, with both values.
    """
    for field in BUILT_IN:
        before, after = getattr(old, field), getattr(new, field)
        if before != after and (field != "num_labels" or head == "sequence_classification"):
            raise ConfigError(
                "of another model",
                where=f"model.config: {field}",
                expected=repr(before),
                found=shown(after),
                hint="Make a model of that config, or open the folder with from_pretrained(folder, "
                f"{field}={shown(after)})",
            )


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
    device_map: Any = None,
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
        device_map: the one device to place the model on; see `gptj.pretrained.foreign_arguments.place_of`.
        overrides: config fields to change, such as num_labels; the hub client's arguments (`gptj.hub.HubPlace`);
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
        if (meant := did_you_mean(name, _LOADING_ARGUMENTS)) and not is_field(name):
            raise ConfigError("no such field", where=shown(name), hint=meant)
    place = place_of(device_map)
    path, weights = split_weights(where.locate(directory) / subfolder, weights)
    weights = _variant_set(path, variant, weights)
    _require_safetensors(path, directory)
    checkpoint = open_checkpoint(path, weights=weights, config=config)
    settled = checkpoint.config.replace(**fields) if fields else checkpoint.config
    if verify:
        verify_checkpoint(path, weights=weights)
        check_fingerprint(path, config=settled, weights=weights)
    plan = plan_load(checkpoint, settled, head, ignore_mismatched_sizes=ignore_mismatched_sizes)
    loading = Loading(checkpoint, settled, head, _settle_dtype(dtype, checkpoint, plan), plan, seed, place)
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
    if model.derives_generation_config and (settled.pad_token_id or 0) >= model.config.vocab_size:
        settled = settled.replace(pad_token_id=None)  # it would be left out when it is read
    return {GENERATION_CONFIG_FILE: settled.to_json().encode()}


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


def shard_bytes(size: int | str) -> int:
    """The bytes of "5GB", "200MB" or "1GiB", or of a number.

    >>> shard_bytes("5GB"), shard_bytes("1KiB"), shard_bytes(7)
    (5000000000, 1024, 7)

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?)B|B)?", str(size), re.IGNORECASE)
    if isinstance(size, bool) or found is None or float(found[1]) <= 0:
        raise InputError("no size", where="max_shard_size", expected='bytes, or such as "5GB"', found=shown(size))
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def saving_options(max_shard_bytes: int | str, others: Mapping[str, Any]) -> int:
    """The most bytes of a weights file that `save_pretrained` was asked for.

    Args:
        max_shard_bytes: in bytes or as "5GB".
        others: transformers' max_shard_size, the same; and what is so anyway: safe_serialization=True,
            push_to_hub=False, variant=None, and save_function, since weights are written by one door.

    Raises:
        InputError: another option, or a value that cannot be had.
    """
    size = others.get("max_shard_size")
    for name, value in others.items():
        if name not in _SAVING_OPTIONS:
            raise InputError("no such argument", where=shown(name), hint=_meant(name))
        so_anyway, hint = _SAVING_OPTIONS[name]
        if so_anyway is not None and value is not None and value not in so_anyway:
            expected = repr(next(iter(so_anyway), None))
            raise InputError("not supported", where=name, expected=expected, found=shown(value), hint=hint)
    return shard_bytes(max_shard_bytes if size is None else size)


_LOADING_ARGUMENTS = (
    *("config", "dtype", "param_dtype", "torch_dtype", "device_map", "weights", "variant", "ignore_mismatched_sizes"),
    *("output_loading_info", "mmap", "verify", "seed", "inference", "quantize", "_do_init"),
    *(*HUB_ARGUMENTS, *FOREIGN_ARGUMENTS),
)
"""What `from_pretrained` takes in any wing besides the config's fields."""

_SAVING_OPTIONS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "max_shard_size": (None, ""),
    "safe_serialization": ((True,), "Write safetensors, then: gptj convert DIR OUT --to bin"),
    "push_to_hub": ((False,), "Save, then: hf upload OWNER/NAME DIR"),
    "token": ((), "Save, then: hf upload OWNER/NAME DIR"),
    "variant": ((), "Save, then rename the file to model.VARIANT.safetensors"),
    "save_peft_format": ((True, False), ""),
    "save_original_format": ((True, False), ""),
    "save_config": ((True,), "The folder always has its config.json"),
    "save_function": (None, ""),
}


def _meant(name: str) -> str | None:
    known = (*_SAVING_OPTIONS, "max_shard_bytes", "overwrite", "is_main_process", "state_dict")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else None


def check_rows(config: GPTJConfig, head: Head, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that lack a row of the schema, or have one of another shape.

    Raises:
        SchemaError: naming the first.
    """
    for row in schema(config, head):
        if shapes.get(row.name) != row.shape:
            raise SchemaError(
                "not this model's", where=f"state_dict: {row.name}", expected=row.shape, found=shapes.get(row.name)
            )


def check_recomputation(options: Mapping[str, Any] | None) -> None:
    """Refuse options of gradient checkpointing other than the one that is so anyway.

    Raises:
        InputError: another option.
    """
    for name, value in (options or {}).items():
        if (name, value) != ("use_reentrant", False) and value is not None:
            raise InputError(
                "not supported: blocks are recomputed without reentering autograd",
                where=f"gradient_checkpointing_kwargs: {shown(name)}",
                expected="use_reentrant=False, or nothing",
                found=shown(value),
            )


def check_output_embeddings(model: Configured, shape: tuple[int, ...]) -> None:
    """Refuse an lm_head's weight for a class without one, or of another shape than (v, m).

    Raises:
        InputError: saying which.
    """
    if model.head != "causal_lm":
        raise InputError("has no lm_head", where=type(model).__name__, hint="Use GPTJForCausalLM")
    expected = (model.config.vocab_size, model.config.n_embd)
    if shape != expected:
        hint = "Use resize_token_embeddings to change the vocabulary's size"
        raise InputError("of another shape", where="embeddings", expected=expected, found=shape, hint=hint)


def new_vocabulary(
    config: GPTJConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> int | None:
    """The vocab_size that `resize_token_embeddings` was asked for, rounded up; None where it stays.

    Raises:
        InputError: a multiple below 1, or rows that start from the others' mean.
    """
    if mean_resizing:
        hint = "Leave it out: new rows have the start values of the seed"
        raise InputError("not supported", where="mean_resizing", expected=False, found=mean_resizing, hint=hint)
    if pad_to_multiple_of is None:
        return new_num_tokens
    multiple = pad_to_multiple_of
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise InputError("not a multiple", where="pad_to_multiple_of", expected="1 or above", found=shown(multiple))
    size = config.vocab_size if new_num_tokens is None else new_num_tokens
    return -(-size // multiple) * multiple


def _require_safetensors(path: Path, name: str | os.PathLike[str]) -> None:
    """Where a repository of the hub has no safetensors, say how its other weights are had.

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
