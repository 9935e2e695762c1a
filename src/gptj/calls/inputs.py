"""The checks of a model call's arguments, done on the host, once, before any backend computes.

A token id that the embedding does not have is an error in one framework, a clamp in another and NaN in the
third; so the same NumPy code looks at the values first and all three wings raise the same `InputError`. A wing
turns its arrays into NumPy for this and passes None for a value that has none yet (inside jit, tf.function,
torch.compile or export), which is then not checked here. `prepared.py` has the calls that a prepared model refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.labels import IGNORED_LABEL
from gptj.errors import InputError, shown

__all__ = [
    "IGNORED_LABEL",
    "check_attention_mask",
    "check_both_ends",
    "check_cache_room",
    "check_cache_size",
    "check_call",
    "check_class_labels",
    "check_embeddings",
    "check_embeds",
    "check_functions",
    "check_head_mask",
    "check_ids",
    "check_labels",
    "check_length",
    "check_method",
    "check_places",
    "check_positions",
    "check_row",
    "check_row_ends",
    "integers",
    "numbers",
    "output_flags",
    "part_of_a_model",
    "problem_type",
]


def numbers(value: Any, *, where: str) -> NDArray[Any]:
    """`value`, an array or nested lists, as a NumPy array of numbers or bools.

    Raises:
        InputError: ragged lists, or anything but numbers.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError("rows of different lengths", where=where, hint="Pad them and pass an attention_mask") from None
    if array.dtype.kind in "Of" and isinstance(value, list | tuple):  # what NumPy makes of integers that do not fit
        _refuse_beyond_64_bits(value, where=where)
    if array.dtype.kind not in "iubf" and array.dtype != ml_dtypes.bfloat16:
        raise InputError("not numbers", where=where, expected="an array of numbers", found=str(array.dtype))
    return array


def _refuse_beyond_64_bits(values: Sequence[Any], *, where: str) -> None:
    for place, value in enumerate(values):
        if isinstance(value, list | tuple):
            _refuse_beyond_64_bits(value, where=f"{where}[{place}]")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            found = shown(value, longest=40)
            raise InputError("beyond 64 bits", where=f"{where}[{place}]", expected="a smaller number", found=found)


def integers(value: Any, *, where: str) -> NDArray[Any]:
    """`value` as a NumPy array of whole numbers, (b, t), neither axis empty.

    Raises:
        InputError: floats, bools, ragged lists, another number of axes, or an empty axis.
    """
    array = numbers(value, where=where)
    if array.dtype.kind not in "iu":
        raise InputError("not whole numbers", where=where, expected="an integer array", found=str(array.dtype))
    if array.ndim != 2 or 0 in array.shape:
        raise InputError("of another shape", where=where, expected="(batch, tokens), neither 0", found=array.shape)
    return array


def check_row(token_ids: Any, *, where: str = "token_ids") -> list[Any]:
    """One row of token ids as a list, whatever they are; refuses what has no items."""
    try:
        if not isinstance(token_ids, str | bytes | Mapping):
            return list(token_ids)
    except TypeError:
        pass
    raise InputError("not a row of token ids", where=where, expected="[id, ...]", found=shown(token_ids))


def check_functions(value: Any, *, where: str) -> tuple[Callable[..., Any], ...]:
    """`value`, a list of functions or None for none, as a tuple."""
    functions = () if value is None else value
    if isinstance(functions, list | tuple) and all(callable(one) for one in functions):
        return tuple(functions)
    raise InputError("not a list of functions", where=where, expected="[function, ...]", found=shown(value))


def check_method(value: Any, *methods: str, where: str) -> None:
    """Refuse an object without these methods, where it is not None."""
    lacking = [method for method in methods if not callable(getattr(value, method, None))]
    if value is not None and lacking:
        expected = "an object with " + " and ".join(f"{method}()" for method in methods)
        raise InputError("cannot be used", where=where, expected=expected, found=shown(value))


def _refuse_first(wrong: NDArray[np.bool_], array: NDArray[Any], *, where: str, problem: str, expected: str) -> None:
    """Raise for the first True of `wrong`, naming the value and its place."""
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        index = "".join(f"[{i}]" for i in place)
        raise InputError(problem, where=f"{where}{index}", expected=expected, found=array[place].item())


def check_ids(config: GPTJConfig, ids: Any, *, where: str = "input_ids") -> NDArray[Any]:
    """`ids` as whole numbers (b, t) that the embedding has: 0 to vocab_size - 1."""
    array = integers(ids, where=where)
    _refuse_first(
        (array < 0) | (array >= config.vocab_size),
        array,
        where=where,
        problem="no such token",
        expected=f"0 to {config.vocab_size - 1}",
    )
    return array


