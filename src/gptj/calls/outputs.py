"""Outputs of a model call, the same classes in all three wings, and the KV cache that it hands on.

An output can be used as an object (`out.logits`), as a mapping of the fields that are there (`out["logits"]`,
`out.keys()`), and as the tuple that `return_dict=False` gives (`out[0]`, `out.to_tuple()`); the class names and
field orders are transformers'. The arrays inside are the framework's own. Each wing registers these classes
with its framework's trees, so they pass through jit, vmap, export and distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

from gptj.errors import InputError
from gptj.errors.brief import brief, brief_fields, html_table

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "KVCache",
    "ModelOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutputWithPast",
    "object_or_tuple",
]


Array = TypeVar("Array")
"""The framework's own arrays: torch.Tensor, tf.Tensor or jax.Array."""

Output = TypeVar("Output", bound="ModelOutput")


@dataclasses.dataclass(eq=False, repr=False)
class ModelOutput:
    """The base: fields by attribute, by name and by place; absent (None) fields have neither name nor place."""

    def keys(self) -> tuple[str, ...]:
        """The names of the fields that are there, in order."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in order: what `return_dict=False` returns."""
        return tuple(getattr(self, name) for name in self.keys())

    def values(self) -> tuple[Any, ...]:
        """The same as `to_tuple`."""
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Pairs of name and value of the fields that are there."""
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name, or `default` where it is not there."""
        value = getattr(self, key, None) if key in self.keys() else None
        return default if value is None else value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __repr__(self) -> str:
        return brief_fields(self, self.keys())

    def _repr_html_(self) -> str:
        """The fields that are there, for a notebook."""
        rows = [(name, brief(value)) for name, value in self.items()]
        return html_table(type(self).__name__, rows, ("field", "value"))

    # TensorFlow's protocol for dataclasses as trees (tf.nest): it looks for these two names.
    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, ...]]:
        return (), tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, ...]) -> ModelOutput:
        return cls(*components)


@dataclasses.dataclass(eq=False, repr=False)
class BaseModelOutputWithPast(ModelOutput, Generic[Array]):
    """The output of GPTJModel.

    Attributes:
        last_hidden_state: (b, t, m), after ln_f.
        past_key_values: the `KVCache`, where use_cache was asked.
        hidden_states: n_layer + 1 arrays (b, t, m): the embeddings, then each block's result, the last after ln_f.
        attentions: n_layer arrays (b, h, t, s): the weights after softmax, dropout and head_mask.
    """

    last_hidden_state: Array = None  # type: ignore[assignment]
    past_key_values: KVCache[Array] | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclasses.dataclass(eq=False, repr=False)
class CausalLMOutputWithPast(ModelOutput, Generic[Array]):
    """The output of GPTJForCausalLM.

    Attributes:
        loss: a scalar, float32 at least, where labels were given.
        logits: (b, t, v), float32 at least.
        past_key_values, hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: Array | None = None
    logits: Array = None  # type: ignore[assignment]
    past_key_values: KVCache[Array] | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclasses.dataclass(eq=False, repr=False)
class SequenceClassifierOutputWithPast(ModelOutput, Generic[Array]):
    """The output of GPTJForSequenceClassification.

    Attributes:
        loss: a scalar, float32 at least, where labels were given.
        logits: (b, num_labels), float32 at least.
        past_key_values, hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: Array | None = None
    logits: Array = None  # type: ignore[assignment]
    past_key_values: KVCache[Array] | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclasses.dataclass(eq=False, repr=False)
class QuestionAnsweringModelOutput(ModelOutput, Generic[Array]):
    """The output of GPTJForQuestionAnswering.

    Attributes:
        loss: a scalar, float32 at least, where both positions were given.
        start_logits, end_logits: (b, t), float32 at least.
        hidden_states, attentions: as in `BaseModelOutputWithPast`.
    """

    loss: Array | None = None
    start_logits: Array = None  # type: ignore[assignment]
    end_logits: Array = None  # type: ignore[assignment]
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


def object_or_tuple(output: Output, return_dict: bool | None, *, default: bool) -> Output | tuple[Any, ...]:
    """The output itself, or the tuple of its fields where `return_dict`, or `default` if that is None, is False."""
    return output if (default if return_dict is None else return_dict) else output.to_tuple()


@dataclasses.dataclass(eq=False, repr=False)
class KVCache(Generic[Array]):
    """The rotated keys and the values of the tokens seen so far, a pair a layer.

    Two kinds share one class. A model call makes one that is exactly as long as its tokens (`fixed` False): each
    further call returns a new, longer one and leaves the old as it was. `model.init_cache(batch, capacity)` makes
    one of a fixed capacity that is written at `length`; a call that does not fit raises.

    Attributes:
        keys, values: n_layer arrays each, (b, h, capacity, d).
        length: how many slots are filled; the next token goes to slot `length`.
        fixed: whether the capacity is preallocated.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Any
    fixed: bool = False

    @property
    def capacity(self) -> int:
        """Slots that there are."""
        keys: Any = self.keys[0]
        return int(keys.shape[2])

    def __repr__(self) -> str:
        kind = f"{brief(self.length)} of {self.capacity} tokens" if self.fixed and self.keys else "growing"
        return f"KVCache({len(self)} layers, keys and values {brief(self.keys[0]) if self.keys else '-'}, {kind})"

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Array, Array]:
        """The layer's filled keys and values, each (b, h, length, d)."""
        if not self.fixed:
            return self.keys[layer], self.values[layer]
        keys, values = cast(Any, self.keys[layer]), cast(Any, self.values[layer])
        return keys[:, :, : self.length], values[:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return (self[layer] for layer in range(len(self)))

    def filled(self) -> KVCache[Array]:
        """The filled slots alone, as a cache that grows."""
        keys, values = zip(*self, strict=True)
        return KVCache(keys, values, int(self.length))

    @classmethod
    def of(cls, past: Any, n_layer: int) -> KVCache[Any] | None:
        """`past` as a KVCache: one already, None, or transformers' older tuple of (key, value) pairs.

        Raises:
            InputError: it has another number of layers, or is neither.
        """
        if past is None:
            return None
        if isinstance(past, cls):
            cache = past
        else:
            if not (isinstance(past, tuple | list) and all(isinstance(p, tuple | list) and len(p) == 2 for p in past)):
                raise InputError(
                    "not a cache",
                    where="past_key_values",
                    expected="what a call with use_cache=True returned, or init_cache made",
                    found=type(past).__name__,
                )
            keys, values = zip(*past, strict=True) if past else ((), ())
            cache = cls(tuple(keys), tuple(values), int(keys[0].shape[2]) if keys else 0)
        if len(cache) != n_layer:
            raise InputError(
                "a cache of another model", where="past_key_values", expected=f"{n_layer} layers", found=len(cache)
            )
        return cache

    def __tf_flatten__(self) -> tuple[tuple[bool], tuple[Any, ...]]:
        return (self.fixed,), (self.keys, self.values, self.length)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[bool], components: tuple[Any, ...]) -> KVCache[Any]:
        keys, values, length = components
        return cls(keys, values, length, *metadata)
