"""How each foreign format spells each row of the schema: ONE table, read in both directions.

A reader asks the table which foreign arrays make a canonical tensor, a writer asks it which canonical tensor
makes a foreign array; so a reader and its writer cannot disagree. A foreign array's axes have the schema's
names. From them follows all the rest: an array whose axes are the schema's in reverse is transposed; an array
with an axis that tensor parallelism cuts (vocab, heads, mlp) is joined along it; what has none is a copy in
every shard, and how copies count is said in the row.

mesh-transformer-jax stores no names at all: a leaf is known by its place in the order of `jax.tree_flatten`,
which sorts module paths as strings. `mesh_leaves` makes that order by sorting the same strings, so layer 10
comes before layer 2 here for the reason that it does there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from gptj.config.schema import SPLIT_AXES
from gptj.reading.weight_names import Dialect

__all__ = ["MESH_MODULE", "ROWS", "Dialect", "ForeignArray", "MeshLeaf", "Row", "Spelling", "mesh_leaves", "spell"]

Copies = Literal["first", "sum", "sum onto every row"]
"""The meaning of copies of an uncut array in several shards.

    first               only shard 0's is used and trained; the others keep their start value
    sum                 every shard adds its own before the shards' results are added up
    sum onto every row  the same, and the sum belongs to every row of a matrix whose layer has no bias here
"""

MESH_MODULE = "causal_transformer_shard/~/"


@dataclasses.dataclass(frozen=True)
class ForeignArray:
    """One array of a foreign format.

    Attributes:
        module, name: the two keys of its path; `{i}` counts the blocks.
        axes: the names of its axes, in its own order.
        copies: what an uncut array's copies in several shards mean.
    """

    module: str
    name: str
    axes: tuple[str, ...]
    copies: Copies = "first"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the schema, and what each format stores for it.

    Attributes:
        tensor: the canonical name, without the prefix `transformer.`; `{i}` counts the blocks.
        axes: the canonical axes, the same as in the schema (a test holds them together).
        mesh: the leaves of a mesh-transformer-jax v1 shard that make it; none for heads that it has not.
        flax: the array in transformers' FlaxGPTJ tree, below `transformer` (heads: at the top).
        tf: the variable in transformers' TFGPTJ, the same.
    """

    tensor: str
    axes: tuple[str, ...]
    mesh: tuple[ForeignArray, ...]
    flax: ForeignArray
    tf: ForeignArray


def _embedding(tensor: str, mesh: tuple[ForeignArray, ...]) -> Row:
    axes = ("vocab", "embed")
    module = tensor.split(".")[0]
    return Row(
        tensor,
        axes,
        mesh,
        flax=ForeignArray(module, "embedding", axes),
        tf=ForeignArray(module, "weight:0", axes),
    )


def _kernel(tensor: str, axes: tuple[str, str], *mesh: ForeignArray) -> Row:
    """A linear layer's matrix: output axis first here, input axis first in Flax and Keras."""
    flax, tf = _modules(tensor)
    return Row(
        tensor, axes, mesh, flax=ForeignArray(flax, "kernel", axes[::-1]), tf=ForeignArray(tf, "kernel:0", axes[::-1])
    )


def _vector(tensor: str, axis: str, flax_name: str, tf_name: str, *mesh: ForeignArray) -> Row:
    flax, tf = _modules(tensor)
    return Row(
        tensor, (axis,), mesh, flax=ForeignArray(flax, flax_name, (axis,)), tf=ForeignArray(tf, tf_name, (axis,))
    )


def _modules(tensor: str) -> tuple[str, str]:
    """The module's path in Flax, where blocks are numbered folders, and in Keras, where they are called h_._0."""
    module = tensor.rpartition(".")[0]
    return module.replace(".", "/"), module.replace(".", "/").replace("h/{i}", "h_._{i}")


def _leaf(module: str, name: str, *axes: str, copies: Copies = "first") -> ForeignArray:
    return ForeignArray(module, name, axes, copies)


_NORM = "replicated_layer_norm"