def check_positions(config: GPTJConfig, positions: Any, batch: int, length: int) -> NDArray[Any]:
    """`positions` as whole numbers (b, t) or (1, t), 0 to n_positions - 1."""
    array = integers(positions, where="position_ids")
    if array.shape not in ((batch, length), (1, length)):
        raise InputError("of another shape", where="position_ids", expected=(batch, length), found=array.shape)
    _refuse_first(
        (array < 0) | (array >= config.n_positions),
        array,
        where="position_ids",
        problem="no such position",
        expected=f"0 to n_positions - 1 = {config.n_positions - 1}",
    )
    return array


def check_length(config: GPTJConfig, past: int, length: int) -> None:
    """Refuse a sequence that runs past n_positions when its positions are counted from the start."""
    if past + length > config.n_positions:
        raise InputError(
            "longer than the model's positions",
            where="input_ids",
            expected=f"at most n_positions = {config.n_positions} tokens",
            found=f"{past} cached + {length} new" if past else length,
        )


def check_attention_mask(mask: Any, batch: int, lengths: tuple[int, ...]) -> NDArray[Any]:
    """`mask` as 0 and 1, (b, s) with s one of `lengths`: 1 In, 0 Out. A row of zeros attends to nothing.

    Whole numbers, bools and floats will do, as long as each is 0 or 1 exactly.
    """
    array = numbers(mask, where="attention_mask")
    if array.ndim != 2 or array.shape[0] != batch or array.shape[1] not in lengths:
        expected = " or ".join(str((batch, s)) for s in dict.fromkeys(lengths))
        raise InputError("of another shape", where="attention_mask", expected=expected, found=array.shape)
    if array.dtype.kind != "b":
        _refuse_first(
            (array != 0) & (array != 1), array, where="attention_mask", problem="not a mask", expected="0 or 1"
        )
    return array


def check_embeds(config: GPTJConfig, shape: tuple[int, ...]) -> tuple[int, int]:
    """The batch and the length of inputs_embeds of this shape; (b, t, n_embd), neither 0, or it is refused."""
    if len(shape) != 3 or shape[2] != config.n_embd or 0 in shape:
        expected = f"(batch, tokens, {config.n_embd})"
        raise InputError("of another shape", where="inputs_embeds", expected=expected, found=shape)
    return shape[0], shape[1]


def check_head_mask(config: GPTJConfig, shape: tuple[int, ...]) -> None:
    """Refuse a head_mask of another shape than (n_head,) or (n_layer, n_head)."""
    if tuple(shape) not in ((config.n_head,), (config.n_layer, config.n_head)):
        expected = f"({config.n_head},) or ({config.n_layer}, {config.n_head})"
        raise InputError("of another shape", where="head_mask", expected=expected, found=tuple(shape))


def check_labels(labels: Any, shape: tuple[int, int], classes: int) -> NDArray[Any]:
    """`labels` as whole numbers of this shape, each -100 (ignored) or 0 to `classes` - 1."""
    array = integers(labels, where="labels")
    if array.shape != shape:
        raise InputError("of another shape", where="labels", expected=shape, found=array.shape)
    _refuse_first(
        (array != IGNORED_LABEL) & ((array < 0) | (array >= classes)),
        array,
        where="labels",
        problem="no such class",
        expected=f"{IGNORED_LABEL} or 0 to {classes - 1}",
    )
    return array


def check_row_ends(config: GPTJConfig, *, batch: int | None, has_ids: bool) -> None:
    """Refuse to guess where several rows end: token ids without a pad_token_id to tell padding by."""
    if has_ids and config.pad_token_id is None and batch != 1:
        raise InputError(
            "cannot tell where each row ends",
            where="config.pad_token_id",
            expected="a token id, for more than one row",
            found="null",
            hint="Load with pad_token_id=..., or pass one row at a time",
        )


