"""Weights in and out of PyTorch: arrays to tensors and back, and what every model class can load, save and count.

Parameter names are the schema's, so loading is one assignment a row. A model is built on the meta device, which
holds no memory; then each parameter becomes a tensor over the mapped file itself, without a copy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptj import inputs, pretrained
from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.dtypes import dtype_name, numpy_dtype
from gptj.generation import Generates
from gptj.generation.typed import Off, typed_load
from gptj.initial import initial_tensor, resized_tensor
from gptj.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj.prepared import check_device, check_inference
from gptj.schema import Head, TensorSpec, schema


def to_numpy(array: Any) -> NDArray[Any]:
    """The tensor's values as a NumPy array; bfloat16 as ml_dtypes'. Shares memory where the tensor is on the CPU."""
    tensor = array.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: NDArray[Any]) -> Tensor:
    """A tensor over the array's memory, of its dtype; ml_dtypes' bfloat16 becomes torch's."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


for _output in (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    QuestionAnsweringModelOutput,
    KVCache,
):
    # export and torch.func take outputs apart; torch wants to be told how.
    torch.export.register_dataclass(_output, serialized_type_name=f"gptj.{_output.__name__}")


@contextlib.contextmanager
def empty_parameters() -> Any:
    """While this is open, modules get parameters that have shapes but no values and no memory."""
    with torch.device("meta"):
        yield


