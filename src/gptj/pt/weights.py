"""Weights in and out of PyTorch: arrays to tensors and back, and the hooks that loading, saving and counting need.

Parameter names are the schema's, so loading is one assignment a row. A model is built on the meta device, which
holds no memory; then each parameter becomes a tensor over the mapped file itself, without a copy.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptj.calls.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    KVCache,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)
from gptj.calls.prepared import check_device
from gptj.config import GPTJConfig
from gptj.config.schema import Head, TensorSpec, schema, schema_by_name
from gptj.errors import LimitError
from gptj.pretrained import Loading, Pretrained
from gptj.pretrained.counted import ArrayFacts
from gptj.pt.adapters import AdapterMixin
from gptj.sharding import Placement, ReadPart, Strategy

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that a forked process does not share; Windows has no other."""


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


def zeros(count: int, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """So many tensors of zeros, none a view of another, of a tensor's dtype and in its place.

    On a host it is memory of their own from the system, cleared page for page as it is written: half a GB is there at
    once, where `new_zeros` takes 95 ms, and what nobody writes costs nothing.

    Raises:
        LimitError: the system has no room for them.
    """
    size = math.prod(shape)
    if not size or like.device.type != "cpu" or type(like) not in (Tensor, nn.Parameter):
        return [like.new_zeros(shape) for _ in range(count)]
    step = size * like.itemsize
    try:
        held = mmap.mmap(-1, count * step, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise LimitError("there is no memory for a cache", found=f"{count * step:,} bytes asked for") from error
    parts = (torch.frombuffer(held, dtype=like.dtype, count=size, offset=n * step) for n in range(count))
    return [part.view(shape).detach() for part in parts]


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


class PretrainedModel(AdapterMixin, Pretrained, nn.Module):
    """The hooks of `gptj.pretrained.Pretrained` in PyTorch, whose models are modules.

    Attributes:
        head: which rows of the schema the class has.
    """

    head: ClassVar[Head]
    _keys_to_ignore_on_save: ClassVar[None] = None

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config

    # Differs: transformers' Trainer and PEFT ask isinstance(model, PreTrainedModel) before they call what that class
    # and ours both have (save_pretrained, get_output_embeddings): without a yes, Trainer.save_model leaves weights
    # without a config, and PEFT's "all-linear" adapts lm_head. Where transformers is loaded, and there alone, the
    # answer is yes: Python asks an object's __class__ too. type(model) stays the class itself, which inherits nothing
    # of theirs, and what is made by way of __class__, or pickled, is of that class (`_also`, `__reduce_ex__`).
    __class__ = property(lambda self: _reported_class(self), lambda self, new: _set_class(self, new))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How it is copied and pickled: as what `type` says, since pickle would compare that with `__class__`."""
        self._refuse_prepared("a copy")
        return _unfilled, (type(self),), self.__getstate__()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype of the parameters: the same as `dtype`, which is also that of the computation."""
        return self.dtype

    # Differs: what trains adapters in PyTorch (PEFT, transformers' Trainer) asks for these two.
    def enable_input_require_grads(self) -> None:
        """Let the gradient reach what enters the blocks, though wte itself is not trained."""
        self._refuse_prepared("enable_input_require_grads")
        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`, where it was called."""
        if (hook := self.__dict__.pop("_require_grads_hook", None)) is not None:
            hook.remove()

    # ---- hooks

    @classmethod
    def _foreign(cls, **arguments: Any) -> dict[str, Any]:
        # Differs: attn_implementation is PyTorch's alone.
        return {}

    @classmethod
    def _on_device(cls, place: str | None) -> AbstractContextManager[Any]:
        device = _device(place)
        return contextlib.nullcontext() if device is None else device

    @classmethod
    def _without_values(cls, loading: Loading, *, dtype: Any, attn_implementation: str | None) -> Any:
        make: Any = cls
        return make(loading.config, attn_implementation=attn_implementation or "eager", _do_init=False)

    @classmethod
    def _choose_placement(cls, mesh: Any, strategy: Strategy) -> Placement:
        from gptj.pt.parallel import choose_placement  # torch.distributed's tensors take a second to import

        return choose_placement(mesh, strategy)

    def _distribute(self, read_part: ReadPart, placement: Placement) -> None:
        from gptj.pt.parallel import distribute

        rows = schema(self.config, self.head)
        distribute(self, ((row, from_numpy(read_part(row, placement.slices(row)))) for row in rows), placement)
        self.placement = self.base_model.placement = placement
        self.eval()

    def _fill(
        self, arrays: Iterable[tuple[TensorSpec, NDArray[Any]]], *, inference: bool, quantize: str | None
    ) -> None:
        model: Any = self
        if inference:
            model._assign_prepared(arrays, quantize)
        else:
            model._assign(arrays)
        model.eval()

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

    def _read(self, name: str) -> NDArray[Any]:
        if self.placement is None:
            return to_numpy(self.get_parameter(name))
        from gptj.pt.parallel import cut_again, whole

        cut_again(self)
        spec = schema_by_name(self.config, self.head)[name]
        return to_numpy(whole(self.get_parameter(name), spec, self.placement))

    def _to_numpy(self, array: Any) -> NDArray[Any]:
        return to_numpy(array)

    def _has_values(self) -> bool:
        return not any(parameter.is_meta for parameter in self.parameters())

    def _list_arrays(self) -> Iterator[ArrayFacts]:
        embedding = getattr(self.base_model.wte, "weight", None)
        for parameter in self.parameters():
            size, held = parameter.numel(), 0 if parameter.is_meta else parameter.nbytes
            yield ArrayFacts(size, held, parameter.requires_grad, parameter is embedding)
        # Differs: packed weights are no parameters.
        for module in self.modules() if self._is_prepared else ():
            for packed in vars(module).values():
                if isinstance(packed, Tensor):
                    yield ArrayFacts(packed.numel(), packed.nbytes, False)
                elif isinstance(packed, torch.ScriptObject):
                    whole = packed.unpack()[0]
                    yield ArrayFacts(whole.numel(), whole.nbytes, False)

    def _buffer_bytes(self) -> int:
        rotary = self.base_model.rotary
        return int(rotary.sin.nbytes + rotary.cos.nbytes)

    def _parameter_dtype(self) -> Any:
        return self.dtype

    def _use_input_embeddings(self, embeddings: Any) -> None:
        self.base_model.wte = embeddings
        self.tie_weights()

    def _use_output_embeddings(self, embeddings: Any) -> None:
        self.lm_head = embeddings
        self.tie_weights()

    def _note_vocabulary(self, size: int) -> None:
        self.base_model.wte.num_embeddings = size
        if (lm_head := self.get_output_embeddings()) is not None:
            lm_head.out_features = size


def _reported_class(model: Any) -> type:
    """The class that a model reports: where transformers is loaded, one that is a PreTrainedModel too."""
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
