"""The processes of torch.distributed that compute one model together: how they come, talk and leave."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gptj.sharding import (
    Keys,
    Processes,
    environment_place,
    interface_of,
    join_seconds,
    leave_in_order,
    own_address,
)

_WORK = timedelta(minutes=30)
"""How long a process waits for what others do. One that is no more is noticed at once."""


def join_processes() -> Processes:
    """Make the processes that torchrun started know each other; a process that was started alone is alone.

    Raises:
        InputError: torchrun's variables are there in part.
    """
    count, index = environment_place("WORLD_SIZE", "RANK")
    if count is not None and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        limit = timedelta(seconds=join_seconds())
        store, rank, size = next(dist.rendezvous("env://", index or 0, count, timeout=limit))
        store.set_timeout(limit)
        _choose_interface(store, rank, size)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=dist.PrefixStore("default_pg", store), rank=rank,
            world_size=size, timeout=limit,
        )  # fmt: skip
        dist.distributed_c10d._set_pg_timeout(_WORK)  # a process may write for longer than it may take to come
    elif not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Processes(index or 0, count or 1)


def _choose_interface(store: Any, rank: int, size: int) -> None:
    """Tell gloo by which interface hosts reach each other, unless GLOO_SOCKET_IFNAME says it, or there is one host."""

    def gather(text: str) -> list[str]:
        store.set(f"gptj.address.{rank}", text)
        return [store.get(f"gptj.address.{n}").decode() for n in range(size)]

    if "GLOO_SOCKET_IFNAME" not in os.environ:
        address = own_address(os.environ.get("MASTER_ADDR", ""), gather)
        if address is not None and (name := interface_of(address)) is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def count_devices() -> int:
    """How many devices there are for a model: one a process."""
    return dist.get_world_size()


def leave_processes() -> None:
    """Let go of the others; the first, which keeps the store, goes last."""
    if dist.is_initialized():
        place, store = Processes(dist.get_rank(), count_devices()), dist.distributed_c10d._get_default_store()
        dist.destroy_process_group()
        leave_in_order(place, lambda more: int(store.add("gptj.left", more)))


def is_of_processes(error: BaseException) -> bool:
    """Whether it tells of another process that is no more: gloo's, nccl's and the store's own words."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "TCPStore")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, dist.DistError)


def speaks_first() -> bool | None:
    """Whether no other process failed before this one: for the first to say why. None where that is not known."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("gptj.failed", 1)) == 1
    except (RuntimeError, ValueError):  # with the process that kept the count
        return None


def share_number(number: int) -> int:
    """The first process' number, 0 to 2**63 - 1."""
    numbers = [number]
    dist.broadcast_object_list(numbers, 0)
    return int(numbers[0])


def gather_texts(text: str) -> list[str]:
    """Every process' text, in their order: all wait for each other."""
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def make_keys() -> Keys:
    """A connection of its own to the names that all processes know; it waits for as long as it takes."""
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(days=1))
    return Keys(store.set, lambda name: store.get(name).decode(), store.delete_key)
