"""Weights in and out of TensorFlow: arrays to tensors and back, and what every model class can load, save and count.

Parameter names are the schema's, so loading is one assignment a row. A model is made without variables; then each
row of the schema becomes a variable over its array's memory, so nothing is ever held twice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import keras
import ml_dtypes
import numpy as np
import optree
import tensorflow as tf
from numpy.typing import NDArray

from gptj import inputs, pretrained
from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.dtypes import dtype_name, numpy_dtype
from gptj.errors import InputError
from gptj.generation import Generates
from gptj.generation.typed import Off, typed_load
from gptj.initial import initial_tensor, resized_tensor
from gptj.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj.prepared import check_device, check_inference
from gptj.schema import Head, TensorSpec, schema
from gptj.tf.arguments import as_ids, as_tensor, assert_arguments, check_traced_ids, host

ALIGNMENT_BYTES = 64
"""Where TensorFlow's kernels want a tensor to begin; what begins elsewhere is copied."""


def to_numpy(array: Any) -> NDArray[Any]:
    """The tensor's or variable's values as a NumPy array, to be read only; bfloat16 as ml_dtypes'."""
    return np.asarray(array.numpy())


def from_numpy(array: NDArray[Any]) -> tf.Tensor:
    """A tensor over the array's memory, or over a copy where that is not aligned, of its dtype, bfloat16 included.

    The array must not be written to from then on.
    """
    # Differs: TensorFlow's own conversion makes two copies of an array for a moment (measured: +405 MB for 210 MB).
    if array.ndim == 0 or array.size == 0:
        return tf.convert_to_tensor(array)
    bits = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    fits = bits.flags.c_contiguous and bits.flags.writeable and bits.ctypes.data % ALIGNMENT_BYTES == 0
    tensor = tf.experimental.dlpack.from_dlpack((bits if fits else _aligned(bits)).__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if bits is not array else tensor


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy that begins at a multiple of `ALIGNMENT_BYTES`."""
    room = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGNMENT_BYTES
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def settle_policy(dtype: Any, *, param_dtype: Any = None) -> keras.DTypePolicy:
    """The Keras policy of a dtype, or of a policy's name: what variables are kept in, and what is computed in.

    Args:
        dtype: of both, or a policy of two dtypes; None where `param_dtype` says it.
        param_dtype: what variables are kept in; it must be the policy's.
    """
    # Differs: Keras has mixed policies, whose variables are float32 while the blocks compute in 16 bits.
    if isinstance(dtype, str) and dtype.startswith("mixed_"):
        dtype = keras.DTypePolicy(dtype)
    kept = dtype.variable_dtype if isinstance(dtype, keras.DTypePolicy) else dtype
    kept = pretrained.one_dtype(dtype=kept, param_dtype=param_dtype)
    if isinstance(dtype, keras.DTypePolicy):
        return dtype
    return keras.DTypePolicy("float32" if isinstance(kept, str) and kept == "auto" else dtype_name(kept))


def _register(output: type[ModelOutput]) -> None:
    """Tell Keras' trees how to take this output apart, so that predict, metrics and functional models can."""

    def flatten(value: ModelOutput) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
        return value.to_tuple(), value.keys(), value.keys()

    def unflatten(names: tuple[str, ...], values: Iterable[Any]) -> ModelOutput:
        return output(**dict(zip(names, values, strict=True)))

    register: Any = optree.register_pytree_node
    with contextlib.suppress(ValueError):  # it is registered already, where this module is imported anew
        register(output, flatten, unflatten, namespace="keras")


for _output in (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    QuestionAnsweringModelOutput,
):
    _register(_output)


def checked_first(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keras' fit, evaluate or predict, but with the data checked on the host before anything is compiled.

    Differs: Keras compiles its steps with XLA, which drops the assertions that a graph has in place of errors.
    """

    takes_labels = "y" in inspect.signature(run).parameters

    @functools.wraps(run)
    def checked(self: PretrainedModel, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        labels = (args[0] if args else kwargs.get("y")) if takes_labels else None
        return run(self, self._checked_data(x, labels), *args, **kwargs)

    return checked


class PretrainedModel(pretrained.Configured, keras.Model):
    """What all four model classes have in common: config, start values, loading, saving, counting, Keras' training.

    Attributes:
        head: which rows of the schema the class has.
    """

    head: ClassVar[Head]

    def __init__(self, config: GPTJConfig, *, dtype: Any, seed: int, name: str | None, param_dtype: Any = None) -> None:
        super().__init__(name=name, dtype=settle_policy(dtype, param_dtype=param_dtype), autocast=False)
        self._inside = False  # whether it is a part of another model, whose head has rows of the vocabulary too
        self.config = config
        self.seed = seed
        self.built = True  # there is nothing to infer from inputs: every shape follows from the config

    @property
    def base_model(self) -> Any:
        """The GPTJModel inside, or the model itself where it is one."""
        return self if self.head == "base" else self.transformer

    @property
    def param_dtype(self) -> str:
        """What the parameters are kept in: Keras' `variable_dtype`."""
        return str(self.variable_dtype)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model has; a tied matrix counts once."""
        weights = self.trainable_weights if only_trainable else self.weights
        return sum(int(np.prod(weight.shape)) for weight in weights)

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
        """Use another token embedding's values, of the same size; lm_head follows where the config ties them."""
        # Differs: the values are copied, since Keras would go on counting the layer that another takes the place of.
        inputs.check_embeddings(self.config, tuple(embeddings.weight.shape))
        row = next(row for row in schema(self.config, self.head) if row.kind == "embedding")
        self._assign([(row, to_numpy(embeddings.weight).astype(numpy_dtype(self.variable_dtype)))])

    def get_output_embeddings(self) -> Any:
        """lm_head, or None where the class has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, embeddings: Any) -> None:
        """Use another lm_head's values, of the same size; it stays tied to wte where the config ties them."""
        pretrained.check_output_embeddings(self, tuple(embeddings.weight.shape))
        rows = [row for row in schema(self.config, self.head) if row.name.startswith("lm_head.")]
        given = [(row, getattr(embeddings, row.name.removeprefix("lm_head."))) for row in rows]
        target = numpy_dtype(self.variable_dtype)
        self._assign([(row, to_numpy(value).astype(target)) for row, value in given if value is not None])

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the rotary table; a tied matrix counts once."""
        table = self.base_model.rotary.nbytes if return_buffers else 0
        return sum(int(np.prod(w.shape)) * tf.as_dtype(w.dtype).size for w in self.weights) + table

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
            kept = self._named_weights()
            config = self.config.replace(vocab_size=new_num_tokens)
            rows = [row for row in schema(config, self.head) if "vocab" in row.axes]
            self._assign((row, resized_tensor(row, config, to_numpy(kept[row.name]), seed)) for row in rows)
            self._set_config(config)
        return self.get_input_embeddings()

    # ---- values

    def initialise(self, *, dtype: Any = "float32", seed: int = 0) -> None:
        """Give every parameter its start value, the same in all three backends for the same seed."""
        # Differs: what a Keras model computes in is settled when it is made.
        if settle_policy(dtype).name != self.dtype_policy.name:
            raise InputError(
                "another dtype than the model's", where="dtype", expected=self.dtype_policy.name, found=dtype
            )
        target = numpy_dtype(self.variable_dtype)
        rows = schema(self.config, self.head)
        self._assign((row, initial_tensor(row, self.config, seed).astype(target)) for row in rows)

    def _assign(self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]]) -> None:
        """Make each array, without a copy where it is aligned, the variable that its row names."""
        for spec, array in arrays:
            *owners, leaf = spec.name.split(".")
            layer: Any = self
            with contextlib.ExitStack() as path:
                path.enter_context(keras.name_scope(self.name))
                for owner in owners:
                    path.enter_context(keras.name_scope(owner))
                    layer = layer[int(owner)] if owner.isdecimal() else getattr(layer, owner)
                self._give(layer, leaf, from_numpy(array))
        self.tie_weights()

    def _give(self, layer: Any, leaf: str, value: tf.Tensor) -> None:
        old = getattr(layer, leaf)
        if old is not None and old.shape == value.shape and old.dtype == value.dtype.name:
            old.assign(value)
            return
        if old is not None:
            delattr(layer, leaf)  # or Keras would go on counting it among the layer's weights
        variable = keras.Variable(
            lambda shape, dtype: value,
            shape=tuple(value.shape),
            dtype=value.dtype.name,
            trainable=old is None or old.trainable,
            autocast=False,
            name=leaf,
        )
        setattr(layer, leaf, variable)

    def _named_weights(self) -> dict[str, Any]:
        """The variables by their schema names."""
        return {row.name: self._weight(row.name) for row in schema(self.config, self.head)}

    def _weight(self, name: str) -> Any:
        place: Any = self
        for part in name.split("."):
            place = place[int(part)] if part.isdecimal() else getattr(place, part)
        return place

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
        **overrides: Any,
    ) -> Any:
        """The model in `directory`.

        Args:
            directory: a folder with config.json and safetensors weights, or a repository of the hub.
            config: to use in place of the folder's own.
            dtype: of the parameters, or a Keras policy; "auto" means as stored.
            param_dtype, torch_dtype: of the parameters.
            device_map: "cpu", "cuda", "auto" or {"": device}: the one device to place the model on.
            weights: which weights file, where there are several.
            subfolder: a folder inside `directory`.
            ignore_mismatched_sizes: rows of another shape start afresh in place of an error.
            output_loading_info: return (model, info) with the missing, unexpected and mismatched keys.
            mmap: map the weights file in place of reading it; the file must then not be changed while it is in use.
            verify: first check the folder against its manifest.json: every hash, and the reference's forward pass.
            seed: of rows that start afresh, and of dropout.
            inference: prepare the model for decoding alone; see `GPTJForCausalLM.prepare_for_inference`.
            quantize: with `inference`, the precision of the weights.
            overrides: config fields to change, such as num_labels; revision, cache_dir, token, local_files_only,
                force_download and variant; see `gptj.pretrained.prepare`.

        Raises:
            GPTJError: see `gptj.pretrained.prepare`.
        """
        check_inference(cls.head, inference, quantize)
        kept = pretrained.one_dtype(torch_dtype=torch_dtype, param_dtype=param_dtype)
        as_stored = isinstance(dtype, str) and dtype == "auto" and isinstance(kept, str) and kept == "auto"
        policy = None if as_stored else settle_policy(dtype, param_dtype=kept)
        loading = pretrained.prepare(
            cls.head,
            directory,
            config=config,
            dtype="auto" if policy is None else policy.variable_dtype,
            device_map=device_map,
            weights=weights,
            subfolder=subfolder,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            verify=verify,
            seed=seed,
            overrides=overrides,
        )
        with _device(loading.place):
            model = cls(loading.config, dtype=policy or loading.dtype, seed=seed, _do_init=False)
            model._assign(loading.arrays(mmap=mmap))
        if isinstance(model, Generates):
            model.generation_config = loading.generation_config
        if inference:
            model.prepare_for_inference(quantize=quantize)
        return (model, loading.info) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        max_shard_bytes: int | str = 5_000_000_000,
        overwrite: bool = False,
        **others: Any,
    ) -> Path:
        """Write config.json and the weights so that all three backends and transformers open them. Returns the folder.

        Args:
            directory: the folder, which is made; files and folders there that are no model's stay as they are.
            is_main_process: False writes nothing: of several processes, one writes.
            max_shard_bytes: of a weights file, in bytes or as "5GB"; max_shard_size is the same.
            overwrite: replace the model that the folder holds.
            others: what transformers' method has besides; see `gptj.pretrained.saving_options`.

        Raises:
            WriteError: the folder holds a model already and `overwrite` is False, or it cannot be written.
            InputError: an option that cannot be had.
        """
        options = pretrained.saving_options(max_shard_bytes, others)
        if not is_main_process:
            return Path(directory)
        named = self._named_weights()
        return write_checkpoint(
            directory,
            self.config,
            lambda spec: to_numpy(named[spec.name]),
            head=self.head,
            dtype=dtype_name(self.variable_dtype),
            max_shard_bytes=options,
            overwrite=overwrite,
            beside_others=True,
            extra_files=pretrained.side_files(self),
        )

    # ---- calls

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `call`, once its arguments are tensors and known to be sound.

        The first argument may be all of them: a list or tuple in the order of `call`, or a dict by name.
        """
        if self.base_model.wte.weight is None:
            raise InputError("the model was made without parameters", where="_do_init", hint="Use from_pretrained")
        given = self._settle_arguments(args, kwargs)
        symbolic = any(isinstance(value, keras.KerasTensor) for value in given.values())
        if symbolic and "use_cache" in inspect.signature(self.call).parameters:
            given.setdefault("use_cache", False)  # a cache is no output of a functional model
        self._check(given)
        return super().__call__(**given)

    def _settle_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without those that are None, with arrays as tensors."""
        signature = inspect.signature(self.call)
        given = dict(signature.bind(*args, **kwargs).arguments)
        names = list(signature.parameters)
        first: Any = given.get(names[0])
        if isinstance(first, Mapping) or _is_argument_list(first):
            del given[names[0]]
            named = dict(first) if isinstance(first, Mapping) else _named(first, names)
            for name in named:
                if name not in names:
                    raise InputError("no such argument", where=str(name), expected="one of " + ", ".join(names))
                if named[name] is not None and given.get(name) is not None:
                    raise InputError("given twice", where=name)
            given = {**named, **{name: value for name, value in given.items() if value is not None}}
        return {name: self._settle_argument(name, value) for name, value in given.items() if value is not None}

    def _settle_argument(self, name: str, value: Any) -> Any:
        if name == "past_key_values":
            return KVCache.of(value, self.config.n_layer)
        if name in ("input_ids", "token_type_ids", "position_ids"):
            return as_ids(value, where=name)
        flags = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "training")
        return bool(value) if name in flags else as_tensor(value, where=name)

    def _check(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments of the wrong kind, and where they have values already, wrong values."""
        names = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "head_mask")
        arguments = {name: given.get(name) for name in names}
        for name in ("input_ids", "token_type_ids", "position_ids"):
            check_traced_ids(given.get(name), where=name)
        inputs.check_call(self.config, host, past=given.get("past_key_values"), **arguments)
        if given.keys().isdisjoint({"position_ids", "past_key_values"}):
            tokens = given.get("input_ids", given.get("inputs_embeds"))
            if tokens.shape[1] is not None:
                inputs.check_length(self.config, 0, tokens.shape[1])

    # ---- Keras' training, prediction and saving

    # Differs: Keras has a training loop of its own, so its models know their loss, predict in batches, save themselves.

    _traced_config: GPTJConfig | None = None

    def _forget_traces(self) -> None:
        """Let the steps be traced anew where the config is another than when they were: they hold its flags."""
        if self._traced_config != self.config:
            self.train_function = self.test_function = self.predict_function = None
            self._traced_config = copy.deepcopy(self.config)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Keras' own, traced anew where the config was changed."""
        self._forget_traces()
        return super().make_predict_function(force)

    fit = checked_first(keras.Model.fit)
    evaluate = checked_first(keras.Model.evaluate)
    predict = checked_first(keras.Model.predict)

    def _checked_data(self, x: Any, labels: Any = None) -> Any:
        """`x`, once its arrays are checked; a dataset such that it checks each batch when it comes."""
        if isinstance(x, tf.data.Dataset):
            return x.map(self._checked_batch, num_parallel_calls=tf.data.AUTOTUNE)
        if all(isinstance(array, np.ndarray) or tf.is_tensor(array) for array in _arrays(x)):
            arrays = all(isinstance(array, np.ndarray) or tf.is_tensor(array) for array in _arrays(labels))
            given = self._with_labels(x, labels) if labels is not None and self._own_loss and arrays else x
            self._check(self._settle_arguments((given,), {}))
        return x

    @tf.autograph.experimental.do_not_convert
    def _checked_batch(self, *batch: Any) -> Any:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch if len(batch) > 1 else batch[0])
        given = self._settle_arguments((self._with_labels(x, y) if y is not None and self._own_loss else x,), {})
        self._check(given)
        assert_arguments(self.config, given)
        return batch if len(batch) > 1 else batch[0]

    @property
    def _own_loss(self) -> bool:
        """Whether `compile` was given no loss: then y are the model's own labels."""
        return bool(self.compiled) and self._compile_loss is None

    def _with_labels(self, x: Any, y: Any) -> dict[str, Any]:
        """The arguments of a call by name, with y under the names of the model's labels.

        Raises:
            InputError: the model has no labels, or y are not as many as it has.
        """
        parameters = inspect.signature(self.call).parameters
        names = [name for name in ("labels", "start_positions", "end_positions") if name in parameters]
        values = dict(y) if isinstance(y, Mapping) else dict(zip(names, _arrays(y), strict=False))
        if not names or values.keys() != set(names) or len(values) != len(_arrays(y)):
            expected = " and ".join(names) or "a loss given to compile: this class has none of its own"
            raise InputError("not the model's labels", where="y", expected=expected, found=f"{len(_arrays(y))} arrays")
        named = dict(x) if isinstance(x, Mapping) else _named(_arrays(x), list(parameters))
        if given_twice := [name for name in names if named.get(name) is not None]:
            raise InputError("labels in x and in y", where=given_twice[0], hint="Give them once")
        return {**named, **values}

    def train_step(self, data: Any) -> Any:
        """One step of `fit`; see `compute_loss`."""
        return super().train_step(self._labelled(data))

    def test_step(self, data: Any) -> Any:
        """One step of `evaluate`; see `compute_loss`."""
        return super().test_step(self._labelled(data))

    def _labelled(self, data: Any) -> Any:
        """A batch, with y among the call's arguments too where the loss is the model's own."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or not self._own_loss:
            return data
        return self._with_labels(x, y), y, sample_weight

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss that `compile` was given, of y; where it was given none, the model's own, of y or the labels in x.

        Raises:
            InputError: a loss or weights were given without a y that they apply to, or there are no labels at all.
        """
        own: Any = getattr(y_pred, "loss", None)
        if own is None and y is None:
            raise InputError("no labels to train on", where="x", hint="Put them into x, or pass them as y")
        if y is not None and not self._own_loss:
            return super().compute_loss(x, y, _predictions(y_pred, like=y), sample_weight, training)
        if self._compile_loss is not None or sample_weight is not None:
            problem = "the labels are inside x" if y is None else "the loss is the model's own"
            hint = "Pass the labels as y and a loss to compile, or neither a loss nor weights for the model's own"
            raise InputError(f"a loss or weights, but {problem}", where="compile", hint=hint)
        return tf.add_n([own, *(tf.cast(loss, own.dtype) for loss in self.losses)])

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Keras' metrics of y and what answers it: the logits, or a start and an end."""
        return super().compute_metrics(x, y, _predictions(y_pred, like=y), sample_weight)

    def predict_step(self, data: Any) -> Any:
        """The outputs of one batch, those whose first axis is the batch: neither cache nor loss."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        options = {"use_cache": False} if "use_cache" in inspect.signature(self.call).parameters else {}
        outputs = self(x, training=False, **options)
        if not isinstance(outputs, ModelOutput):
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name != "loss"})

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a SavedModel that serves {"input_ids", "attention_mask"} of any sizes, without this library.

        `input_signature` may say otherwise: a list of one dict of `tf.TensorSpec` by argument. Other formats are
        Keras' own.
        """
        if format != "tf_saved_model":
            super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)
            return
        ids = {name: tf.TensorSpec((None, None), tf.int64, name=name) for name in ("input_ids", "attention_mask")}

        def serve(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
            outputs = self.predict_step((arguments,))
            return {name: value for name, value in outputs.items() if tf.is_tensor(value)}

        archive = keras.export.ExportArchive()
        archive.track(self)
        archive.add_endpoint("serve", serve, input_signature or [ids])
        archive.write_out(os.fspath(filepath), verbose=bool(verbose))

    def __dir__(self) -> list[str]:
        # Keras loads what dir() lists, and would never come to the end of a model that is its own base.
        return [name for name in super().__dir__() if name != "base_model"]

    def get_config(self) -> dict[str, Any]:
        """What Keras saves beside the weights; see `from_config`."""
        return {"config": self.config.to_dict(), "dtype": self.dtype_policy.name, "seed": self.seed, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """A model with start values, as `get_config` described it."""
        members = dict(config)
        return cls(GPTJConfig.from_dict(members.pop("config")), **members)


def _predictions(y_pred: Any, *, like: Any) -> Any:
    """What of a model's output a Keras loss or metric compares with y: the logits, or a start and an end."""
    if not isinstance(y_pred, ModelOutput):
        return y_pred
    if isinstance(y_pred, QuestionAnsweringModelOutput):
        pair = y_pred.start_logits, y_pred.end_logits
        return dict(zip(("start_positions", "end_positions"), pair, strict=True)) if isinstance(like, Mapping) else pair
    return y_pred["last_hidden_state" if isinstance(y_pred, BaseModelOutputWithPast) else "logits"]


def _arrays(data: Any) -> list[Any]:
    """The arrays of Keras' x or y: of a dict, of a list, or the one that it is."""
    return list(data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else [data])


def _named(listed: Sequence[Any], names: list[str]) -> dict[str, Any]:
    """A list of arguments by their names.

    As on transformers' page, `[input_ids, attention_mask]` is understood although past_key_values comes second in
    the call: a cache is never a matrix.
    """
    if len(listed) > len(names):
        raise InputError("too many arguments", where=names[0], expected=f"at most {len(names)}", found=len(listed))
    if names[1] == "past_key_values" and len(listed) > 1 and len(getattr(listed[1], "shape", ())) == 2:
        listed = [listed[0], None, *listed[1:]]
    return dict(zip(names, listed, strict=False))


def _is_argument_list(first: Any) -> bool:
    """Whether the first argument is a list of the arguments, rather than token ids written as lists of numbers.

    >>> _is_argument_list([[1, 2, 3]]), _is_argument_list([np.array([[1, 2, 3]]), None])
    (False, True)
    """
    if not isinstance(first, list | tuple) or not first:
        return False
    return first[0] is None or len(getattr(first[0], "shape", ())) > 1


@contextlib.contextmanager
def on_device(name: str) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """While this is open, models run on a device; one that is loaded under the context that it gives is there.

    Args:
        name: "cpu", "cuda", "mps", or "auto": the best that the framework sees.

    Raises:
        InputError: the framework sees no such device.
    """
    gpu = bool(tf.config.list_logical_devices("GPU"))
    metal = platform.system() == "Darwin"
    there = {"cuda": gpu and not metal, "mps": gpu and metal, "cpu": True}
    check_device(name, there, f"TensorFlow {tf.__version__}")
    with tf.device("/CPU:0" if name == "cpu" or not gpu else "/GPU:0"):
        yield contextlib.nullcontext()


def _device(place: str | None) -> Any:
    """A context in which variables are made on the device of a `Loading.place`; without one, TensorFlow chooses.

    Raises:
        InputError: there is no such GPU.
    """
    if place is None:
        return contextlib.nullcontext()
    kind, _, number = place.partition(":")
    if not number or kind == "cpu":
        return on_device(kind)
    there = {place: int(number) < len(tf.config.list_logical_devices("GPU")), "cpu": True}
    check_device(place, there, f"TensorFlow {tf.__version__}")
    return tf.device(f"/GPU:{number}")
