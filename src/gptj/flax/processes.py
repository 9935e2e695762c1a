"""The processes of jax.distributed that compute one model together: how they come, talk and leave."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptj.errors import InputError
from gptj.sharding import Keys, Processes, Relay, environment_place, join_seconds, own_address

_A_DAY_S = 24 * 3600
"""How long a process may be silent for jax, which goes by the clock and aborts; a command's own watch knows better."""

_SHUTDOWN_S = 30
"""How long a process waits for others that do not leave; jax's own bound is 300."""

_RELAYS: list[Relay] = []
"""This process' way to the first one's service; empty in the first."""


def join_processes() -> Processes:
    """Make the processes that belong together know each other; a process that was started alone is alone.

    jax finds them itself under Slurm, Open MPI and on Cloud TPUs. Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID say it, or torchrun's own variables, beside whose port jax takes the next.

    Raises:
        InputError: the variables are there in part.
    """
    count, index = environment_place("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address: str | None = None
    if count is None:
        count, index = environment_place("WORLD_SIZE", "RANK")
        if count is not None:
            address = f"{_said('MASTER_ADDR')}:{int(_said('MASTER_PORT')) + 1}"
    else:
        address = _said("JAX_COORDINATOR_ADDRESS")
    bounds = {
        "initialization_timeout": join_seconds(), "heartbeat_timeout_seconds": _A_DAY_S,
        "shutdown_timeout_seconds": _SHUTDOWN_S,
    }  # fmt: skip
    named = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")
    said = (address, count, index) if (count or 1) > 1 else ()
    if not jax.distributed.is_initialized() and (said or any(name in os.environ for name in named)):
        with _relayed():
            jax.distributed.initialize(*said, **bounds)
        _choose_address()
    return Processes(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _relayed() -> Iterator[None]:
    """While this is open, a client that jax makes asks the first process' service by way of a `Relay`."""
    from jax._src.lib import _jax  # jax has no public door to it

    real = _jax.get_distributed_runtime_client

    def make(address: str, rank: int, **options: Any) -> Any:
        host, _, port = address.rpartition(":")
        if rank > 0 and port.isdecimal():
            _RELAYS.append(Relay(host.strip("[]"), int(port)))
            address = _RELAYS[-1].address
        return real(address, rank, shutdown_timeout=_SHUTDOWN_S, **options)  # jax tells the service alone

    _jax.get_distributed_runtime_client = make
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = real


def _is_first_gone(within_s: float = 0) -> bool:
    """Whether the first process is known to have gone, with the service that would answer nobody any more."""
    return any(relay.broken.wait(within_s) for relay in _RELAYS)


def _choose_address() -> None:
    """Tell gloo at which address of this host others reach it, or by which interface, where GLOO_SOCKET_IFNAME says it.

    jax would leave it at what the host's own name means.
    """
    from jax._src import xla_bridge  # jax has no public door to it
    from jax._src.lib import _jax

    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    coordinator = str(_state().coordinator_address).rpartition(":")[0].strip("[]")
    address = None if interface else own_address(coordinator, gather_texts)
    if (interface or address) and jax.config.jax_cpu_collectives_implementation == "gloo":
        collectives = _jax.make_gloo_tcp_collectives(_state().client, hostname=address, interface=interface)
        make = functools.partial(xla_bridge.make_cpu_client, collectives=collectives)
        xla_bridge.register_backend_factory("cpu", make, priority=0, fail_quietly=False)


def _said(name: str) -> str:
    value = os.environ.get(name, "")
    if not value or (name == "MASTER_PORT" and not value.isdecimal()):
        raise InputError(
            "is missing", where=f"environment: {name}", expected="beside the processes' numbers", found=value
        )
    return value


def count_devices() -> int:
    """How many devices there are for a model, of all processes together."""
    return jax.device_count()


def leave_processes() -> None:
    """Let go of the others; at once, where the first is gone."""
    if not jax.distributed.is_initialized():
        return
    left: Future[None] = Future()

    def leave() -> None:
        try:
            left.set_result(jax.distributed.shutdown())
        except Exception as error:
            left.set_exception(error)

    threading.Thread(target=leave, daemon=True).start()
    while not (left.done() or _is_first_gone()):
        with contextlib.suppress(TimeoutError):
            left.exception(0.05)
    if left.done():
        left.result()


def is_of_processes(error: BaseException) -> bool:
    """Whether it tells of another process that is no more: gloo's, nccl's and the coordination service's own words."""
    words = ("Connection closed by peer", "Connection reset by peer", "Gloo", "gloo", "NCCL", "DEADLINE_EXCEEDED",
             "UNAVAILABLE", "heartbeat", "coordination service", "Barrier")  # fmt: skip
    return isinstance(error, RuntimeError | ValueError | OSError) and any(word in str(error) for word in words)


def speaks_first() -> bool | None:
    """Whether no other process failed before this one: for the first to say why. None where that is not known."""
    client = _state().client
    if _is_first_gone(within_s=0.1):  # what broke the work may be known some moments before it
        return None
    try:
        return client is None or int(client.key_value_increment("gptj.failed", 1)) == 1
    except (RuntimeError, ValueError):  # with the process that kept the count
        return None


def gather_texts(text: str) -> list[str]:
    """Every process' text, in their order: all wait for each other, for as long as it takes.

    It goes through the service that jax' processes know each other by: its collectives give up after half a minute.
    """
    client, rank, count = _state().client, _state().process_id, _state().num_processes
    if client is None or count == 1:
        return [text]
    number = int(client.key_value_increment(f"gptj.texts.{rank}", 1))
    client.key_value_set(f"gptj.text.{number}.{rank}", text)
    texts = [client.blocking_key_value_get(f"gptj.text.{number}.{n}", 1000 * _A_DAY_S) for n in range(count)]
    if number > 1:  # which all have read who have written this one
        client.key_value_delete(f"gptj.text.{number - 1}.{rank}")
    return texts


def _state() -> Any:
    """jax's own account of the processes; its `client`, the service that all know, is None where one is alone."""
    from jax._src import distributed  # jax has no public door to it

    return distributed.global_state


def share_number(number: int) -> int:
    """The first process' number, 0 to 2**63 - 1."""
    if jax.process_count() == 1:
        return number
    halves = np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return int(high) << 32 | int(low)


def make_keys() -> Keys:
    """A connection to the names that all processes know; it waits for as long as it takes, and the first is there.

    Who asks for one watches the first process, whose end jax no longer learns, so that it cannot abort this one.
    """
    client = _state().client
    for relay in _RELAYS:
        relay.keeps_open = True

    def tell(name: str, text: str) -> None:
        _require_first()
        client.key_value_set(name, text)

    def ask(name: str) -> str:
        while True:
            _require_first()
            try:
                return str(client.blocking_key_value_get(name, 1000))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    return Keys(tell, ask, client.key_value_delete)


def _require_first() -> None:
    if _is_first_gone():
        raise ConnectionError("the first process is gone")
