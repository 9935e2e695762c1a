"""The processes of DTensor that compute one model together: how they come, talk and leave."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.dtensor.python.accelerator_util import is_initialized
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from gptj.errors import InputError, ProcessError
from gptj.sharding import Keys, Processes, environment_place, join_seconds, silence_seconds


def device_kind() -> str:
    """The kind of device that DTensor computes on."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


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
            with _patient(context.context()):
                dtensor.initialize_accelerator_system(device_kind())
        except ValueError as error:
            raise InputError(
                "TensorFlow has computed something already",
                where="join_processes",
                hint="Call it first, before any tensor is made",
            ) from error
    return Processes(index or 0, count or 1)


@contextlib.contextmanager
def _patient(service: Any) -> Iterator[None]:
    """While this is open, DTensor lets a process come as late, and be silent for as long, as a command does."""
    configure = service.configure_coordination_service
    bounds = {"cluster_register": join_seconds(), "heartbeat": silence_seconds()}
    service.configure_coordination_service = functools.partial(
        configure, **{f"{what}_timeout_in_ms": 1000 * seconds for what, seconds in bounds.items()}
    )
    try:
        yield
    finally:
        del service.configure_coordination_service


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
    return int(dtensor.num_global_devices(device_kind()))


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


_ROUNDS = itertools.count(1)
"""Numbers of this process' rounds of texts, the same in every process."""


def gather_texts(text: str) -> list[str]:
    """Every process' text, in their order: all wait for each other, for as long as it takes.

    It goes through the service that the processes know each other by; what waits is a sum, which a process that is
    gone ends, as it does not end the service's own waiting.
    """
    if dtensor.num_clients() == 1:
        return [text]
    service, rank, at = context.context(), dtensor.client_id(), next(_ROUNDS)
    service.set_config_key_value(f"gptj.text.{at}.{rank}", text)
    share_number(0)
    texts = [service.get_config_key_value(f"gptj.text.{at}.{n}") for n in range(dtensor.num_clients())]
    if at > 1:  # which all have read who have written this one
        service.delete_config_key_value(f"gptj.text.{at - 1}.{rank}")
    return texts


def share_number(number: int) -> int:
    """The first process' number, 0 to 2**63 - 1."""
    if dtensor.num_clients() == 1:
        return number
    said = np.array([number >> shift & 0xFFFF for shift in (0, 16, 32, 48)], np.int32)
    (total,) = sum_over_processes([tf.constant(said if dtensor.client_id() == 0 else said * 0)])
    return sum(int(piece) << shift for piece, shift in zip(total.numpy(), (0, 16, 32, 48), strict=True))


def sum_over_processes(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The sums over all processes, to the last bit the same in each; every process calls it, with the same shapes.

    Python's other threads go on meanwhile, as they do not where DTensor sums.
    """
    made: list[tf.Tensor] = [*tensors] if dtensor.num_clients() == 1 else _sum_all([*tensors])
    return made


_GROUP = 2**30
"""TensorFlow's number for all processes as one group, and of the first of its sums: far from DTensor's own."""

_SUMS = itertools.count(_GROUP)
"""Numbers of the sums in graphs, which every process makes in the same order."""


@tf.function(autograph=False)
def _sum_all(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    together = {"group_size": dtensor.num_clients(), "group_key": _GROUP, "ordering_token": []}
    how = {"merge_op": "Add", "final_op": "Id"}
    return [tf.raw_ops.CollectiveReduceV2(input=x, instance_key=next(_SUMS), **together, **how) for x in tensors]


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


def make_keys() -> Keys:
    """A connection to the names that all processes know; it waits for as long as it takes."""
    service = context.context()
    return Keys(service.set_config_key_value, service.get_config_key_value, service.delete_config_key_value)
