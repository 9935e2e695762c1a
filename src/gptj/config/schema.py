"""The table: every tensor of a GPT-J, by named axes. Shapes, order, counts and shardings derive from it.

The names and the layout (output axis first) are Hugging Face's, and they are also the parameter names and the
layout of all three backends; so moving weights is the identity, never a rename or a transpose. A row that is
not here does not exist: the readers refuse a tensor that no row names. Beside it lie the other data that all three
backends share: start values in `initial.py`, the sines and cosines of positions in `rotary.py`.

>>> from gptj import GPTJConfig
>>> rows = schema(GPTJConfig())
>>> len(rows), sum(row.size for row in rows)
(285, 6050882784)
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gptj.config import GPTJConfig

__all__ = ["BASE_PREFIX", "HEADS", "Head", "TensorSpec", "is_old_buffer", "schema", "schema_by_name"]

Head = Literal["base", "causal_lm", "sequence_classification", "question_answering"]
"""The part on top of the blocks: the model class, as the schema sees it."""

HEADS: dict[Head, str] = {
    "base": "GPTJModel",
    "causal_lm": "GPTJForCausalLM",
    "sequence_classification": "GPTJForSequenceClassification",
    "question_answering": "GPTJForQuestionAnswering",
}
"""The class that each head makes, the same name in every wing."""

BASE_PREFIX = "transformer."
"""The prefix of the base model's names inside a model that has a head; GPTJModel's own have no prefix."""

Kind = Literal["embedding", "kernel", "bias", "scale", "offset", "adapter"]
Template = tuple[str, tuple[str, ...], Kind]

# name, axes, kind. `{i}` counts the blocks. The order is that of transformers' state_dict.
_EMBEDDING: tuple[Template, ...] = (("wte.weight", ("vocab", "embed"), "embedding"),)
_BLOCK: tuple[Template, ...] = (
    ("h.{i}.ln_1.weight", ("norm",), "scale"),
    ("h.{i}.ln_1.bias", ("norm",), "offset"),
    ("h.{i}.attn.k_proj.weight", ("heads", "embed"), "kernel"),
    ("h.{i}.attn.v_proj.weight", ("heads", "embed"), "kernel"),
    ("h.{i}.attn.q_proj.weight", ("heads", "embed"), "kernel"),
    ("h.{i}.attn.out_proj.weight", ("embed", "heads"), "kernel"),
    ("h.{i}.mlp.fc_in.weight", ("mlp", "embed"), "kernel"),
    ("h.{i}.mlp.fc_in.bias", ("mlp",), "bias"),
    ("h.{i}.mlp.fc_out.weight", ("embed", "mlp"), "kernel"),
    ("h.{i}.mlp.fc_out.bias", ("embed",), "bias"),
)
_FINAL_NORM: tuple[Template, ...] = (("ln_f.weight", ("norm",), "scale"), ("ln_f.bias", ("norm",), "offset"))
_HEAD: dict[str, tuple[Template, ...]] = {
    "base": (),
    "causal_lm": (("lm_head.weight", ("vocab", "embed"), "kernel"), ("lm_head.bias", ("vocab",), "bias")),
    "sequence_classification": (("score.weight", ("labels", "embed"), "kernel"),),
    "question_answering": (("qa_outputs.weight", ("span", "embed"), "kernel"), ("qa_outputs.bias", ("span",), "bias")),
}

SPLIT_AXES = ("vocab", "heads", "mlp")
"""The axes that tensor parallelism cuts; `heads` only between whole heads."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One row of the table, with its sizes filled in from a config.

    Attributes:
        name: the canonical name, `transformer.h.0.attn.q_proj.weight`.
        axes: the name of each axis: vocab, embed, heads (n_head * head_dim), mlp, norm, labels, span.
        shape: the size of each axis.
        kind: embedding, kernel (a matrix, output axis first), bias, scale or offset (of a layer norm), or adapter (half
            of an addition to a kernel: see `gptj.adapters`).
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def axis_sizes(config: GPTJConfig) -> dict[str, int]:
    """The size of every named axis."""
    assert config.num_labels is not None  # settled by the config's own check
    return {
        "vocab": config.vocab_size,
        "embed": config.n_embd,
        "heads": config.n_head * config.head_dim,
        "mlp": config.inner_width,
        "norm": config.n_embd,
        "labels": config.num_labels,
        "span": 2,
    }


def schema(config: GPTJConfig, head: Head = "causal_lm") -> tuple[TensorSpec, ...]:
    """Every tensor of a model with this head, in transformers' state_dict order.

    Names carry `transformer.` before the base model's rows, except for head "base", as in transformers.
    With `tie_word_embeddings` lm_head.weight is not a tensor of its own and its row is absent.
    """
    sizes = axis_sizes(config)
    prefix = "" if head == "base" else BASE_PREFIX
    base = [*_EMBEDDING]
    for i in range(config.n_layer):
        base += [(name.format(i=i), axes, kind) for name, axes, kind in _BLOCK]
    base += _FINAL_NORM
    top = [row for row in _HEAD[head] if not (config.tie_word_embeddings and row[0] == "lm_head.weight")]
    rows = [(prefix + name, axes, kind) for name, axes, kind in base] + top
    return tuple(TensorSpec(name, axes, tuple(sizes[axis] for axis in axes), kind) for name, axes, kind in rows)


def schema_by_name(config: GPTJConfig, head: Head = "causal_lm") -> dict[str, TensorSpec]:
    """`schema` as a dict, in the same order."""
    return {row.name: row for row in schema(config, head)}


def is_old_buffer(name: str) -> bool:
    """Whether `name` is a constant that old transformers stored beside the weights: dropped without harm.

    >>> is_old_buffer("transformer.h.0.attn.masked_bias"), is_old_buffer("transformer.h.0.mlp.fc_in.bias")
    (True, False)
    """
    parts = name.removeprefix(BASE_PREFIX).split(".")
    return (
        len(parts) == 4
        and parts[0] == "h"
        and parts[1].isdecimal()
        and parts[2] == "attn"
        and parts[3] in ("bias", "masked_bias", "embed_positions")
    )
