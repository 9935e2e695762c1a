"""A TensorFlow model on several devices: each holds its part of every tensor, as `gptj.sharding` cuts it.

Inference runs on tf.experimental.dtensor: the parameters are DTensors, and a graph over them is cut by it, on the
devices of one process or of many; a forward pass of n blocks makes n + 1 all-reduces, a block's of two buffers, its
attention's and its feed-forward's. Training copies the whole model under a strategy of `tf.distribute`, where losses
are those of the whole batch.

Differs: Keras cuts no model on TensorFlow: `keras.distribution` does nothing there, without a word, so a model is not
made while one is set; and what DTensor cannot do is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.dtensor.python.accelerator_util import is_initialized
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from gptj.calls.outputs import object_or_tuple
from gptj.config.schema import TensorSpec, schema
from gptj.errors import InputError, ProcessError, shown
from gptj.sharding import (
    Mesh,
    Placement,
    Processes,
    ReadPart,
    Strategy,
    check_rows,
    environment_place,
    natural_mesh,
    partition_of,
    slices,
)
from gptj.tf.arguments import host

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
    count = count_devices()
    sizes = natural_mesh(strategy, count) if mesh is None else mesh
    if sizes.size > count or (dtensor.num_clients() > 1 and sizes.size != count):
        raise InputError(
            "not as many as there are devices",
            where="mesh",
            expected=count,
            found=sizes.size,
            hint="tf.config.set_logical_device_configuration makes several of one; see docs/scale.md",
        )
    axes = [("dp", sizes.dp), ("tp", sizes.tp)]
    kind = _device_kind()
    if dtensor.num_clients() > 1:
        return _placement_of(dtensor.create_distributed_mesh(axes, device_type=kind), strategy)
    devices = [f"{kind}:{n}" for n in range(sizes.size)]
    return _placement_of(dtensor.create_mesh(axes, devices=devices), strategy)


def _placement_of(mesh: Any, strategy: Strategy) -> Placement:
    here = mesh.local_device_locations()
    if not here:
        raise InputError("this process is not in it", where="mesh", expected="devices of every process")
    return Placement(strategy, Mesh(dp=mesh.dim_size("dp"), tp=mesh.dim_size("tp")), here[0], mesh)


def _device_kind() -> str:
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


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


def join_processes() -> Processes:
    """Make the processes that belong together know each other; a process that was started alone is alone.

    DTENSOR_JOBS, DTENSOR_NUM_CLIENTS and DTENSOR_CLIENT_ID say it, or torchrun's own variables on one host: process n
    listens at the port n + 1 after torchrun's.

    Raises:
        InputError: the variables are there in part, or TensorFlow computed something already.
    """
    count, index = environment_place("DTENSOR_NUM_CLIENTS", "DTENSOR_CLIENT_ID")
    if count is None:
        count, index = environment_place("WORLD_SIZE", "RANK")
        if count is not None and count > 1:
            _say_jobs(count, index or 0)
    jobs = dtensor.jobs()
    if count is not None and count > 1 and len(jobs) != count:
        raise InputError(
            "not one address a process", where="environment: DTENSOR_JOBS", expected=f"{count}, HOST:PORT,HOST:PORT",
            found=os.environ.get("DTENSOR_JOBS"),
        )  # fmt: skip
    if jobs and count is None:
        raise InputError(
            "is missing", where="environment: DTENSOR_NUM_CLIENTS", expected="beside DTENSOR_JOBS", found=None
        )
    if len(jobs) > 1 and not is_initialized():
        try:
            dtensor.initialize_accelerator_system(_device_kind())
        except ValueError as error:
            raise InputError(
                "TensorFlow has computed something already",
                where="join_processes",
                hint="Call it first, before any tensor is made",
            ) from error
    return Processes(index or 0, count or 1)


def _say_jobs(count: int, index: int) -> None:
    """Tell DTensor in its own variables what torchrun said in torch's.

    Raises:
        InputError: they are on several hosts, whose names torchrun does not say.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", str(count)) != str(count):
        raise InputError(
            "torchrun names one host alone",
            where="environment: DTENSOR_JOBS",
            expected="HOST:PORT of each process, beside DTENSOR_NUM_CLIENTS and DTENSOR_CLIENT_ID",
            found=os.environ.get("DTENSOR_JOBS"),
        )
    host_name, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for name, value in (("MASTER_ADDR", host_name), ("MASTER_PORT", port)):
        if not value or (name == "MASTER_PORT" and not value.isdecimal()):
            raise InputError(
                "is missing", where=f"environment: {name}", expected="beside the processes' numbers", found=value
            )
    jobs = ",".join(f"{host_name}:{int(port) + 1 + n}" for n in range(count))
    os.environ |= {"DTENSOR_JOBS": jobs, "DTENSOR_NUM_CLIENTS": str(count), "DTENSOR_CLIENT_ID": str(index)}


