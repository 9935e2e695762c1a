"""Weights in and out of TensorFlow: arrays to tensors and back, and the hooks that loading, saving and counting need.

Parameter names are the schema's, so loading is one assignment a row. A model is made without variables; then each
row of the schema becomes a variable over its array's memory, so nothing is ever held twice.
"""

from __future__ import annotations

import contextlib
import inspect
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import keras
import ml_dtypes
import numpy as np
import optree
import tensorflow as tf
from numpy.typing import NDArray

from gptj.calls import inputs
from gptj.calls.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj.calls.prepared import check_device
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name, numpy_dtype
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import InputError
from gptj.pretrained import Loading, Pretrained, one_dtype
from gptj.pretrained.counted import ArrayFacts, is_embedding
from gptj.sharding import Placement, ReadPart, Strategy
from gptj.tf.adapters import AdapterMixin
from gptj.tf.arguments import as_ids, as_tensor, check_traced_ids, host
from gptj.tf.parallel import call_over_mesh, choose_placement, distribute, held_by_process, refuse_distribution, whole
from gptj.tf.training import TrainableModel

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
    tensor = tf.experimental.dlpack.from_dlpack((bits if fits else _copy_aligned(bits)).__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if bits is not array else tensor


def _copy_aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy that begins at a multiple of `ALIGNMENT_BYTES`."""
    room = np.empty(array.nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGNMENT_BYTES
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def choose_policy(dtype: Any, *, param_dtype: Any = None) -> keras.DTypePolicy:
    """The Keras policy of a dtype, or of a policy's name: what variables are kept in, and what is computed in.

    Args:
        dtype: of both, or a policy of two dtypes; None where `param_dtype` says it.
        param_dtype: what variables are kept in; it must be the policy's.
    """
    # Differs: Keras has mixed policies, whose variables are float32 while the blocks compute in 16 bits.
    if isinstance(dtype, str) and dtype.startswith("mixed_"):
        dtype = keras.DTypePolicy(dtype)
    kept = dtype.variable_dtype if isinstance(dtype, keras.DTypePolicy) else dtype
    kept = one_dtype(dtype=kept, param_dtype=param_dtype)
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


class PretrainedModel(AdapterMixin, Pretrained, TrainableModel):
    """The hooks of `gptj.pretrained.Pretrained` in TensorFlow, whose models are Keras'.

    Attributes:
        head: which rows of the schema the class has.
    """

    head: ClassVar[Head]

    def __init__(self, config: GPTJConfig, *, dtype: Any, seed: int, name: str | None, param_dtype: Any = None) -> None:
        refuse_distribution()
        super().__init__(name=name, dtype=choose_policy(dtype, param_dtype=param_dtype), autocast=False)
        self.config = config
        self.seed = seed
        self.built = True  # there is nothing to infer from inputs: every shape follows from the config

    @property
    def param_dtype(self) -> str:
        """The dtype of the parameters: Keras' `variable_dtype`."""
        return str(self.variable_dtype)

    # ---- hooks

    @classmethod
    def _dtypes_of(cls, dtype: Any, **parameter_dtypes: Any) -> tuple[Any, Any]:
        kept = one_dtype(**parameter_dtypes)
        if isinstance(dtype, str) and dtype == "auto" and isinstance(kept, str) and kept == "auto":
            return None, "auto"
        policy = choose_policy(dtype, param_dtype=kept)
        return policy, policy.variable_dtype

    @classmethod
    def _on_device(cls, place: str | None) -> AbstractContextManager[Any]:
        return _device(place)

    @classmethod
    def _without_values(cls, loading: Loading, *, dtype: Any, attn_implementation: str | None) -> Any:
        make: Any = cls
        return make(loading.config, dtype=dtype or loading.dtype, seed=loading.seed, _do_init=False)

    @classmethod
    def _choose_placement(cls, mesh: Any, strategy: Strategy) -> Placement:
        return choose_placement(mesh, strategy)

    def _distribute(self, read_part: ReadPart, placement: Placement) -> None:
        distribute(self, read_part, placement)
        self.placement = self.base_model.placement = placement

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

    def _read(self, name: str) -> NDArray[Any]:
        place: Any = self
        for part in name.split("."):
            place = place[int(part)] if part.isdecimal() else getattr(place, part)
        return to_numpy(place if self.placement is None else whole(place, self.placement))

    def _to_numpy(self, array: Any) -> NDArray[Any]:
        return to_numpy(array)

    def _has_values(self) -> bool:
        return self.base_model.wte.weight is not None

    def _list_arrays(self) -> Iterator[ArrayFacts]:
        # Differs: a Keras layer without values has no variables.
        if not self._has_values():
            for row in schema(self.config, self.head):
                yield ArrayFacts(row.size, 0, bool(self.trainable), is_embedding(row.name))
        if self.placement is not None:
            width = tf.as_dtype(self.variable_dtype).size
            for row in schema(self.config, self.head):
                held = held_by_process(row, self.placement)
                yield ArrayFacts(held, held * width, False, is_embedding(row.name))
        trained = {id(weight) for weight in self.trainable_weights}
        for weight in self.weights:
            size = int(np.prod(weight.shape))
            embeds = weight is self.base_model.wte.weight
            yield ArrayFacts(size, size * tf.as_dtype(weight.dtype).size, id(weight) in trained, embeds)

    def _buffer_bytes(self) -> int:
        return int(self.base_model.rotary.nbytes)

    def _parameter_dtype(self) -> Any:
        return self.variable_dtype

    def _initial_dtype(self, dtype: Any) -> str:
        # Differs: what a Keras model computes in is settled when it is made.
        if choose_policy(dtype).name != self.dtype_policy.name:
            raise InputError(
                "another dtype than the model's", where="dtype", expected=self.dtype_policy.name, found=dtype
            )
        return str(self.variable_dtype)

    # Differs: the values are copied, since Keras would go on counting the layer that another takes the place of.
    def _use_input_embeddings(self, embeddings: Any) -> None:
        row = next(row for row in schema(self.config, self.head) if row.kind == "embedding")
        self._assign([(row, to_numpy(embeddings.weight).astype(numpy_dtype(self.variable_dtype)))])

    def _use_output_embeddings(self, embeddings: Any) -> None:
        rows = [row for row in schema(self.config, self.head) if row.name.startswith("lm_head.")]
        given = [(row, getattr(embeddings, row.name.removeprefix("lm_head."))) for row in rows]
        target = numpy_dtype(self.variable_dtype)
        self._assign([(row, to_numpy(value).astype(target)) for row, value in given if value is not None])

    # ---- calls

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `call`, once its arguments are tensors and known to be sound.

        The first argument may be all of them: a list or tuple in the order of `call`, or a dict by name.
        """
        if self.base_model.wte.weight is None:
            raise InputError("the model was made without parameters", where="_do_init", hint="Use from_pretrained")
        given = self._convert_arguments(args, kwargs)
        symbolic = any(isinstance(value, keras.KerasTensor) for value in given.values())
        if symbolic and "use_cache" in inspect.signature(self.call).parameters:
            given.setdefault("use_cache", False)  # a cache is no output of a functional model
        self._check(given)
        if self.placement is not None:
            return call_over_mesh(self, given)
        return super().__call__(**given)

    @tf.autograph.experimental.do_not_convert
    def _taps(self, names: str | Iterable[str] | None, labels: Any, given: dict[str, Any]) -> dict[str, Any]:
        return super()._taps(names, labels, given)

    def _convert_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without those that are None, with arrays as tensors."""
        signature = inspect.signature(self.call)
        given = dict(signature.bind(*args, **kwargs).arguments)
        names = list(signature.parameters)
        first: Any = given.get(names[0])
        if isinstance(first, Mapping) or _is_argument_list(first):
            del given[names[0]]
            named = dict(first) if isinstance(first, Mapping) else self._by_name(first)
            for name in named:
                if name not in names:
                    raise InputError("no such argument", where=str(name), expected="one of " + ", ".join(names))
                if named[name] is not None and given.get(name) is not None:
                    raise InputError("given twice", where=name)
            given = {**named, **{name: value for name, value in given.items() if value is not None}}
        return {name: self._convert_argument(name, value) for name, value in given.items() if value is not None}

    def _by_name(self, listed: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call, given as a list, by their names."""
        return _name_arguments(listed, list(inspect.signature(self.call).parameters))

    def _convert_argument(self, name: str, value: Any) -> Any:
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

    # ---- Keras' own saving

    def __dir__(self) -> list[str]:
        # Keras loads what dir() lists, and would never come to the end of a model that is its own base.
        return [name for name in super().__dir__() if name != "base_model"]

    def get_config(self) -> dict[str, Any]:
        """The arguments that Keras saves beside the weights; see `from_config`.

        Raises:
            InputError: the model holds adapters, which Keras' own saving would lose.
        """
        if self.adapters:
            hint = "save_adapter(DIR) writes it, merge_adapter() makes it part of the model"
            raise InputError("Keras' own saving knows no adapters", where=next(iter(self.adapters)), hint=hint)
        return {"config": self.config.to_dict(), "dtype": self.dtype_policy.name, "seed": self.seed, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """A model with start values, as `get_config` described it."""
        if not isinstance(config, dict):
            hint = f"{cls.__name__}(config) makes a model of a GPTJConfig"
            raise InputError("is not get_config()'s", where="config", found=type(config).__name__, hint=hint)
        members = dict(config)
        return cls(GPTJConfig.from_dict(members.pop("config")), **members)


def _name_arguments(listed: Sequence[Any], names: list[str]) -> dict[str, Any]:
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
