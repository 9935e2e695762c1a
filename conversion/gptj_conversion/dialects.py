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

from gptj.schema import SPLIT_AXES

__all__ = ["MESH_MODULE", "ROWS", "ForeignArray", "MeshLeaf", "Row", "mesh_leaves"]

Copies = Literal["first", "sum", "sum onto every row"]
"""What copies of an uncut array in several shards mean.

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
        mesh: the leaves of a mesh-transformer-jax v1 shard that make it.
    """

    tensor: str
    axes: tuple[str, ...]
    mesh: tuple[ForeignArray, ...]


ROWS: tuple[Row, ...] = (
    Row(
        "wte.weight",
        ("vocab", "embed"),
        mesh=(
            ForeignArray("embedding_shard/~/linear", "w", ("vocab", "embed")),
            ForeignArray("embedding_shard/~/linear", "b", ("embed",), "sum onto every row"),
        ),
    ),
    Row(
        "h.{i}.ln_1.weight",
        ("norm",),
        mesh=(ForeignArray("layer_{i}/~/replicated_layer_norm", "scale", ("norm",)),),
    ),
    Row(
        "h.{i}.ln_1.bias",
        ("norm",),
        mesh=(ForeignArray("layer_{i}/~/replicated_layer_norm", "offset", ("norm",)),),
    ),
    # The order of creation in the original is query, VALUE, key.
    Row(
        "h.{i}.attn.q_proj.weight",
        ("heads", "embed"),
        mesh=(ForeignArray("layer_{i}/~/linear", "w", ("embed", "heads")),),
    ),
    Row(
        "h.{i}.attn.v_proj.weight",
        ("heads", "embed"),
        mesh=(ForeignArray("layer_{i}/~/linear_1", "w", ("embed", "heads")),),
    ),
    Row(
        "h.{i}.attn.k_proj.weight",
        ("heads", "embed"),
        mesh=(ForeignArray("layer_{i}/~/linear_2", "w", ("embed", "heads")),),
    ),
    Row(
        "h.{i}.attn.out_proj.weight",
        ("embed", "heads"),
        mesh=(ForeignArray("layer_{i}/~/linear_3", "w", ("heads", "embed")),),
    ),
    Row(
        "h.{i}.mlp.fc_in.weight",
        ("mlp", "embed"),
        mesh=(ForeignArray("layer_{i}/~/linear_4", "w", ("embed", "mlp")),),
    ),
    Row(
        "h.{i}.mlp.fc_in.bias",
        ("mlp",),
        mesh=(ForeignArray("layer_{i}/~/linear_4", "b", ("mlp",)),),
    ),
    Row(
        "h.{i}.mlp.fc_out.weight",
        ("embed", "mlp"),
        mesh=(ForeignArray("layer_{i}/~/linear_5", "w", ("mlp", "embed")),),
    ),
    Row(
        "h.{i}.mlp.fc_out.bias",
        ("embed",),
        mesh=(ForeignArray("layer_{i}/~/linear_5", "b", ("embed",), "sum"),),
    ),
    Row(
        "ln_f.weight",
        ("norm",),
        mesh=(ForeignArray("projection_shard/~/replicated_layer_norm", "scale", ("norm",)),),
    ),
    Row(
        "ln_f.bias",
        ("norm",),
        mesh=(ForeignArray("projection_shard/~/replicated_layer_norm", "offset", ("norm",)),),
    ),
    Row(
        "lm_head.weight",
        ("vocab", "embed"),
        mesh=(ForeignArray("projection_shard/~/linear", "w", ("embed", "vocab")),),
    ),
    Row(
        "lm_head.bias",
        ("vocab",),
        mesh=(ForeignArray("projection_shard/~/linear", "b", ("vocab",)),),
    ),
)


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


def canonical_name(tensor: str, layer: int | None = None) -> str:
    """The schema's name of a row of the table in a model with a language-model head.

    >>> canonical_name("h.{i}.ln_1.bias", 3), canonical_name("lm_head.bias")
    ('transformer.h.3.ln_1.bias', 'lm_head.bias')
    """
    prefix = "" if tensor.startswith("lm_head") else "transformer."
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
                transposed = len(array.axes) == 2 and array.axes == row.axes[::-1] != row.axes
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