def problem_type(config: GPTJConfig, *, whole: bool) -> str:
    """The loss of a classifier: the config's, else by num_labels and by whether the labels are whole numbers."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "single_label_classification" if whole else "multi_label_classification"


def check_class_labels(
    config: GPTJConfig, problem: str, labels: NDArray[Any] | None, shape: tuple[int, ...], batch: int
) -> None:
    """Refuse labels that do not fit the problem: their shape, and where `labels` is not None their values."""
    classes = config.num_labels
    assert classes is not None
    single = problem == "single_label_classification"
    allowed: tuple[tuple[int, ...], ...] = ((batch,), (batch, 1)) if single else ((batch, classes),)
    if batch == 1 and single:
        allowed += ((),)
    if problem == "regression" and classes == 1:
        allowed += ((batch,),)
    if tuple(shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise InputError(f"of another shape for {problem}", where="labels", expected=expected, found=tuple(shape))
    if labels is None:
        return
    if single:
        if labels.dtype.kind not in "iu":
            raise InputError("not whole numbers", where="labels", expected="class ids", found=str(labels.dtype))
        check_labels(labels.reshape(batch, 1), (batch, 1), classes)
    elif problem == "multi_label_classification":
        numbers = labels.astype(np.float64)
        wrong = ~((numbers >= 0) & (numbers <= 1))
        _refuse_first(wrong, numbers, where="labels", problem="not a probability", expected="0 to 1")


def check_both_ends(start_positions: Any, end_positions: Any) -> None:
    """Refuse one of start_positions and end_positions without the other."""
    if (start_positions is None) != (end_positions is None):
        given, lacking = (
            ("start_positions", "end_positions") if end_positions is None else ("end_positions", "start_positions")
        )
        raise InputError(f"given without {lacking}", where=given, hint="Give both for a loss, or neither")


def check_places(places: NDArray[Any] | None, shape: tuple[int, ...], batch: int, *, where: str) -> None:
    """Refuse answer positions that are not whole numbers (b,) or (b, 1)."""
    if tuple(shape) not in ((batch,), (batch, 1)):
        raise InputError("of another shape", where=where, expected=(batch,), found=tuple(shape))
    if places is not None and places.dtype.kind not in "iu":
        raise InputError("not whole numbers", where=where, expected="token positions", found=str(places.dtype))


def check_cache_room(length: int, new: int, capacity: int) -> None:
    """Refuse tokens that a fixed cache has no slots for."""
    if length + new > capacity:
        raise InputError(
            "the cache is full",
            where="past_key_values",
            expected=f"room for {new} more tokens",
            found=f"{length} of {capacity} slots taken",
            hint="Make a larger one: init_cache(batch, max_length)",
        )


def check_embeddings(config: GPTJConfig, shape: tuple[int, ...]) -> None:
    """Refuse a token embedding of another shape than (vocab_size, n_embd)."""
    if shape != (config.vocab_size, config.n_embd):
        expected = (config.vocab_size, config.n_embd)
        raise InputError("of another shape", where="embeddings", expected=expected, found=shape, hint="Resize first")


def part_of_a_model(act: str) -> InputError:
    """The error of an act on a model's `base_model` that would leave the model's head as it was."""
    return InputError("this model is a part of another, whose head must follow", where=act, hint=f"Call model.{act}")


def check_cache_size(config: GPTJConfig, batch: int, capacity: int) -> None:
    """Refuse a cache of no rows, of no slots, or of more slots than there are positions."""
    for where, value, highest in (("batch_size", batch, None), ("max_length", capacity, config.n_positions)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 1 or (highest is not None and value > highest):
            rule = "1 or above" if highest is None else f"1 to n_positions = {highest}"
            raise InputError("no such cache", where=where, expected=rule, found=value)


def output_flags(
    config: GPTJConfig, use_cache: bool | None, output_attentions: bool | None, output_hidden_states: bool | None
) -> tuple[bool, bool, bool]:
    """The three flags that say what a call returns, each the config's where it is None."""
    return (
        bool(config.use_cache if use_cache is None else use_cache),
        bool(config.output_attentions if output_attentions is None else output_attentions),
        bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
    )


def check_call(
    config: GPTJConfig,
    host: Callable[[Any], Any],
    *,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    head_mask: Any = None,
    past: Any = None,
) -> None:
    """Check every argument of a forward pass together.

    Args:
        config: the model's.
        host: turns the framework's array into NumPy, or into None where it has no value yet.
        past: the call's `KVCache`, or None.
        input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, head_mask: as the call got them.

    Raises:
        InputError: naming the argument, the first offending value and its place.
    """
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise InputError("give exactly one of them", where="input_ids, inputs_embeds", found=found)
    if input_ids is not None:
        ids = host(input_ids)
        if ids is None:
            return
        batch, length = check_ids(config, ids).shape
    else:
        shape = tuple(inputs_embeds.shape)
        if None in shape:
            return
        batch, length = check_embeds(config, shape)
    if token_type_ids is not None and (types := host(token_type_ids)) is not None:
        check_ids(config, types, where="token_type_ids")
        if types.shape != (batch, length):
            raise InputError("of another shape", where="token_type_ids", expected=(batch, length), found=types.shape)
    if head_mask is not None:
        check_head_mask(config, tuple(head_mask.shape))
    seen = 0 if past is None else host(past.length)
    if seen is None:
        return
    seen = int(seen)
    if past is not None:
        if past.keys[0].shape[0] != batch:
            raise InputError(
                "a cache of another batch", where="past_key_values", expected=batch, found=past.keys[0].shape[0]
            )
        if past.fixed:
            check_cache_room(seen, length, past.capacity)
    if position_ids is None:
        check_length(config, seen, length)
    elif (positions := host(position_ids)) is not None:
        check_positions(config, positions, batch, length)
    if attention_mask is not None and (mask := host(attention_mask)) is not None:
        lengths = (seen + length, past.capacity) if past is not None and past.fixed else (seen + length,)
        check_attention_mask(mask, batch, lengths)