class PretrainedModel(pretrained.Configured, nn.Module):
    """What all four model classes have in common: config, start values, loading, saving, counting.

    Attributes:
        head: which rows of the schema the class has.
    """

    head: ClassVar[Head]
    _keys_to_ignore_on_save: ClassVar[None] = None

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self._inside = False  # whether it is a part of another model, whose head has rows of the vocabulary too
        self.config = config

    # Differs: transformers' Trainer and PEFT ask isinstance(model, PreTrainedModel) before they call what that class
    # and ours both have (save_pretrained, get_output_embeddings): without a yes, Trainer.save_model leaves weights
    # without a config, and PEFT's "all-linear" adapts lm_head. Where transformers is loaded, and there alone, the
    # answer is yes: Python asks an object's __class__ too. type(model) stays the class itself, which inherits nothing
    # of theirs, and what is made by way of __class__, or pickled, is of that class (`_also`, `__reduce_ex__`).
    __class__ = property(lambda self: _class_told(self), lambda self, new: _set_class(self, new))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How it is copied and pickled: as what `type` says, since pickle would compare that with `__class__`."""
        return _unfilled, (type(self),), self.__getstate__()

    @property
    def base_model(self) -> PretrainedModel:
        """The GPTJModel inside, or the model itself where it is one."""
        return self if self.head == "base" else self.transformer

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    @property
    def param_dtype(self) -> torch.dtype:
        """What the parameters are kept in: the same as `dtype`, which is also what is computed in."""
        return self.dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model has; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        """An empty cache of fixed capacity; see `GPTJModel.init_cache`."""
        return self.base_model.init_cache(batch_size, max_length)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether training keeps only what enters each block."""
        return bool(self.base_model.gradient_checkpointing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """In training, keep only what enters each block and compute the rest again for the gradient.

        Args:
            gradient_checkpointing_kwargs: {"use_reentrant": False} says what is so anyway.
        """
        pretrained.check_recomputation(gradient_checkpointing_kwargs)
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """In training, keep everything that the gradient needs."""
        self.base_model.gradient_checkpointing = False

    def get_input_embeddings(self) -> Any:
        """The token embedding wte, (v, m)."""
        return self.base_model.wte

    def set_input_embeddings(self, embeddings: Any) -> None:
        """Use another token embedding of the same size; lm_head follows where the config ties them."""
        inputs.check_embeddings(self.config, tuple(embeddings.weight.shape))
        self.base_model.wte = embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> Any:
        """lm_head, or None where the class has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, embeddings: Any) -> None:
        """Use another lm_head of the same size; it stays tied to wte where the config ties them."""
        pretrained.check_output_embeddings(self, tuple(embeddings.weight.shape))
        self.lm_head = embeddings
        self.tie_weights()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the rotary table and other buffers; a tied matrix counts once."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in held)

    # Differs: what trains adapters in PyTorch (PEFT, transformers' Trainer) asks for these two.
    def enable_input_require_grads(self) -> None:
        """Let the gradient reach what enters the blocks, though wte itself is not trained."""
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._require_grads_hook.remove()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = False,
        *,
        seed: int = 0,
    ) -> Any:
        """Change the vocabulary's size: wte, lm_head's weight and bias, and the config. Returns wte.

        Rows that stay keep their values; new ones get the start values of a model of the new size.

        Args:
            new_num_tokens: the new vocab_size; None keeps it.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: only False: new rows have the start values, not the others' mean.
            seed: of the new rows.
        """
        new_num_tokens = pretrained.new_vocabulary(self.config, new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None and new_num_tokens != self.config.vocab_size:
            if self._inside:
                raise inputs.part_of_a_model("resize_token_embeddings")
            kept = dict(self.named_parameters(remove_duplicate=False))
            config = self.config.replace(vocab_size=new_num_tokens)
            rows = [row for row in schema(config, self.head) if "vocab" in row.axes]
            self._assign((row, resized_tensor(row, config, to_numpy(kept[row.name]), seed)) for row in rows)
            self._set_config(config)
            self.base_model.wte.num_embeddings = new_num_tokens
            if (lm_head := self.get_output_embeddings()) is not None:
                lm_head.out_features = new_num_tokens
        return self.get_input_embeddings()

    # ---- values

    def initialise(self, *, dtype: Any = "float32", seed: int = 0) -> None:
        """Give every parameter its start value, the same in all three backends for the same seed."""
        target = numpy_dtype(dtype_name(dtype))
        rows = schema(self.config, self.head)
        self._assign((row, initial_tensor(row, self.config, seed).astype(target)) for row in rows)

    def _assign(self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]]) -> None:
        """Make each array, without a copy on the CPU, the parameter that its row names."""
        for spec, array in arrays:
            owner, _, leaf = spec.name.rpartition(".")
            module = self.get_submodule(owner)
            old = getattr(module, leaf)
            tensor = from_numpy(array).to(torch.get_default_device() if old.is_meta else old.device)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
        self.tie_weights()
        self.base_model._place_rotary()

    def tie_weights(self) -> None:
        """Make lm_head.weight the embedding's, where the config says so. Only GPTJForCausalLM has anything to tie."""

    @typed_load
    def from_pretrained(
        cls: Any,
        /,
        directory: str | os.PathLike[str],
        *,
        config: GPTJConfig | None = None,
        dtype: Any = "auto",
        param_dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        weights: str | None = None,
        subfolder: str = "",
        ignore_mismatched_sizes: bool = False,
        output_loading_info: Off = False,
        mmap: bool = True,
        verify: bool = False,
        seed: int = 0,
        inference: bool = False,
        quantize: str | None = None,
        attn_implementation: str = "eager",
        **overrides: Any,
    ) -> Any:
        """The model in `directory`, in evaluation mode.

        Args:
            directory: a folder with config.json and safetensors weights, or a repository of the hub.
            config: to use in place of the folder's own.
            dtype: of the parameters; "auto" means as stored.
            param_dtype, torch_dtype: the same.
            device_map: "cpu", "cuda", "auto" or {"": device}: the one device to place the model on.
            weights: which weights file, where there are several.
            subfolder: a folder inside `directory`.
            ignore_mismatched_sizes: rows of another shape start afresh in place of an error.
            output_loading_info: return (model, info) with the missing, unexpected and mismatched keys.
            mmap: map the weights file in place of reading it; the file must then not be changed while it is in use.
            verify: first check the folder against its manifest.json: every hash, and the reference's forward pass.
            seed: of rows that start afresh.
            inference: prepare the model for decoding alone; see `GPTJForCausalLM.prepare_for_inference`.
            quantize: with `inference`, the precision of the weights.
            attn_implementation: "eager" or "sdpa".
            overrides: config fields to change, such as num_labels; revision, cache_dir, token, local_files_only,
                force_download and variant; see `gptj.pretrained.prepare`.

        Raises:
            GPTJError: see `gptj.pretrained.prepare`.
        """
        check_inference(cls.head, inference, quantize)
        # Differs: attn_implementation is PyTorch's alone.
        loading = pretrained.prepare(
            cls.head,
            directory,
            config=config,
            dtype=pretrained.one_dtype(dtype=dtype, torch_dtype=torch_dtype, param_dtype=param_dtype),
            device_map=device_map,
            weights=weights,
            subfolder=subfolder,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            verify=verify,
            seed=seed,
            overrides=overrides,
        )
        model = cls(loading.config, attn_implementation=attn_implementation, _do_init=False)
        device = _device(loading.place)
        if inference and device in (None, torch.device("cpu")):
            model._assign_prepared(loading.arrays(mmap=mmap), quantize)
        else:
            model._assign(loading.arrays(mmap=mmap))
            if device is not None:
                model.to(device)
            if inference:
                model.prepare_for_inference(quantize=quantize)
        if isinstance(model, Generates):
            model.generation_config = loading.generation_config
        model.eval()
        return (model, loading.info) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        *,
        max_shard_bytes: int | str = 5_000_000_000,
        overwrite: bool = False,
        **others: Any,
    ) -> Path:
        """Write config.json and the weights so that all three backends and transformers open them. Returns the folder.

        Args:
            directory: the folder, which is made; files and folders there that are no model's stay as they are.
            is_main_process: False writes nothing: of several processes, one writes.
            state_dict: values to write in place of the model's own, as Accelerate gathers them.
            max_shard_bytes: of a weights file, in bytes or as "5GB"; max_shard_size is the same.
            overwrite: replace the model that the folder holds.
            others: what transformers' method has besides; see `gptj.pretrained.saving_options`.

        Raises:
            WriteError: the folder holds a model already and `overwrite` is False, or it cannot be written.
            InputError: an option that cannot be had.
            SchemaError: `state_dict` lacks a row, or has one of another shape.
        """
        options = pretrained.saving_options(max_shard_bytes, others)
        if not is_main_process:
            return Path(directory)
        # Differs: state_dict is PyTorch's alone.
        parameters = dict(self.named_parameters(remove_duplicate=False)) if state_dict is None else state_dict
        if state_dict is not None:
            pretrained.check_rows(self.config, self.head, {k: tuple(v.shape) for k, v in state_dict.items()})
        return write_checkpoint(
            directory,
            self.config,
            lambda spec: to_numpy(parameters[spec.name]),
            head=self.head,
            dtype=dtype_name(next(iter(parameters.values())).dtype),
            max_shard_bytes=options,
            overwrite=overwrite,
            beside_others=True,
            extra_files=pretrained.side_files(self),
        )


