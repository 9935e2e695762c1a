"""A trace's tensors that are no taps: the gradient of every parameter, and the texts that were generated.

grad.<parameter>        of the parameter's shape, under its name in the schema: the gradient of the tap `loss`
step.sgd.<parameter>    of the parameter's shape: it after a step of SGD from that gradient; `gptj.parity.steps`
step.adamw.<parameter>  of the parameter's shape: it after two steps of AdamW
generated.prompt_ids    (prompts, l), whole numbers
generated.prompt_mask   (prompts, l), whole numbers
generated.token_ids     (prompts, n): the tokens that were chosen, greedily
generated.top_ids       (prompts, n, 2): the two tokens of the largest logits at each step, the larger first
generated.top_logits    (prompts, n, 2): those logits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gptj.config import GPTJConfig
from gptj.config.schema import schema
from gptj.errors import SchemaError, did_you_mean, shown
from gptj.reading.safetensors_file import WEIGHT_DTYPES, StoredTensor

__all__ = ["GENERATED", "Extras", "examine_extras"]

GENERATED = {"prompt_ids": "pl", "prompt_mask": "pl", "token_ids": "pn", "top_ids": "pn2", "top_logits": "pn2"}
"""Tensors of the texts, all of them or none, with their axes: p prompts, l tokens of a prompt, n new tokens."""

_WHOLE = ("int64", "int32", "uint8", "bool")


@dataclasses.dataclass(frozen=True)
class Extras:
    """A trace's tensors beside its taps.

    Attributes:
        gradients: by their parameters' names.
        steps: by their optimizers' and parameters' names, "sgd.lm_head.bias"; each beside its gradient.
        generated: by the names of `GENERATED`; empty where nothing was generated.
    """

    gradients: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    generated: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.gradients or self.generated or self.steps)


def examine_extras(config: GPTJConfig, tensors: Mapping[str, StoredTensor]) -> tuple[Extras, list[StoredTensor]]:
    """The extras among a file's tensors, each checked, and the tensors that are none.

    Raises:
        SchemaError: a name is no parameter's, or a shape or dtype is another.
    """
    shapes = {row.name: row.shape for row in schema(config)}
    gradients: dict[str, StoredTensor] = {}
    generated: dict[str, StoredTensor] = {}
    steps: dict[str, StoredTensor] = {}
    others: list[StoredTensor] = []
    for name, tensor in tensors.items():
        kind, _, inner = name.partition(".")
        if kind == "grad":
            _require_parameter(tensor, inner, shapes)
            gradients[inner] = tensor
        elif kind == "step":
            _require_step(tensor, inner, shapes)
            steps[inner] = tensor
        elif kind == "generated":
            if inner not in GENERATED:
                hint = did_you_mean(inner, list(GENERATED))
                raise SchemaError("no tensor of a text", where=shown(name), expected=", ".join(GENERATED), hint=hint)
            generated[inner] = tensor
        else:
            others.append(tensor)
    if generated:
        _require_texts(generated)
    if lone := [name for name in steps if name.partition(".")[2] not in gradients]:
        raise SchemaError("is missing", where=f"grad.{lone[0].partition('.')[2]}",
                          expected=f"the gradient beside step.{lone[0]}")  # fmt: skip
    return Extras(gradients, generated, steps), others


OPTIMIZERS = ("sgd", "adamw")


def _require_step(tensor: StoredTensor, inner: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    optimizer, _, parameter = inner.partition(".")
    if optimizer not in OPTIMIZERS:
        raise SchemaError("no optimizer's step", where=shown(tensor.name), expected=" or ".join(OPTIMIZERS),
                          hint=did_you_mean(optimizer, OPTIMIZERS))  # fmt: skip
    _require_parameter(tensor, parameter, shapes)


def _require_parameter(tensor: StoredTensor, inner: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if inner not in shapes:
        hint = did_you_mean(inner, list(shapes))
        raise SchemaError("no parameter of the config's model", where=shown(tensor.name), hint=hint)
    if tuple(tensor.shape) != tuple(shapes[inner]):
        raise SchemaError("of another shape", where=shown(tensor.name), expected=list(shapes[inner]),
                          found=list(tensor.shape))  # fmt: skip
    if tensor.dtype not in WEIGHT_DTYPES:
        raise SchemaError("of another dtype", where=shown(tensor.name), expected=" or ".join(WEIGHT_DTYPES),
                          found=tensor.dtype)  # fmt: skip


def _require_texts(generated: Mapping[str, StoredTensor]) -> None:
    """Make sure that all tensors of the texts are there, with shapes that fit each other."""
    sizes = {"2": 2}
    for name, axes in GENERATED.items():
        tensor, where = generated.get(name), f"generated.{name}"
        if tensor is None:
            raise SchemaError("is missing", where=where, expected="all of generated, or none")
        dtypes = WEIGHT_DTYPES if name == "top_logits" else _WHOLE
        if tensor.dtype not in dtypes:
            raise SchemaError("of another dtype", where=where, expected=" or ".join(dtypes), found=tensor.dtype)
        known = [sizes.get(axis, "?") for axis in axes]
        if 0 in tensor.shape:
            raise SchemaError("holds nothing", where=where, found=list(tensor.shape))
        fits = len(tensor.shape) == len(axes) and all(
            sizes.setdefault(axis, length) == length for axis, length in zip(axes, tensor.shape, strict=False)
        )
        if not fits:
            raise SchemaError("of another shape", where=where, expected=f"{' '.join(axes)} = {known}",
                              found=list(tensor.shape))  # fmt: skip