def count_devices() -> int:
    """How many devices there are for a model, of all processes together."""
    return int(dtensor.num_global_devices(_device_kind()))


def leave_processes() -> None:
    """Let go of the others; the first, which the others report to, goes last."""
    if dtensor.num_clients() > 1:
        share_number(0)
        if dtensor.client_id() == 0:
            time.sleep(1)


def is_of_processes(error: BaseException) -> bool:
    """Whether it tells of another process that is no more: TensorFlow's own kinds of errors that do."""
    kinds = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)
    return isinstance(error, (*kinds, tf.errors.DeadlineExceededError))


def speaks_first() -> bool | None:
    """Whether no other process failed before this one: for the first to say why. None where that is not known."""
    try:
        context.context().set_config_key_value("gptj.failed", "1")
    except tf.errors.AlreadyExistsError:
        return False
    except Exception:  # with the process that kept the keys
        return None
    return True


def copy_of(model: Any) -> tuple[int, int]:
    """Which of how many copies of the model this process has alone.

    Differs: one, since what runs over a mesh is one program of all processes, which cuts the rows itself.
    """
    return 0, 1


def mesh_of_copy(mesh: Mesh | None, strategy: Strategy) -> Any:
    """The mesh that the processes of one command open a model on."""
    return mesh


def gather_texts(text: str) -> list[str]:
    """Every process' text, in their order: all wait for each other, for as long as it takes.

    It goes through the service that the processes know each other by; what waits is a sum, which a process that is
    gone ends, as it does not end the service's own waiting.
    """
    if dtensor.num_clients() == 1:
        return [text]
    service, rank = context.context(), dtensor.client_id()
    for at in itertools.count(1):
        try:  # nobody else writes this process' keys: the first that is free is the next
            service.set_config_key_value(f"gptj.text.{at}.{rank}", text)
            break
        except tf.errors.AlreadyExistsError:
            continue
    share_number(0)
    return [service.get_config_key_value(f"gptj.text.{at}.{n}") for n in range(dtensor.num_clients())]


def share_number(number: int) -> int:
    """The first process' number, 0 to 2**63 - 1."""
    if dtensor.num_clients() == 1:
        return number
    kind = _device_kind()
    mesh = dtensor.create_distributed_mesh([("all", count_devices())], device_type=kind)
    said = np.array([[number >> shift & 0xFFFF for shift in (0, 16, 32, 48)]], np.int32)
    first = dtensor.client_id() == 0
    parts = [tf.constant(said if first and n == 0 else said * 0) for n in range(dtensor.num_local_devices(kind))]
    spread = dtensor.pack(parts, dtensor.Layout(["all", dtensor.UNSHARDED], mesh))
    with dtensor.default_mesh(mesh):
        total = tf.function(_sum_rows, autograph=False)(spread)
    pieces = dtensor.unpack(total)[0].numpy()
    return sum(int(piece) << shift for piece, shift in zip(pieces, (0, 16, 32, 48), strict=True))


def _sum_rows(x: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(x, 0)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """While this is open, a process that dies ends this one with one line, and not with TensorFlow's account of it.

    Raises:
        ProcessError: another process is gone.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not is_of_processes(error):
            raise
        raise ProcessError(
            "another process is gone, and nothing can be computed without it",
            where="processes",
            found=type(error).__name__,
            hint="See what it said last, and start all of them anew",
        ) from None


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