def _class_told(model: Any) -> type:
    """What a model says its class is: where transformers is loaded, one that is a PreTrainedModel too."""
    own, transformers = type(model), sys.modules.get("transformers")
    base = None if transformers is None else vars(transformers).get("PreTrainedModel")
    return own if base is None or issubclass(own, base) else _also(own, base)  # type: ignore[arg-type]


def _set_class(model: Any, new: type) -> None:
    """Change a model's class in place, as torch's fully_shard does."""
    vars(object)["__class__"].__set__(model, new)


@functools.lru_cache(maxsize=64)
def _also(own: type, base: type) -> type:
    """A class of the same name that inherits from both, to answer `isinstance` with; calling it makes an `own`."""
    members = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "__new__": lambda cls, *arguments, **options: own(*arguments, **options),
    }
    return type(own.__name__, (own, base), members)


def _unfilled(own: Any) -> Any:
    return own.__new__(own)


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


@contextlib.contextmanager
def on_device(name: str) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """While this is open, models run on a device; one that is loaded under the context that it gives is there.

    Args:
        name: "cpu", "cuda", "mps", or "auto": the best that the framework sees.

    Raises:
        InputError: the framework sees no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    check_device(name, there, f"PyTorch {torch.__version__}")
    # Differs: computations follow the parameters; under torch.device each would pass through Python once more.
    yield torch.device(next(kind for kind in there if there[kind]) if name == "auto" else name)


def _device(place: str | None) -> torch.device | None:
    """The device of a `Loading.place`; None is where the model is made.

    Raises:
        InputError: there is no such device.
    """
    if place is None:
        return None
    if place.startswith("cuda:"):
        there = {place: int(place.partition(":")[2]) < torch.cuda.device_count(), "cpu": True}
        check_device(place, there, f"PyTorch {torch.__version__}")
        return torch.device(place)
    with on_device(place.partition(":")[0]) as device:
        return torch.device(device)
