"""Weights in and out of Flax: arrays to jax and back, and the hooks that loading, saving and counting need.

Parameters are plain nested dicts whose path, joined with dots, is the schema's name; so loading is one assignment a
row. On the CPU jax keeps an array where it is if it lies at a multiple of 64 bytes, else copies it and lets it go.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from gptj.calls import inputs
from gptj.calls.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj.calls.prepared import check_device
from gptj.calls.taps import TapCollector
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name, numpy_dtype
from gptj.config.schema import Head, TensorSpec, schema, schema_by_name
from gptj.errors import InputError, SchemaError
from gptj.flax.adapters import AdapterMixin
from gptj.paths import path_called
from gptj.pretrained import Loading, Pretrained, one_dtype
from gptj.pretrained.adapted import HeldAdapters
from gptj.pretrained.counted import ArrayFacts, is_embedding
from gptj.sharding import Placement, ReadPart, Strategy

Params = Mapping[str, Any]
"""Nested dicts of arrays: `params["transformer"]["h"]["0"]["attn"]["q_proj"]["weight"]`."""


def to_numpy(array: Any) -> NDArray[Any]:
    """The array's values as a NumPy array; bfloat16 as ml_dtypes'. Shares memory where the array is on the CPU."""
    if isinstance(array, Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    if isinstance(array, Array) and len(array.sharding.device_set) > 1:  # which would keep the whole it is asked for
        whole = np.empty(array.shape, array.dtype)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                whole[shard.index] = np.asarray(shard.data)
        return whole
    return np.asarray(array)


def from_numpy(array: NDArray[Any]) -> Array:
    """A jax array of the same dtype. Shares memory on the CPU where the array lies at a multiple of 64 bytes.

    Raises:
        InputError: it is float64, which jax would round to float32 (see `require_x64`).
    """
    require_x64(array.dtype)
    return jax.device_put(array)


def require_x64(dtype: Any, *, where: str = "dtype") -> None:
    """Refuse float64 where jax has it off, and would take float32 in its place without a word."""
    if np.dtype(dtype) == np.float64 and not jax.config.jax_enable_x64:
        raise InputError(
            "jax has float64 switched off",
            where=where,
            expected="float32, bfloat16 or float16",
            found="float64",
            hint='Set JAX_ENABLE_X64=1, or call jax.config.update("jax_enable_x64", True) before anything else',
        )


for _output in (BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast,
                QuestionAnsweringModelOutput):  # fmt: skip
    # jit, vmap and export take outputs apart; jax wants to be told how.
    jax.tree_util.register_dataclass(_output)
jax.tree_util.register_dataclass(KVCache, data_fields=["keys", "values", "length"], meta_fields=["fixed"])


def nested(arrays: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Pairs of a dotted name and an array as nested dicts, taken one at a time."""
    tree: dict[str, Any] = {}
    for name, array in arrays:
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = array
    return tree


def flat(params: Params) -> dict[str, Any]:
    """The arrays of nested dicts by their dotted names."""
    return {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}


