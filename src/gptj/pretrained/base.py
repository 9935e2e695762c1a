"""The common base of the model classes of all three wings: config, loading, saving, resizing, counting.

`Pretrained` never sees a framework. A wing's PretrainedModel fills its hooks, the methods from `_dtypes_of` on: how a
model is made without values, how an array becomes a parameter and is read back, on which device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from gptj.calls.inputs import check_embeddings, part_of_a_model
from gptj.calls.prepared import check_inference, refusal
from gptj.config import GPTJConfig
from gptj.config.dtypes import dtype_name, numpy_dtype
from gptj.config.initial import initial_tensor, resize_tensor
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import ConfigError, InputError
from gptj.generation.mixin import Generates
from gptj.generation.typed import Off, On, typed_load
from gptj.paths import path_called, require_path
from gptj.pretrained.absent import Absent
from gptj.pretrained.adapted import Adapted
from gptj.pretrained.checks import check_output_embeddings, check_recomputation, check_same_build, new_vocabulary
from gptj.pretrained.counted import ArrayFacts
from gptj.pretrained.loading import Loading, one_dtype, prepare
from gptj.pretrained.placing import place_model
from gptj.pretrained.saving import check_rows, saving_options, write_model
from gptj.pretrained.tapped import Tapped
from gptj.sharding import Placement, ReadPart, Strategy


class Pretrained(Absent, Tapped, Adapted):
    """A model class of any wing.

    Attributes:
        head: which rows of the schema the class has.
        base_model_prefix: where a head keeps the GPTJModel inside it.
        parameters_apart: whether the wing's parameters can be held outside of the model.
        placement: which part of the model this process holds, None where it holds it whole.
        name_or_path: the folder or repository that it was opened from, as it was given; "" where there is none.
    """

    head: ClassVar[Head]
    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = "transformer"
    config_class: ClassVar[type[GPTJConfig]] = GPTJConfig
    parameters_apart: ClassVar[bool] = False
    placement: Placement | None = None
    name_or_path: str = ""
    supports_gradient_checkpointing: ClassVar[bool] = True
    _own_config: GPTJConfig | None = None
    _inside = False  # whether it is a part of another model, whose head has rows of the vocabulary too
    _is_prepared = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copy and pickle ask for it; a copy of packed weights or of compiled programs would be neither.
        self._refuse_prepared("a copy")
        return super().__reduce_ex__(protocol)

    # ---- config

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

    @property
    def base_model(self) -> Any:
        """The GPTJModel inside, or the model itself where it is one."""
        return self if self.head == "base" else getattr(self, self.base_model_prefix)

    def get_decoder(self) -> Any:
        """The same as `base_model`."""
        return self.base_model

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        """An empty cache of fixed capacity; see `GPTJModel.init_cache`."""
        return self.base_model.init_cache(batch_size, max_length)

    # ---- counts

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model and its adapters have; a tied matrix counts once.

        Args:
            only_trainable: count those that an optimizer would change; a prepared model has none.
            exclude_embeddings: do not count wte, nor what is tied to it. An lm_head of its own counts.
        """
        if self._is_prepared or (self.placement is not None and not only_trainable):
            added = sum(row.size for held in self._adapters.by_name.values() for row in held.rows)
            left = exclude_embeddings and self.config.vocab_size * self.config.n_embd
            return 0 if only_trainable else added - left + sum(row.size for row in schema(self.config, self.head))
        counted = (one for one in self._list_arrays() if one.trainable or not only_trainable)
        return sum(one.size for one in counted if not (exclude_embeddings and one.embeds))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the rotary table; a tied matrix counts once."""
        return sum(held.nbytes for held in self._list_arrays()) + (self._buffer_bytes() if return_buffers else 0)

    # ---- recomputation

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether training keeps only what enters each block."""
        return bool(self.base_model.gradient_checkpointing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """In training, keep only what enters each block and compute the rest again for the gradient.

        Args:
            gradient_checkpointing_kwargs: {"use_reentrant": False} says what is so anyway.
        """
        self._refuse_prepared("gradient_checkpointing_enable")
        check_recomputation(gradient_checkpointing_kwargs)
        self._set_recomputation(True)

    def gradient_checkpointing_disable(self) -> None:
        """In training, keep everything that the gradient needs."""
        self._set_recomputation(False)

    # ---- embeddings

    def get_input_embeddings(self) -> Any:
        """The token embedding wte, (v, m)."""
        return self.base_model.wte

    def set_input_embeddings(self, embeddings: Any) -> None:
        """Use another token embedding of the same size; lm_head follows where the config ties them."""
        self._refuse_prepared("set_input_embeddings")
        self._refuse_cut("set_input_embeddings")
        check_embeddings(self.config, self._shape_of(embeddings))
        self._use_input_embeddings(embeddings)

    def get_output_embeddings(self) -> Any:
        """lm_head, or None where the class has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, embeddings: Any) -> None:
        """Use another lm_head of the same size; it stays tied to wte where the config ties them."""
        self._refuse_prepared("set_output_embeddings")
        self._refuse_cut("set_output_embeddings")
        check_output_embeddings(self.config, self.head, type(self).__name__, self._shape_of(embeddings))
        self._use_output_embeddings(embeddings)

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
        self._refuse_prepared("resize_token_embeddings")
        self._refuse_cut("resize_token_embeddings")
        new_num_tokens = new_vocabulary(self.config, new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None and new_num_tokens != self.config.vocab_size:
            if self._inside:
                raise part_of_a_model("resize_token_embeddings")
            self._require_values("resize_token_embeddings")
            config = self.config.replace(vocab_size=new_num_tokens)
            rows = [row for row in schema(config, self.head) if "vocab" in row.axes]
            self._assign((row, resize_tensor(row, config, self._read(row.name), seed)) for row in rows)
            self._set_config(config)
            self._note_vocabulary(new_num_tokens)
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make lm_head.weight the embedding's, where the config says so, in the class that has one."""

    # ---- values

    def initialise(self, *, dtype: Any = "float32", seed: int = 0) -> None:
        """Give every parameter its start value, the same in all three backends for the same seed."""
        self._refuse_prepared("initialise")
        self._refuse_cut("initialise")
        target = numpy_dtype(self._initial_dtype(dtype))
        rows = schema(self.config, self.head)
        self._assign((row, initial_tensor(row, self.config, seed).astype(target, copy=False)) for row in rows)

    @typed_load
    @path_called("pretrained_model_name_or_path")
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
        attn_implementation: str | None = None,
        mesh: Any = None,
        strategy: str | None = None,
        _do_init: On = True,
        **overrides: Any,
    ) -> Any:
        """The model in `directory`, in evaluation mode.

        Args:
            directory: a folder with config.json and safetensors weights, or a repository of the hub.
            config: to use in place of the folder's own.
            dtype: of the parameters, as a name or the framework's own; "auto" means as stored. In TensorFlow it may be
                a Keras policy. In Flax it is what is computed in, and not what the parameters are kept in.
            param_dtype, torch_dtype: of the parameters.
            device_map: "cpu", "cuda", "auto" or {"": device}: the one device to place the model on.
            weights: which weights file, where there are several.
            subfolder: a folder inside `directory`.
            ignore_mismatched_sizes: rows of another shape start afresh in place of an error.
            output_loading_info: return (model, info) with the missing, unexpected and mismatched keys.
            mmap: map the weights file in place of reading it; the file must then not be changed while it is in use.
            verify: first check the folder against its manifest.json: every hash, and the reference's forward pass.
            seed: of rows that start afresh, and in TensorFlow of dropout.
            inference: prepare the model for decoding alone; see `GPTJForCausalLM.prepare_for_inference`.
            quantize: with `inference`, the precision of the weights.
            attn_implementation: "eager", or in PyTorch "sdpa".
            mesh: devices to cut the model across: a `gptj.sharding.Mesh`, or the framework's own with axes dp and tp.
                Each process then reads its own part alone.
            strategy: "tp" (for inference), "fsdp", "tp_fsdp" (for training) or "dp"; see `gptj.sharding`.
            _do_init: in Flax, False returns (model, params), the model without parameters of its own.
            overrides: config fields to change, such as num_labels; revision, cache_dir, token, local_files_only,
                force_download and variant; see `gptj.pretrained.prepare`.

        Raises:
            GPTJError: see `gptj.pretrained.prepare`.
            InputError: an argument that another framework alone has; in Flax, float64 while jax has it switched off.
        """
        check_inference(cls.head, inference, quantize, is_cut=mesh is not None or strategy is not None)
        _check_parameters_apart(cls, _do_init, inference)
        computed, kept = cls._dtypes_of(dtype, param_dtype=param_dtype, torch_dtype=torch_dtype)
        loading = prepare(
            cls.head,
            directory,
            config=config,
            dtype=kept,
            device_map=device_map,
            weights=weights,
            subfolder=subfolder,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            verify=verify,
            seed=seed,
            overrides=overrides | cls._foreign(attn_implementation=attn_implementation),
        )
        with cls._on_device(loading.place):
            model = cls._without_values(loading, dtype=computed, attn_implementation=attn_implementation)
            if mesh is None and strategy is None:
                model._fill(loading.arrays(mmap=mmap), inference=inference, quantize=quantize)
            else:
                placement = place_model(cls, loading.config, mesh, strategy, device_map=device_map)
                model._distribute(loading.read_part, placement)
        model.name_or_path = loading.config.name_or_path
        if isinstance(model, Generates):
            model.generation_config = loading.generation_config
        returned = (model,) if _do_init else model._take_apart()
        if output_loading_info:
            returned += (loading.info,)
        return returned if len(returned) > 1 else model

    @path_called("save_directory")
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

        The weights are the base's: adapters have `save_adapter`, and `merge_adapter` makes them part of the model.

        Args:
            directory: the folder, which is made; files and folders there that are no model's stay as they are.
            is_main_process: False writes nothing: of several processes, one writes.
            state_dict: the framework's arrays by the schema's names, to write in place of the model's own, as
                Accelerate gathers them.
            max_shard_bytes: of a weights file, in bytes or as "5GB"; max_shard_size is the same.
            overwrite: replace the model that the folder holds.
            others: what transformers' method has besides; see `gptj.pretrained.saving_options`.

        Raises:
            WriteError: the folder holds a model already and `overwrite` is False, or it cannot be written.
            InputError: an option that cannot be had.
            SchemaError: `state_dict` lacks a row, or has one of another shape.
        """
        self._refuse_prepared("save_pretrained")
        directory, options = require_path(directory), saving_options(max_shard_bytes, others)
        if not is_main_process and not (self.placement is not None and (state_dict is None or self.parameters_apart)):
            return directory
        self._say_left(directory)
        if state_dict is None:
            self._require_values("save_pretrained")
            dtype = self._parameter_dtype()
        else:
            check_rows(self.config, self.head, {k: tuple(v.shape) for k, v in state_dict.items()})
            dtype = next(iter(state_dict.values())).dtype
        given = None if state_dict is None else (lambda row: self._to_numpy(state_dict[row.name]))
        read = (lambda row: self._read(row.name)) if given is None else given
        facts = {"dtype": dtype_name(dtype), "max_shard_bytes": options, "overwrite": overwrite}
        return write_model(self, directory, read, **facts)

    # ---- states

    def _refuse_prepared(self, act: str) -> None:
        """Refuse what needs the parameters as the file has them, by name, once `prepare_for_inference` was called."""
        if self._is_prepared:
            raise refusal(act)

    def _refuse_cut(self, act: str) -> None:
        """Refuse what needs the whole model, by name, where this process holds a part of it.

        Raises:
            InputError: with the way.
        """
        if self.placement is not None:
            adapters = "gptj adapter merge DIR ADAPTER OUT" if "adapter" in act else "open it whole, change it, save it"
            hint = f"Do it before: {adapters}, then open that on the mesh"
            raise InputError("this process holds a part of the model alone", where=act, hint=hint)

    def _require_values(self, act: str) -> None:
        """Refuse what needs values, by name, where the model was made with `_do_init=False` and given none."""
        if not self._has_values():
            hint = "Use from_pretrained, or make the model without _do_init=False"
            raise InputError("the model was made without parameters", where=act, hint=hint)

    # ---- hooks: how a framework does it

    @classmethod
    def _dtypes_of(cls, dtype: Any, **parameter_dtypes: Any) -> tuple[Any, Any]:
        """The dtype to compute in, None for the parameters' own, and the one to load them in, or "auto"."""
        return None, one_dtype(dtype=dtype, **parameter_dtypes)

    @classmethod
    def _foreign(cls, **arguments: Any) -> dict[str, Any]:
        """Those of the arguments that the wing does not have, for `take_foreign_arguments` to judge."""
        return arguments

    @classmethod
    def _on_device(cls, place: str | None) -> AbstractContextManager[Any]:
        """A context in which a model is made on the device of a `Loading.place`; for None, the framework chooses.

        Raises:
            InputError: there is no such device.
        """
        raise NotImplementedError

    @classmethod
    def _without_values(cls, loading: Loading, *, dtype: Any, attn_implementation: str | None) -> Any:
        """A model of the load's config whose parameters are still to be assigned."""
        raise NotImplementedError

    def _fill(
        self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]], *, inference: bool, quantize: str | None
    ) -> None:
        """Assign the parameters of a model without values, and with `inference` prepare it."""
        model: Any = self
        self._assign(arrays)
        if inference:
            model.prepare_for_inference(quantize=quantize)

    @classmethod
    def _choose_placement(cls, mesh: Any, strategy: Strategy) -> Placement:
        """This process' place among the devices of `mesh`; None means all that there are.

        Raises:
            InputError: no such devices, or processes that know nothing of each other.
        """
        raise NotImplementedError

    def _distribute(self, read_part: ReadPart, placement: Placement) -> None:
        """Cut a model without values as `placement` says, and read this process' parts."""
        raise NotImplementedError

    def _take_apart(self) -> tuple[Any, Any]:
        """The model without parameters of its own, and the parameters; where `parameters_apart`."""
        raise NotImplementedError

    def _assign(self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]]) -> None:
        """Make each array the parameter that its row names; rows that are not given stay as they are."""
        raise NotImplementedError

    def _read(self, name: str) -> NDArray[Any]:
        """The parameter of a row of the schema, in NumPy, to be read only."""
        raise NotImplementedError

    def _to_numpy(self, array: Any) -> NDArray[Any]:
        """An array of the framework's in NumPy."""
        raise NotImplementedError

    def _has_values(self) -> bool:
        """Whether the parameters have values."""
        raise NotImplementedError

    def _list_arrays(self) -> Iterator[ArrayFacts]:
        """The parameters, each once, or what a prepared model has in their place."""
        raise NotImplementedError

    def _buffer_bytes(self) -> int:
        """Bytes of the rotary table, 0 where the framework holds none."""
        raise NotImplementedError

    def _parameter_dtype(self) -> Any:
        """The dtype that the parameters are kept in."""
        raise NotImplementedError

    def _initial_dtype(self, dtype: Any) -> str:
        """The name of the dtype of parameters that start afresh; `dtype` as `initialise` was given it."""
        return dtype_name(dtype)

    def _set_recomputation(self, on: bool) -> None:
        self.base_model.gradient_checkpointing = on

    def _shape_of(self, embeddings: Any) -> tuple[int, ...]:
        """The shape of the matrix in an embedding or an lm_head."""
        return tuple(embeddings.weight.shape)

    def _use_input_embeddings(self, embeddings: Any) -> None:
        raise NotImplementedError

    def _use_output_embeddings(self, embeddings: Any) -> None:
        raise NotImplementedError

    def _note_vocabulary(self, size: int) -> None:
        """Tell the framework's own layers how many tokens they now have, where they keep count."""


def _check_parameters_apart(cls: type[Pretrained], do_init: bool, inference: bool) -> None:
    """Refuse `_do_init=False` where parameters are a part of the model."""
    if do_init:
        return
    if not cls.parameters_apart:
        hint = "Leave it out, or use gptj.flax"
        raise InputError("the parameters are a part of the model here", where="_do_init", found=False, hint=hint)
    if inference:
        raise InputError("a prepared model has parameters of its own", where="_do_init", found=False)
