"""The table of shardings: which axis of which tensor is cut along which axis of a mesh of devices, per strategy.

The named axes are the schema's. A mesh has two axes, `dp` and `tp`, of sizes whose product is the number of devices:
rows of a batch are cut along `dp`, heads, feed-forward and vocabulary along `tp`, and where a strategy says so the rest
of each weight along `dp` (FSDP, ZeRO-3). PyTorch's placements and jax's NamedSharding are derived from `partition_of`
and compared with it.

>>> from gptj import GPTJConfig
>>> from gptj.config.schema import schema_by_name
>>> spec = schema_by_name(GPTJConfig())["transformer.h.0.mlp.fc_out.weight"]
>>> partition_of(spec, "tp"), partition_of(spec, "tp_fsdp")
(((), ('tp',)), (('dp',), ('tp',)))
>>> slices(spec, "tp", Mesh(tp=4), {"tp": 1})
(slice(0, 4096, None), slice(4096, 8192, None))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec
from gptj.errors import InputError, did_you_mean, shown

__all__ = [
    "MESH_AXES",
    "STRATEGIES",
    "Mesh",
    "MeshAxis",
    "Partition",
    "Placement",
    "ReadPart",
    "Strategy",
    "check_decodes",
    "check_mesh",
    "check_rows",
    "check_strategy",
    "choose_mesh",
    "held_by_one",
    "partition_of",
    "slices",
]

MeshAxis = Literal["dp", "tp"]
Strategy = Literal["dp", "tp", "fsdp", "tp_fsdp"]
Partition = tuple[tuple[MeshAxis, ...], ...]
"""For each axis of a tensor, the mesh axes that it is cut along, the outermost cut first; () where it is whole."""

ReadPart = Callable[[TensorSpec, tuple[slice, ...]], NDArray[Any]]
"""Reads a part of a tensor, one slice an axis."""

MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_TP: dict[str, MeshAxis] = {"vocab": "tp", "heads": "tp", "mlp": "tp"}
_FSDP: dict[str, MeshAxis] = {"embed": "dp", "norm": "dp"}
RULES: dict[Strategy, dict[str, MeshAxis]] = {"dp": {}, "tp": _TP, "fsdp": _FSDP, "tp_fsdp": _TP | _FSDP}
"""The mesh axis of each named axis of a weight. Rows of a batch are always cut along dp."""

_SHARDS_ALL = frozenset({"fsdp", "tp_fsdp"})
"""Strategies under which dp cuts every tensor: its first axis, where no rule names another."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices in rows and columns: neighbours along `tp` share a model's matrices, those along `dp` the batch.

    Args:
        dp, tp: how many, 1 or more.
    """

    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError("out of range", where=axis, expected="a whole number, 1 or more", found=shown(size))

    @property
    def size(self) -> int:
        """How many devices."""
        return self.dp * self.tp

    def along(self, axes: Iterable[MeshAxis]) -> int:
        """How many parts a cut along these axes makes."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coordinates(self, rank: int) -> dict[MeshAxis, int]:
        """The place of a process, counted along `tp` first, so that neighbours share a host.

        >>> Mesh(dp=2, tp=4).coordinates(5)
        {'dp': 1, 'tp': 1}
        """
        if not 0 <= rank < self.size:
            raise InputError("not in the mesh", where="rank", expected=f"0 to {self.size - 1}", found=shown(rank))
        return {"dp": rank // self.tp, "tp": rank % self.tp}


def check_strategy(strategy: str) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: there is none.
    """
    for known in STRATEGIES:
        if strategy == known:
            return known
    hint = did_you_mean(strategy, STRATEGIES) if isinstance(strategy, str) else None
    raise InputError(
        "no such strategy", where="strategy", expected=", ".join(STRATEGIES), found=shown(strategy), hint=hint
    )


def partition_of(spec: TensorSpec, strategy: Strategy) -> Partition:
    """The mesh axes that each axis of the tensor is cut along."""
    rules = RULES[strategy]
    cuts: list[tuple[MeshAxis, ...]] = [(rules[axis],) if axis in rules else () for axis in spec.axes]
    if strategy in _SHARDS_ALL and cuts and not any("dp" in cut for cut in cuts):
        cuts[0] = (*cuts[0], "dp")
    return tuple(cuts)


def slices(spec: TensorSpec, strategy: Strategy, mesh: Mesh, coordinates: Mapping[MeshAxis, int]) -> tuple[slice, ...]:
    """The part of the tensor that the process at `coordinates` holds, one slice an axis.

    An axis that the mesh axis does not divide is cut as torch's chunks are: equal parts, and what is left in the last.
    `check_mesh` refuses all such but two along dp: the head's bias, and a classifier's labels.
    """
    return tuple(
        _part(size, cut, mesh, coordinates) for size, cut in zip(spec.shape, partition_of(spec, strategy), strict=True)
    )


def _part(size: int, cut: tuple[MeshAxis, ...], mesh: Mesh, coordinates: Mapping[MeshAxis, int]) -> slice:
    start, stop = 0, size
    for axis in cut:
        count, at = getattr(mesh, axis), coordinates.get(axis, 0)
        length = -(-(stop - start) // count)
        start, stop = min(start + at * length, stop), min(start + (at + 1) * length, stop)
    return slice(start, stop)


def held_by_one(spec: TensorSpec, strategy: Strategy, mesh: Mesh) -> int:
    """How many of the tensor's numbers the first process holds."""
    return math.prod(part.stop - part.start for part in slices(spec, strategy, mesh, {}))


def check_mesh(config: GPTJConfig, strategy: Strategy, mesh: Mesh, *, batch: int | None = None) -> None:
    """Refuse what cannot be cut evenly, by name, before an engine pads it, moves it about or fails.

    Heads are counted in heads: four on eight devices XLA would cut through, and be right with 12 all-to-alls.

    Args:
        batch: rows of a call, where it is known.

    Raises:
        InputError: the first field that does not divide, or a mesh axis that the strategy has no use for.
    """
    if mesh.tp > 1 and "tp" not in RULES[strategy].values():
        other = "tp_fsdp" if strategy == "fsdp" else "tp"
        raise InputError(
            f"strategy {strategy} cuts nothing along tp",
            where="tp",
            expected=1,
            found=mesh.tp,
            hint=f"Use dp={mesh.size}, or strategy {other}",
        )
    units = _units(config, strategy, mesh) | {"batch": (mesh.dp if batch is None else batch, mesh.dp)}
    for name, (count, parts) in units.items():
        if count % parts:
            choice = _fitting_batch(count, parts) if name == "batch" else _fitting_mesh(name, config, strategy, mesh)
            raise InputError(
                f"cannot be cut into {parts} equal parts (strategy {strategy}, dp={mesh.dp}, tp={mesh.tp})",
                where=name,
                expected=f"a multiple of {parts}",
                found=count,
                hint=f"Choose {choice}",
            )


def _units(config: GPTJConfig, strategy: Strategy, mesh: Mesh) -> dict[str, tuple[int, int]]:
    """How many of a field there are, and into how many parts they are cut, by the field's name."""
    used = RULES[strategy].values()
    tp, dp = mesh.tp if "tp" in used else 1, mesh.dp if strategy in _SHARDS_ALL else 1
    return {
        "n_head": (config.n_head, tp), "vocab_size": (config.vocab_size, tp), "n_inner": (config.inner_width, dp * tp),
        "n_embd": (config.n_embd, dp),
    }  # fmt: skip


def _fitting_batch(count: int, parts: int) -> str:
    return f"a batch of {-(-count // parts) * parts}, or a smaller dp"


def _fitting_mesh(name: str, config: GPTJConfig, strategy: Strategy, mesh: Mesh) -> str:
    """The sizes, no larger than the mesh's, of the axis that the field is cut along, which every field would fit."""
    axis: MeshAxis = "dp" if name == "n_embd" or (name == "n_inner" and mesh.tp == 1) else "tp"

    def fit(size: int, names: Iterable[str]) -> bool:
        units = _units(config, strategy, dataclasses.replace(mesh, **{axis: size}))
        return all(units[one][0] % units[one][1] == 0 for one in names)

    sizes = range(1, getattr(mesh, axis) + 1)
    of_tp = ("n_head", "vocab_size")  # the rest depends on dp too, of which no tp may make a fit
    fitting = [size for size in sizes if fit(size, _units(config, strategy, mesh))]
    fitting = fitting or [size for size in sizes if fit(size, of_tp if axis == "tp" else (name,))]
    beside = (
        "" if fit(fitting[0], _units(config, strategy, mesh)) else f", and another {'tp' if axis == 'dp' else 'dp'}"
    )
    return f"{axis} among {', '.join(map(str, fitting))}{beside}"


@dataclasses.dataclass(frozen=True)
class Placement:
    """The part of a model that this process holds.

    Attributes:
        strategy: how tensors are cut.
        mesh: among how many.
        coordinates: this process' place in the mesh.
        native: the framework's own mesh.
    """

    strategy: Strategy
    mesh: Mesh
    coordinates: Mapping[MeshAxis, int]
    native: Any = None

    def slices(self, spec: TensorSpec) -> tuple[slice, ...]:
        """This process' part of the tensor."""
        return slices(spec, self.strategy, self.mesh, self.coordinates)


def check_decodes(placement: Placement | None) -> None:
    """Refuse to generate text with a model that is cut for training.

    Raises:
        InputError: with the way to do it.
    """
    if placement is not None and placement.strategy in _SHARDS_ALL:
        raise InputError(
            "cut for training, where each step would gather every weight",
            where=f"strategy {placement.strategy}",
            expected="tp",
            hint='Save it, and open it with strategy="tp"',
        )


def check_rows(rows: int, placement: Placement) -> None:
    """Refuse a batch that cannot be cut evenly along dp.

    Raises:
        InputError: naming how many would.
    """
    dp = placement.mesh.dp
    if rows % dp:
        raise InputError(
            f"cannot be cut into {dp} equal parts (strategy {placement.strategy}, dp={dp}, tp={placement.mesh.tp})",
            where="batch",
            expected=f"a multiple of {dp}",
            found=rows,
            hint=f"Choose {_fitting_batch(rows, dp)}",
        )


def _natural_mesh(strategy: Strategy, devices: int) -> Mesh:
    """The mesh where none is named: all devices along the one axis that the strategy is about.

    Raises:
        InputError: the strategy has two.
    """
    if strategy == "tp_fsdp":
        raise InputError("the strategy cuts along two axes", where="mesh", expected="Mesh(dp=..., tp=...)", found=None)
    return Mesh(tp=devices) if strategy == "tp" else Mesh(dp=devices)


def choose_mesh(
    mesh: Mesh | None,
    strategy: Strategy,
    devices: int,
    *,
    processes: int,
    hint: str = "dp times tp is how many there must be",
) -> Mesh:
    """The mesh to compute on: the one that is named, or the strategy's own.

    Args:
        devices: how many there are, of all processes together; one process may leave some of its own unused.
        hint: the way out, where there are not as many.

    Raises:
        InputError: it has another number of devices, or none is named and the strategy has no own.
    """
    chosen = _natural_mesh(strategy, devices) if mesh is None else mesh
    if chosen.size > devices or (processes > 1 and chosen.size != devices):
        raise InputError(
            f"not as many as there are devices (strategy {strategy}, dp={chosen.dp}, tp={chosen.tp})", where="mesh",
            expected=devices, found=chosen.size, hint=hint,
        )  # fmt: skip
    return chosen