class PretrainedModel(AdapterMixin, Pretrained):
    """The hooks of `gptj.pretrained.Pretrained` in Flax.

    Differs: a Flax module is a description without state, so the model is a wrapper that holds the module and its
    parameters side by side. It is never changed by a call, and a call may bring parameters of its own.

    Args:
        config: the sizes.
        input_shape: (batch, tokens), accepted since transformers has it; no parameter's shape depends on it.
        seed: of the start values, which are the same in all three backends.
        dtype: what is computed in: float32, float64, bfloat16 or float16, as a name or the framework's own. It does
            not say what the parameters are kept in. None means each call's parameters' own dtype.
        _do_init: False makes no parameters; a call must then be given some.
        param_dtype: what the parameters are kept in; flax.linen's name.

    Attributes:
        fast_path: what computes in place of the module once `prepare_for_inference` was called, else None.
        head: which rows of the schema the class has.
        base_class: GPTJModel, which the heads have inside.
    """

    head: ClassVar[Head]
    base_class: ClassVar[type[Any]]
    module_class: ClassVar[type[nn.Module]]
    parameters_apart = True
    fast_path: Any = None
    _module: Any

    # Differs: input_shape is Flax's alone, dtype is not the parameters' (transformers' page says so in bold), and the
    # order is transformers'.
    def __init__(
        self,
        config: GPTJConfig,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: Any = None,
        _do_init: bool = True,
        *,
        param_dtype: Any = "float32",
    ) -> None:
        _check_input_shape(input_shape)
        parameters = numpy_dtype(dtype_name(param_dtype))
        computation = None if dtype is None else numpy_dtype(dtype_name(dtype))
        require_x64(parameters, where="param_dtype")
        require_x64(computation or parameters)
        self.config, self._held_adapters = config, HeldAdapters()
        self.module = self.module_class(copy.deepcopy(config), dtype=computation, param_dtype=parameters)
        self._params: Params | None = None
        if _do_init:
            self.initialise(dtype=parameters, seed=seed)

    # Differs: torch's modules and Keras' models show themselves.
    def __repr__(self) -> str:
        kept = str(self.param_dtype) if self._params is not None else "no parameters of its own"
        return (
            f"{type(self).__name__}({self.config.n_layer} layers of width {self.config.n_embd}, "
            f"vocabulary {self.config.vocab_size:,}, {self.num_parameters():,} parameters: {kept})"
        )

    @property
    def module(self) -> Any:
        """The flax.linen module: `module.apply({"params": params}, input_ids)` works under jit, grad and vmap.

        Its config is a copy, since what was compiled holds it: a change of the model's makes another module.
        """
        if self._module.config != self.config:
            self._module = self._module.clone(config=copy.deepcopy(self.config))
        return self._module

    @module.setter
    def module(self, module: Any) -> None:
        self._module = module

    @property
    def params(self) -> Params:
        """The parameters, nested dicts of arrays.

        Raises:
            InputError: the model was made with `_do_init=False` and was never given any.
        """
        if self._params is None:
            hint = "Pass params=..., or set model.params"
            raise InputError("the model was made without parameters", where="params", hint=hint)
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._refuse_prepared("params")
        check_params(params, self.config, self.head)
        self._params = params

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """Shapes and dtypes in the place of the parameters: what orbax and `jax.eval_shape` want to know them by.

        Differs: Flax's alone, as in transformers.
        """
        rows = schema(self.config, self.head)
        return nested((row.name, jax.ShapeDtypeStruct(row.shape, self.param_dtype)) for row in rows)

    @property
    def base_model(self) -> Any:
        """A GPTJModel over the parameters of the one inside, or the model itself where it is one."""
        if self.head == "base":
            return self
        # Differs: a model without state of its own; what is assigned to it stays with it.
        model = self.base_class(self.config, dtype=self.module.dtype, param_dtype=self.param_dtype, _do_init=False)
        model.module = model.module.clone(gradient_checkpointing=self.gradient_checkpointing)
        model._params = None if self._params is None else self._params["transformer"]
        model._inside, model._is_prepared, model.placement = True, self._is_prepared, self.placement
        model._held_adapters = self._held_adapters
        return model

    @property
    def device(self) -> jax.Device:
        """The device of the parameters; the first of several."""
        leaf = jax.tree.leaves(self.params)[0]
        return min(leaf.devices(), key=lambda device: device.id) if isinstance(leaf, Array) else jax.devices()[0]

    @property
    def param_dtype(self) -> np.dtype[Any]:
        """The dtype of the parameters, or where the model has none, the dtype that they would have."""
        if self._params is None:
            return np.dtype(self.module.param_dtype)
        return np.dtype(jax.tree.leaves(self._params)[0].dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the computation; the parameters may have another, `param_dtype`."""
        return self.param_dtype if self.module.dtype is None else np.dtype(self.module.dtype)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps only what enters each block."""
        return bool(self.module.gradient_checkpointing)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of fixed capacity: n_layer pairs of (b, h, max_length, d).

        Differs: jax arrays cannot be written in place; a call returns the filled cache and leaves this one as it was.

        Raises:
            InputError: max_length is more than n_positions, or a size is below 1.
        """
        inputs.check_cache_size(self.config, batch_size, max_length)
        shape = (batch_size, self.config.n_head, max_length, self.config.head_dim)
        keys, values = (tuple(jnp.zeros(shape, self.dtype) for _ in range(self.config.n_layer)) for _ in range(2))
        return KVCache(keys, values, 0, fixed=True)

    # Differs: there are no module objects with weights in Flax, so embeddings are given and taken as arrays.
    def get_input_embeddings(self) -> Any:
        """The token embedding wte, (v, m)."""
        return flat(self.params)[self._embedding]

    def get_output_embeddings(self) -> Any:
        """lm_head's weight (v, m), or None where the class has none."""
        if self.head != "causal_lm":
            return None
        return self.get_input_embeddings() if self.config.tie_word_embeddings else self.params["lm_head"]["weight"]

    @property
    def _embedding(self) -> str:
        return schema(self.config, self.head)[0].name

    # Differs: these three are Flax's alone, since its parameters are data and have no `.half()`.
    def to_bf16(self, params: Params, mask: Params | None = None) -> Any:
        """`params` in bfloat16, where `mask`, nested dicts of bools, says True; None: all. They are not assigned."""
        return cast(params, "bfloat16", mask)

    def to_fp16(self, params: Params, mask: Params | None = None) -> Any:
        """`params` in float16, where `mask`, nested dicts of bools, says True; None: all. They are not assigned."""
        return cast(params, "float16", mask)

    def to_fp32(self, params: Params, mask: Params | None = None) -> Any:
        """`params` in float32, where `mask`, nested dicts of bools, says True; None: all. They are not assigned."""
        return cast(params, "float32", mask)

    def taps(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        names: str | Iterable[str] | None = None,
        params: Params | None = None,
    ) -> dict[str, Any]:
        """The intermediate values of a call, as `Tapped.taps` says, with `params` in place of the model's own."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._taps(names, labels, {**given, "past_key_values": past_key_values, "params": params})

    # Differs: params is Flax's alone, in the place that transformers gives it.
    @path_called("save_directory")
    def save_pretrained(  # type: ignore[override]
        self,
        directory: str | os.PathLike[str],
        params: Params | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        max_shard_bytes: int | str = 5_000_000_000,
        overwrite: bool = False,
        **others: Any,
    ) -> Path:
        """Write the model, as `Pretrained.save_pretrained` says, with `params` in place of its own parameters.

        Raises:
            SchemaError: `params` are not this model's.
        """
        if params is not None:
            if state_dict is not None:
                raise InputError("given beside params", where="state_dict", hint="Pass one of them")
            self._refuse_prepared("save_pretrained")
            check_params(params, self.config, self.head)
            state_dict = flat(params)
        return super().save_pretrained(
            directory,
            is_main_process,
            state_dict,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            **others,
        )

    # ---- hooks

    @classmethod
    def _dtypes_of(cls, dtype: Any, **parameter_dtypes: Any) -> tuple[Any, Any]:
        # Differs: dtype is what is computed in, and not the parameters'.
        return None if isinstance(dtype, str) and dtype == "auto" else dtype, one_dtype(**parameter_dtypes)

    @classmethod
    def _on_device(cls, place: str | None) -> contextlib.AbstractContextManager[Any]:
        return _device(place)

    @classmethod
    def _without_values(cls, loading: Loading, *, dtype: Any, attn_implementation: str | None) -> Any:
        return cls(loading.config, dtype=dtype, param_dtype=loading.dtype, _do_init=False)

    # Differs: parameters can be held outside of the model; where the config ties lm_head.weight, it is none of them.
    def _take_apart(self) -> tuple[Any, Any]:
        params, self._params = self._params, None
        return self, params

    def _assign(self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]]) -> None:
        """Make each array the parameter that its row names; at most one more than the parameters is held."""
        kept = {} if self._params is None else flat(self._params)
        given = {spec.name: jax.block_until_ready(from_numpy(array)) for spec, array in arrays}
        self._params = nested((kept | given).items())

    @classmethod
    def _choose_placement(cls, mesh: Any, strategy: Strategy) -> Placement:
        from gptj.flax.parallel import choose_placement

        return choose_placement(mesh, strategy)

    def _distribute(self, read_part: ReadPart, placement: Placement) -> None:
        from gptj.flax.parallel import distribute

        self._params = nested(distribute(self.config, self.head, read_part, placement).items())
        self.placement = placement
        if placement.strategy in ("tp", "tp_fsdp"):
            self.module = self.module.clone(parts=placement.mesh.tp)

    def _read(self, name: str) -> NDArray[Any]:
        return to_numpy(flat(self.params)[name])

    def _to_numpy(self, array: Any) -> NDArray[Any]:
        return to_numpy(array)

    def _has_values(self) -> bool:
        return self._params is not None

    def _list_arrays(self) -> Iterator[ArrayFacts]:
        held = self._adapters
        if self._params is None:
            for row in schema(self.config, self.head):
                yield ArrayFacts(row.size, 0, not held.by_name, is_embedding(row.name))
        else:
            for name, array in flat(self._params).items():
                yield ArrayFacts(int(np.size(array)), int(array.nbytes), not held.by_name, is_embedding(name))
        for name, adapter in held.by_name.items():
            for array in jax.tree.leaves(held.arrays[name]["adapter"]):
                yield ArrayFacts(int(array.size), int(array.nbytes), adapter.trains and name == held.active)

    def _buffer_bytes(self) -> int:
        # Differs: a Flax module has no buffers; its rotary table is a constant of what is compiled.
        return 0

    def _parameter_dtype(self) -> Any:
        return self.param_dtype

    def _set_recomputation(self, on: bool) -> None:
        self.module = self.module.clone(gradient_checkpointing=on)

    def _collect(self, collector: TapCollector, given: dict[str, Any], labels: Any) -> Any:
        params = given["params"]
        return super()._collect(collector, {**given, "params": params and params["transformer"]}, labels)

    def _shape_of(self, embeddings: Any) -> tuple[int, ...]:
        return tuple(embeddings.shape)

    def _use_input_embeddings(self, embeddings: Any) -> None:
        self.params = nested((flat(self.params) | {self._embedding: embeddings}).items())

    def _use_output_embeddings(self, embeddings: Any) -> None:
        name = self._embedding if self.config.tie_word_embeddings else "lm_head.weight"
        self.params = nested((flat(self.params) | {name: embeddings}).items())


def _check_input_shape(shape: Any) -> None:
    whole = isinstance(shape, tuple | list) and all(isinstance(size, int) and size >= 1 for size in shape)
    if not whole or len(shape) != 2:
        raise InputError("no such shape", where="input_shape", expected="(batch, tokens), neither 0", found=shape)


def cast(params: Params, dtype: str, mask: Params | None) -> Any:
    """Nested dicts of arrays in `dtype`, where `mask` says True."""
    target = numpy_dtype(dtype)
    if mask is None:
        return jax.tree.map(lambda array: jnp.asarray(array, target), params)
    return jax.tree.map(lambda array, chosen: jnp.asarray(array, target) if chosen else array, params, mask)


def check_params(params: Params, config: GPTJConfig, head: Head) -> None:
    """Refuse parameters that are not exactly the schema's rows.

    Raises:
        SchemaError: naming all that are missing, unexpected and misshapen.
        InputError: they are no arrays in nested dicts, or one is NumPy's float64 and jax has float64 switched off.
    """
    if not isinstance(params, Mapping):
        raise InputError("are none", where="params", expected="arrays in nested dicts", found=type(params).__name__)
    rows, found = schema_by_name(config, head), flat(params)
    kinds = {
        "missing": [name for name in rows if name not in found],
        "unexpected": [name for name in found if name not in rows],
        "misshapen": [
            f"{name} expected {row.shape}, found {tuple(np.shape(found[name]))}"
            for name, row in rows.items()
            if name in found and tuple(np.shape(found[name])) != row.shape
        ],
    }
    problems = [f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in kinds.items() if names]
    if problems:
        raise SchemaError(f"they do not fit the model: {'; '.join(problems)}", where="params")
    for name, array in found.items():
        if not hasattr(array, "dtype"):
            raise InputError("no array", where=f"params: {name}", found=type(array).__name__)
        require_x64(array.dtype, where=f"params: {name}")


@contextlib.contextmanager
def on_device(name: str) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """While this is open, models run on a device; one that is loaded under the context that it gives is there.

    Args:
        name: "cpu", "cuda", "mps", or "auto": the best that the framework sees.

    Raises:
        InputError: the framework sees no such device.
    """
    kinds = {"cuda": "cuda", "mps": "METAL", "cpu": "cpu"}
    there = {kind: _devices(platform) for kind, platform in kinds.items()}
    check_device(name, {kind: bool(devices) for kind, devices in there.items()}, f"jax {jax.__version__}")
    with jax.default_device(jax.devices()[0] if name == "auto" else there[name][0]):
        yield contextlib.nullcontext()


def _devices(platform: str) -> list[jax.Device]:
    try:
        return jax.devices(platform)
    except RuntimeError:  # jax's word for a platform that is not there
        return []


def _device(place: str | None) -> Any:
    """A context in which arrays are put on the device of a `Loading.place`; without one, jax chooses.

    Raises:
        InputError: jax has no such device.
    """
    if place is None:
        return contextlib.nullcontext()
    kind, _, number = place.partition(":")
    if not number:
        return on_device(kind)
    devices = _devices(kind)
    there = {place: int(number) < len(devices), "cpu": True}
    check_device(place, there, f"jax {jax.__version__}")
    return jax.default_device(devices[int(number)])
