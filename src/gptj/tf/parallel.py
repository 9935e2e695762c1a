"""A TensorFlow model on several devices: each holds its part of every tensor, as `gptj.sharding` cuts it.

Inference runs on tf.experimental.dtensor: the parameters are DTensors, and a graph over them is cut by it, on the
devices of one process or of many; a forward pass of n blocks makes n + 1 all-reduces, a block's of two buffers, its
attention's and its feed-forward's. Training copies the whole model under a strategy of `tf.distribute`, where losses
are those of the whole batch.

Differs: Keras cuts no model on TensorFlow: `keras.distribution` does nothing there, without a word, so a model is not
made while one is set; and what DTensor cannot do is refused by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gptj.calls.outputs import object_or_tuple
from gptj.config.schema import TensorSpec, schema
from gptj.errors import InputError, shown
from gptj.sharding import (
    Mesh,
    Placement,
    ReadPart,
    Strategy,
    check_rows,
    choose_mesh,
    partition_of,
    slices,
)
from gptj.tf.arguments import host
from gptj.tf.processes import count_devices, device_kind
from gptj.tf.processes import ending_together as ending_together
from gptj.tf.processes import join_processes as join_processes
from gptj.tf.processes import leave_processes as leave_processes

GIVEN_UP = (
    *("compile", "evaluate", "export", "fit", "get_weights", "load_weights", "predict", "predict_on_batch"),
    *("save", "save_weights", "set_weights", "test_on_batch", "train_on_batch"),
)
"""Methods of Keras' own that know variables alone, and no DTensors."""


def choose_placement(mesh: Any, strategy: Strategy) -> Placement:
    """The place of a model among DTensor's devices.

    Args:
        mesh: a `Mesh`, a DTensor mesh whose axes are called dp and tp, or None: all devices along one axis.

    Raises:
        InputError: there are not so many devices, or DTensor has no such strategy here.
    """
    if strategy in ("fsdp", "tp_fsdp"):
        raise InputError(
            "TensorFlow trains no model in parts",
            where=f"strategy {strategy}",
            expected="tp or dp, for inference",
            hint="Train it in gptj.pt or gptj.flax, or copies of it here under tf.distribute (docs/scale.md)",
        )
    if isinstance(mesh, dtensor.Mesh):
        if not mesh.dim_names or not set(mesh.dim_names) <= {"dp", "tp"}:
            raise InputError(
                "its axes have other names", where="mesh", expected="dp, tp", found=shown(tuple(mesh.dim_names))
            )
        if tuple(mesh.dim_names) != ("dp", "tp"):
            hint = "Give an axis of one device its name too: dp first, then tp"
            raise InputError("not both axes", where="mesh", expected="dp, tp", found=shown(mesh.dim_names), hint=hint)
        return _placement_of(mesh, strategy)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            "no mesh", where="mesh", expected="a gptj.sharding.Mesh or a DTensor mesh", found=shown(type(mesh).__name__)
        )
    several = "tf.config.set_logical_device_configuration makes several of one; see docs/scale.md"
    sizes = choose_mesh(mesh, strategy, count_devices(), processes=dtensor.num_clients(), hint=several)
    axes = [("dp", sizes.dp), ("tp", sizes.tp)]
    kind = device_kind()
    if dtensor.num_clients() > 1:
        return _placement_of(dtensor.create_distributed_mesh(axes, device_type=kind), strategy)
    devices = [f"{kind}:{n}" for n in range(sizes.size)]
    return _placement_of(dtensor.create_mesh(axes, devices=devices), strategy)


def _placement_of(mesh: Any, strategy: Strategy) -> Placement:
    here = mesh.local_device_locations()
    if not here:
        raise InputError("this process is not in it", where="mesh", expected="devices of every process")
    return Placement(strategy, Mesh(dp=mesh.dim_size("dp"), tp=mesh.dim_size("tp")), here[0], mesh)


def layout_of(spec: TensorSpec, placement: Placement) -> Any:
    """DTensor's layout of the tensor, as the table says."""
    cuts = partition_of(spec, placement.strategy)
    return dtensor.Layout([cut[0] if cut else dtensor.UNSHARDED for cut in cuts], placement.native)


def distribute(model: Any, read_part: ReadPart, placement: Placement) -> None:
    """Make every parameter of a model without values a DTensor, of which this process reads its own devices' parts."""
    devices = placement.native.local_device_locations()
    for spec in schema(model.config, model.head):
        read: dict[tuple[tuple[int, int], ...], tf.Tensor] = {}
        parts = []
        for place in devices:
            part = slices(spec, placement.strategy, placement.mesh, place)
            key = tuple((cut.start, cut.stop) for cut in part)
            if key not in read:
                read[key] = tf.constant(read_part(spec, part))
            parts.append(read[key])
        *owners, leaf = spec.name.split(".")
        layer: Any = model
        for owner in owners:
            layer = layer[int(owner)] if owner.isdecimal() else getattr(layer, owner)
        setattr(layer, leaf, dtensor.pack(parts, layout_of(spec, placement)))
    model.tie_weights()
    rotary = model.base_model.rotary
    rotary.sin, rotary.cos = (_spread(x, placement) for x in (rotary.sin, rotary.cos))
    for part in {model, model.base_model}:
        part.trainable = False
        for act in GIVEN_UP:
            setattr(part, act, functools.partial(_refuse, model, act))


def _refuse(model: Any, act: str, *arguments: Any, **options: Any) -> Any:
    model._refuse_cut(act)


