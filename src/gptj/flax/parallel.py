"""A Flax model on several devices: each holds its part of every tensor, as `gptj.sharding` cuts it.

The parameters are jax arrays with a NamedSharding; XLA's partitioner does the rest in whatever is compiled over them,
calls, gradients and generation, on the devices of one process or of many (jax.distributed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh as JaxMesh
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import Head, TensorSpec, schema
from gptj.errors import InputError, shown
from gptj.flax.processes import join_processes as join_processes
from gptj.flax.processes import leave_processes as leave_processes
from gptj.sharding import (
    Mesh,
    Placement,
    ReadPart,
    Strategy,
    check_rows,
    choose_mesh,
    partition_of,
)


def choose_placement(mesh: Any, strategy: Strategy) -> Placement:
    """The place of a model among jax's devices.

    Args:
        mesh: a `Mesh`, a jax Mesh whose axes are called dp and tp, or None: all devices along one axis.

    Raises:
        InputError: there are not so many devices.
    """
    if isinstance(mesh, JaxMesh):
        named = dict(mesh.shape)
        if not named or not set(named) <= {"dp", "tp"}:
            raise InputError("its axes have other names", where="mesh", expected="dp, tp", found=shown(tuple(named)))
        devices = mesh.devices if mesh.axis_names != ("tp", "dp") else mesh.devices.T
        return _placement_of(Mesh(**named), np.asarray(devices), strategy)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            "no mesh", where="mesh", expected="a gptj.sharding.Mesh or a jax Mesh", found=shown(type(mesh).__name__)
        )
    sizes = choose_mesh(mesh, strategy, jax.device_count(), processes=jax.process_count())
    return _placement_of(sizes, np.array(jax.devices()[: sizes.size]), strategy)


def _placement_of(sizes: Mesh, devices: Any, strategy: Strategy) -> Placement:
    native = JaxMesh(devices.reshape(sizes.dp, sizes.tp), ("dp", "tp"))
    here = [index for index, device in np.ndenumerate(native.devices) if device.process_index == jax.process_index()]
    if not here:
        raise InputError("this process is not in it", where="mesh", expected="devices of every process")
    return Placement(strategy, sizes, {"dp": here[0][0], "tp": here[0][1]}, native)


def sharding_of(spec: TensorSpec, placement: Placement) -> NamedSharding:
    """jax's sharding of the tensor, as the table says, but that jax cuts into equal parts alone.

    A mesh axis that would leave a rest of the head's bias, or of a classifier's labels, does not cut it.
    """
    cuts = zip(partition_of(spec, placement.strategy), spec.shape, strict=True)
    even = [cut if size % placement.mesh.along(cut) == 0 else cut[: cut.index("dp")] for cut, size in cuts]
    return NamedSharding(placement.native, PartitionSpec(*(cut or None for cut in even)))


def distribute(config: GPTJConfig, head: Head, read_part: ReadPart, placement: Placement) -> dict[str, jax.Array]:
    """Every parameter by its name, of which this process reads the parts of its own devices."""

    def make(spec: TensorSpec) -> jax.Array:
        def read(index: tuple[slice, ...]) -> Any:
            return read_part(
                spec, tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, spec.shape, strict=True))
            )

        return jax.make_array_from_callback(spec.shape, sharding_of(spec, placement), read)

    return {spec.name: jax.block_until_ready(make(spec)) for spec in schema(config, head)}


def cut_tensor(array: NDArray[Any], spec: TensorSpec, placement: Placement) -> jax.Array:
    """An array that every process has the whole of, of which each device gets its part."""
    return jax.make_array_from_callback(spec.shape, sharding_of(spec, placement), lambda index: array[index])


def cut_rows(array: Any, placement: Placement) -> jax.Array:
    """Rows of a batch, the same array in every process, of which each device gets its own along dp.

    Raises:
        InputError: there are not as many for each.
    """
    host = np.asarray(array)
    check_rows(len(host), placement)
    return jax.make_array_from_callback(host.shape, rows_sharding(placement), lambda index: host[index])


_OF_ROWS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels",
            "past_key_values")  # fmt: skip


def spread_rows(arguments: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The checked arguments of a call, of which each device gets its own rows along dp.

    Raises:
        InputError: there are not as many for each.
    """
    tokens = arguments["inputs_embeds"] if arguments["input_ids"] is None else arguments["input_ids"]
    batch = int(tokens.shape[0])
    check_rows(batch, placement)
    if placement.mesh.dp == 1:
        return dict(arguments)
    rows = rows_sharding(placement)

    def spread(x: Any) -> Any:
        if not np.ndim(x) or x.shape[0] != batch:
            return x
        if isinstance(x, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(x, rows)
        if isinstance(x, jax.Array) and (x.sharding == rows or not x.is_fully_addressable):
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, rows, lambda index: host[index])

    return {k: jax.tree.map(spread, value) if k in _OF_ROWS else value for k, value in arguments.items()}


def rows_sharding(placement: Placement) -> NamedSharding:
    """The sharding of whatever has a batch's rows on its first axis."""
    return NamedSharding(placement.native, PartitionSpec("dp"))


# ---- copies


def copy_of(model: Any) -> tuple[int, int]:
    """This process' number among the copies of the model, and how many there are: each may read other rows."""
    alone = {device.process_index for device in model.placement.native.devices.flat} == {jax.process_index()}
    return (jax.process_index(), jax.process_count()) if alone else (0, 1)


def mesh_of_copy(mesh: Mesh, strategy: Strategy) -> Any:
    """The mesh that the processes of one command open a model on: where it is copies, each has one on its own device.

    Differs: what is compiled over a mesh of several processes is one program, which all of them run together.
    """
    if strategy != "dp" or jax.process_count() == 1:
        return mesh
    return JaxMesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ("dp", "tp"))
