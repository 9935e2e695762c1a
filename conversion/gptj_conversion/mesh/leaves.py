"""The leaves of a TPU checkpoint that are parameters: nothing names them, so their number and shapes must tell.

A shard's leaves are those of opt_state, params and step, in that order. What an optimizer keeps differs from one to
the next, and is not read; the parameters and the step are the last leaves whatever it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gptj.errors import SchemaError
from gptj.reading.npz import NpzFile
from gptj_conversion.common.dialects import mesh_leaves
from gptj_conversion.mesh.folder import FILES_PER_SHARD

__all__ = ["Layout", "count_leaves", "infer_layout", "pieces", "require_same_state"]

MOST_LAYERS = 10_000

Layout = Literal["full", "slim"]
"""The layouts that can be written: with a fresh state of the original's optimizer, or without any."""


def pieces(leaves: int) -> list[int]:
    """The number of leaves in each of a shard's 16 files: the original cuts the list into equal runs.

    >>> pieces(37)
    [3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    each, more = divmod(leaves, FILES_PER_SHARD)
    return [each + 1] * more + [each] * (FILES_PER_SHARD - more)


def count_leaves(
    archives: tuple[tuple[NpzFile, ...], ...], shapes: list[tuple[int, ...]], directory: Path
) -> tuple[int, int]:
    """The numbers of a shard's parameters and of the model's layers; `shapes` are those of shard 0's leaves."""
    counts = [sum(len(archive.arrays) for archive in files) for files in archives]
    if len(set(counts)) > 1:
        other = next(s for s, n in enumerate(counts) if n != counts[0])
        raise SchemaError(
            "the shards have different numbers of leaves",
            file=directory / f"shard_{other}",
            expected=f"{counts[0]}, as in shard_0",
            found=counts[other],
        )
    layers = _count_layers_by_shape(shapes) or _count_layers_by_number(len(shapes))
    if layers is None:
        raise SchemaError(
            "no GPT-J has this number of leaves in a shard, and the last ones are not those of one",
            file=directory / "shard_0",
            expected="10 * layers + 7 (slim) or 30 * layers + 21 (with optimizer state)",
            found=len(shapes),
            hint="Other norm or pe settings add or remove leaves; only norm layernorm with pe rotary is GPT-J",
        )
    for files in archives:
        for archive, wanted in zip(files, pieces(len(shapes)), strict=True):
            if len(archive.arrays) != wanted:
                raise SchemaError(
                    "wrong number of leaves", file=archive.path, expected=wanted, found=len(archive.arrays)
                )
    return 10 * layers + 6, layers


def _count_layers_by_shape(shapes: list[tuple[int, ...]]) -> int | None:
    """The number of layers of the leaves before the step, by their shapes from the end; None where they fit none.

    An optimizer's state before them is no matter: the two leaves of the embedding, a vector and then a matrix, stand
    where two vectors, a layer's last leaves, would stand if there were one more.
    """
    ndims = [len(shape) for shape in shapes[:-1]]
    if not shapes or shapes[-1] != ():
        return None
    rows = mesh_leaves(1)
    embedding, layer, projection = ([len(row.axes) for row in part] for part in (rows[:2], rows[2:12], rows[12:]))
    end = len(ndims) - len(projection)
    if ndims[max(end, 0) :] != projection:
        return None
    width, layers = shapes[-2], 0
    while end >= 10 and ndims[end - 10 : end] == layer and shapes[end - 1] == width and layers < MOST_LAYERS:
        end -= 10
        layers += 1
    fits = end >= 2 and layers and ndims[end - 2 : end] == embedding and shapes[end - 2] == width
    return layers if fits else None


def _count_layers_by_number(total: int) -> int | None:
    """The number of layers that so many leaves make, where their shapes fit none: the one that does not is named."""
    for times, more in ((1, 1), (3, 3)):
        parameters, rest = divmod(total - more, times)
        layers, odd = divmod(parameters - 6, 10)
        if rest == 0 and odd == 0 and 1 <= layers <= MOST_LAYERS:
            return layers
    return None


def require_same_state(states: list[list[tuple[int, ...]]], directory: Path) -> list[tuple[int, ...]]:
    """The shapes of the leaves before the parameters, which must be the same in every shard."""
    for shard, state in enumerate(states):
        if state != states[0]:
            raise SchemaError(
                "the shards have different optimizers' states",
                file=directory / f"shard_{shard}",
                expected="leaves of the shapes of shard_0's",
                hint="They are not of one run",
            )
    return states[0]


def infer_layout(state: list[tuple[int, ...]], parameters: list[tuple[int, ...]]) -> Literal["full", "slim", "other"]:
    """The layout that the leaves before the parameters make; "full" is count, two moments a parameter, count."""
    if not state:
        return "slim"
    return "full" if state == [(), *parameters, *parameters, ()] else "other"