def held_by_process(spec: TensorSpec, placement: Placement) -> int:
    """How many of the tensor's numbers this process' devices hold."""
    places = placement.native.local_device_locations()
    parts = [slices(spec, placement.strategy, placement.mesh, place) for place in places]
    return sum(math.prod(cut.stop - cut.start for cut in part) for part in parts)


# ---- computing


def _spread(x: Any, placement: Placement, batch: int | None = None) -> Any:
    """`x` on every device: its rows cut along dp where it has `batch` of them, else the whole of it."""
    x = tf.convert_to_tensor(x)
    whole = dtensor.copy_to_mesh(x, dtensor.Layout.replicated(placement.native, x.shape.rank))
    if batch is None or placement.mesh.dp == 1 or not x.shape.rank or x.shape[0] != batch:
        return whole
    return dtensor.relayout(whole, _rows_layout(placement, x.shape.rank))


def _rows_layout(placement: Placement, rank: int) -> Any:
    return dtensor.Layout(["dp", *[dtensor.UNSHARDED] * (rank - 1)], placement.native)


def whole(x: Any, placement: Placement) -> tf.Tensor:
    """The whole of a DTensor, as a tensor of this process; every process calls it, for the same one."""
    if not dtensor.is_dtensor(x):
        return x
    joined = dtensor.relayout(x, dtensor.Layout.replicated(placement.native, x.shape.rank))
    return dtensor.unpack(joined)[0]


def run_over_mesh(model: Any, key: Any, function: Callable[..., Any], *trees: Any, batch: int | None = None) -> Any:
    """The results of `function`, computed by all devices, as DTensors.

    Args:
        model: a cut one, which keeps the graph.
        key: names the function, among those of the model.
        function: takes and gives trees of tensors; a DTensor that it is given is taken as it is.
        trees: its arguments.
        batch: how many rows are cut along dp.
    """
    placement: Placement = model.placement
    graphs = model.__dict__.setdefault("_parallel_graphs", {})
    if key not in graphs:
        graphs[key] = tf.function(function, autograph=False, reduce_retracing=False)

    def spread(x: Any) -> Any:
        return x if x is None or dtensor.is_dtensor(x) else _spread(x, placement, batch)

    given = tf.nest.map_structure(spread, trees)
    with dtensor.default_mesh(placement.native):
        made = graphs[key](*given)
    return made


def call_over_mesh(model: Any, given: Mapping[str, Any]) -> Any:
    """The outputs of a cut model's call, whole, in every process.

    Args:
        given: the checked arguments of `call` by name.

    Raises:
        InputError: what DTensor or a cut model cannot do, by name.
    """
    placement: Placement = model.placement
    if given.get("training"):
        model._refuse_cut("training")
    if any(value is not None and host(value) is None for value in given.values() if tf.is_tensor(value)):
        raise InputError("a cut model is called outside of tf.function", where=type(model).__name__, hint=_EAGERLY)
    if isinstance(next(iter(given.values()), None), keras.KerasTensor):
        raise InputError("a cut model is part of no other", where=type(model).__name__, hint=_EAGERLY)
    if given.get("past_key_values") is not None or given.get("use_cache"):
        where = "past_key_values" if given.get("past_key_values") is not None else "use_cache"
        hint = "model.generate and model.stream keep a cache, cut as the model is"
        raise InputError("a cut model's call hands no cache on", where=where, hint=hint)
    tensors = {name: value for name, value in given.items() if tf.is_tensor(value)}
    flags = {name: value for name, value in given.items() if not tf.is_tensor(value) and name != "use_cache"}
    returned = flags.pop("return_dict", None)
    batch = next(iter(tensors.values())).shape[0]
    check_rows(batch, placement)
    cached = {} if model.head == "question_answering" else {"use_cache": False}
    of_output: list[type] = []

    def run(arguments: dict[str, Any]) -> dict[str, Any]:
        output = model.call(**arguments, **flags, **cached, return_dict=True)
        of_output.append(type(output))
        return dict(output.items())

    key = ("call", *sorted((name, tuple(x.shape), x.dtype.name) for name, x in tensors.items()), *flags.items())
    kept = model.__dict__.setdefault("_parallel_outputs", {})
    made = run_over_mesh(model, key, run, tensors, batch=batch)
    kept.setdefault(key, of_output[0] if of_output else None)
    made = tf.nest.map_structure(lambda x: whole(x, placement), made)
    return object_or_tuple(kept[key](**made), returned, default=model.config.return_dict)


_EAGERLY = "Call it with arrays; it compiles what it needs itself"


# ---- processes


def copy_of(model: Any) -> tuple[int, int]:
    """This process' number among the copies of the model, and how many there are.

    Differs: one, since what runs over a mesh is one program of all processes, which cuts the rows itself.
    """
    return 0, 1


def mesh_of_copy(mesh: Mesh, strategy: Strategy) -> Any:
    """The mesh that the processes of one command open a model on."""
    return mesh


def refuse_distribution() -> None:
    """Refuse to make a model while `keras.distribution` is set, which TensorFlow would ignore.

    Raises:
        InputError: one is set.
    """
    chosen = keras.distribution.distribution()
    if chosen is not None:
        raise InputError(
            "does nothing on Keras' TensorFlow backend",
            where="keras.distribution",
            expected="None",
            found=type(chosen).__name__,
            hint="keras.distribution.set_distribution(None); see docs/scale.md for what there is",
        )