ROWS: tuple[Row, ...] = (
    _embedding(
        "wte.weight",
        (
            _leaf("embedding_shard/~/linear", "w", "vocab", "embed"),
            _leaf("embedding_shard/~/linear", "b", "embed", copies="sum onto every row"),
        ),
    ),
    _vector("h.{i}.ln_1.weight", "norm", "scale", "gamma:0", _leaf(f"layer_{{i}}/~/{_NORM}", "scale", "norm")),
    _vector("h.{i}.ln_1.bias", "norm", "bias", "beta:0", _leaf(f"layer_{{i}}/~/{_NORM}", "offset", "norm")),
    # The order of creation in mesh-transformer-jax is query, VALUE, key.
    _kernel("h.{i}.attn.q_proj.weight", ("heads", "embed"), _leaf("layer_{i}/~/linear", "w", "embed", "heads")),
    _kernel("h.{i}.attn.v_proj.weight", ("heads", "embed"), _leaf("layer_{i}/~/linear_1", "w", "embed", "heads")),
    _kernel("h.{i}.attn.k_proj.weight", ("heads", "embed"), _leaf("layer_{i}/~/linear_2", "w", "embed", "heads")),
    _kernel("h.{i}.attn.out_proj.weight", ("embed", "heads"), _leaf("layer_{i}/~/linear_3", "w", "heads", "embed")),
    _kernel("h.{i}.mlp.fc_in.weight", ("mlp", "embed"), _leaf("layer_{i}/~/linear_4", "w", "embed", "mlp")),
    _vector("h.{i}.mlp.fc_in.bias", "mlp", "bias", "bias:0", _leaf("layer_{i}/~/linear_4", "b", "mlp")),
    _kernel("h.{i}.mlp.fc_out.weight", ("embed", "mlp"), _leaf("layer_{i}/~/linear_5", "w", "mlp", "embed")),
    _vector(
        "h.{i}.mlp.fc_out.bias", "embed", "bias", "bias:0", _leaf("layer_{i}/~/linear_5", "b", "embed", copies="sum")
    ),
    _vector("ln_f.weight", "norm", "scale", "gamma:0", _leaf(f"projection_shard/~/{_NORM}", "scale", "norm")),
    _vector("ln_f.bias", "norm", "bias", "beta:0", _leaf(f"projection_shard/~/{_NORM}", "offset", "norm")),
    _kernel("lm_head.weight", ("vocab", "embed"), _leaf("projection_shard/~/linear", "w", "embed", "vocab")),
    _vector("lm_head.bias", "vocab", "bias", "bias:0", _leaf("projection_shard/~/linear", "b", "vocab")),
    _kernel("score.weight", ("labels", "embed")),
    _kernel("qa_outputs.weight", ("span", "embed")),
    _vector("qa_outputs.bias", "span", "bias", "bias:0"),
)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A named format's spelling of one tensor of a model.

    Attributes:
        name: the array's name.
        transposed: its axes are the schema's in reverse.
    """

    name: str
    transposed: bool


def spell(name: str, dialect: Dialect) -> Spelling:
    """The spelling of the canonical tensor `name` in `dialect`, with or without the prefix `transformer.`.

    Flax's names are joined with slashes.

    >>> spell("transformer.h.3.mlp.fc_in.weight", "tf")
    Spelling(name='transformer/h_._3/mlp/fc_in/kernel:0', transposed=True)
    >>> spell("lm_head.bias", "flax")
    Spelling(name='lm_head/bias', transposed=False)
    """
    if dialect == "pt":
        return Spelling(name, False)
    prefix = "transformer/" if name.startswith("transformer.") else ""
    parts = name.removeprefix("transformer.").split(".")
    layer = parts[1] if parts[0] == "h" else None
    if layer is not None:
        parts[1] = "{i}"
    row = next(row for row in ROWS if row.tensor == ".".join(parts))
    array = row.flax if dialect == "flax" else row.tf
    return Spelling(f"{prefix}{array.module.format(i=layer)}/{array.name}", _is_reversed(array.axes, row.axes))


def _is_reversed(axes: tuple[str, ...], canonical: tuple[str, ...]) -> bool:
    return len(axes) == 2 and axes == canonical[::-1] != canonical


@dataclasses.dataclass(frozen=True)
class MeshLeaf:
    """One parameter leaf of a mesh-transformer-jax v1 shard.

    Attributes:
        path: module path and name, as the original's tree has them.
        tensor: the canonical tensor that it belongs to.
        axes: the names of its axes; its shape in one shard is their sizes, the cut one divided by the shards.
        cut: the axis that the shards cut, or None where every shard has a whole copy.
        copies: what the copies of an uncut leaf mean.
        transposed: the canonical tensor has the axes in reverse.
    """

    path: str
    tensor: str
    axes: tuple[str, ...]
    cut: int | None
    copies: Copies
    transposed: bool

    def shape(self, sizes: dict[str, int], shards: int) -> tuple[int, ...]:
        """The leaf's shape in each of `shards` shards, from the axes' whole sizes."""
        return tuple(sizes[axis] // (shards if n == self.cut else 1) for n, axis in enumerate(self.axes))


def canonical_name(tensor: str, layer: int | None) -> str:
    """The schema's name of a row of the table in a model with a language-model head.

    >>> canonical_name("h.{i}.ln_1.bias", 3), canonical_name("lm_head.bias")
    ('transformer.h.3.ln_1.bias', 'lm_head.bias')
    """
    prefix = "" if tensor.startswith(("lm_head", "score", "qa_outputs")) else "transformer."
    return prefix + tensor.format(i=layer)


@functools.cache
def mesh_leaves(layers: int) -> tuple[MeshLeaf, ...]:
    """The 10 * layers + 6 parameter leaves of a v1 shard, in the order in which they are stored.

    >>> [leaf.path.split("/~/", 1)[1] for leaf in mesh_leaves(12)[32:43:10]]
    ['layer_11/~/linear/w', 'layer_2/~/linear/w']
    """
    leaves = []
    for row in ROWS:
        for layer in range(layers) if "{i}" in row.tensor else (None,):
            for array in row.mesh:
                module = MESH_MODULE + array.module.format(i=layer)
                cut = next((n for n, axis in enumerate(array.axes) if axis in SPLIT_AXES), None)
                transposed = _is_reversed(array.axes, row.axes)
                leaf = MeshLeaf(
                    f"{module}/{array.name}",
                    canonical_name(row.tensor, layer),
                    array.axes,
                    cut,
                    array.copies,
                    transposed,
                )
                leaves.append(((module, array.name), leaf))
    return tuple(leaf for _, leaf in sorted(leaves, key=lambda pair: pair[0]))
