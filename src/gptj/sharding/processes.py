"""Processes that compute one model together: which of how many this is, as the launcher's variables say."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from gptj.config.schema import TensorSpec
from gptj.errors import InputError, shown

__all__ = [
    "Processes",
    "ReadTogether",
    "environment_place",
    "interface_of",
    "join_seconds",
    "leave_in_order",
    "own_address",
    "require_same",
]


class Processes(NamedTuple):
    """The number of this one, and how many there are.

    Attributes:
        rank: this process' number, from 0.
        size: how many there are.
    """

    rank: int
    size: int


def environment_place(count_name: str, index_name: str) -> tuple[int | None, int | None]:
    """The number of processes and this one's own, as two environment variables say; None where neither is set.

    Raises:
        InputError: one is set without the other, or is no such number.
    """
    said = {name: os.environ.get(name) for name in (count_name, index_name)}
    if all(value is None for value in said.values()):
        return None, None
    numbers = []
    for name, value in said.items():
        if value is None or not value.isdecimal():
            raise InputError(
                "no number", where=f"environment: {name}", expected=f"one, beside {count_name} and {index_name}",
                found=shown(value),
            )  # fmt: skip
        numbers.append(int(value))
    count, index = numbers
    if index >= count:
        raise InputError("not among them", where=f"environment: {index_name}", expected=f"below {count}", found=index)
    return count, index


def join_seconds() -> int:
    """How long a process waits for the others to come: GPTJ_JOIN_SECONDS, or 30.

    Raises:
        InputError: it is no such number.
    """
    return seconds_of("GPTJ_JOIN_SECONDS", 30)


def seconds_of(name: str, default: int) -> int:
    """Whole seconds, as an environment variable says.

    Raises:
        InputError: it is no such number.
    """
    said = os.environ.get(name, str(default))
    if not said.isdecimal() or int(said) < 1:
        raise InputError("no number", where=f"environment: {name}", expected="1 or more", found=shown(said))
    return int(said)


def leave_in_order(place: Processes, count: Callable[[int], int]) -> None:
    """Let the first process, which keeps what the others still ask, be the last to leave.

    Args:
        place: this process'.
        count: adds so many to the number of those that left, and gives it.
    """
    if place.rank > 0:
        count(1)
        return
    latest_s = time.monotonic() + join_seconds()
    while count(0) < place.size - 1 and time.monotonic() < latest_s:
        time.sleep(0.01)


def own_address(coordinator: str, gather: Callable[[str], list[str]]) -> str | None:
    """The address at which this process' host is known to the others', None where all are on one host.

    gloo would take what the host's own name means, which is often an address of the host's alone (127.0.1.1), or
    nothing that it knows.

    Args:
        coordinator: the name or address of the host that all processes know.
        gather: gives every process' text, in their order; all wait for each other.
    """
    mine = _source_towards(coordinator)
    found = gather(mine)
    elsewhere = [address for address in found if address and not _is_loopback(address)]
    if len(set(found)) == 1 or not elsewhere:
        return None
    return _source_towards(elsewhere[0]) if _is_loopback(mine) else mine or None


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address first; None where that cannot be told."""
    try:
        import fcntl

        wanted, asked = socket.inet_aton(address), _SIOCGIFADDR
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_one:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(any_one, asked, struct.pack("256s", name.encode()))
                except OSError:  # it has none
                    continue
                if answer[20:24] == wanted:
                    return name
    except (ImportError, OSError):  # another system, or another kind of address
        pass
    return None


_SIOCGIFADDR = 0x8915
"""Linux' question for an interface's address."""


def _source_towards(host: str) -> str:
    """This host's address on the way to another; empty where there is no way. Nothing is sent."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as way:
                way.connect(place)
                return str(way.getsockname()[0])
    except OSError:
        pass
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def require_same(mine: str, share_number: Callable[[int], int], *, problem: str, file: Any, hint: str) -> None:
    """Refuse what is another in this process than in the first; every process calls it.

    Args:
        mine: a hash of it, in hexadecimal.
        share_number: gives the first process' number.

    Raises:
        InputError: saying the problem.
    """
    number = int(mine[:15], 16)
    if share_number(number) != number:
        raise InputError(problem, file=file, expected="the same in every process", hint=hint)


class ReadTogether:
    """Reads rows of a model that processes hold in parts: every process must read the same ones, in one order.

    Args:
        rows: all of them.
        read: gives a row's values; the others wait for each call.
    """

    def __init__(self, rows: Iterable[TensorSpec], read: Callable[[TensorSpec], NDArray[Any]]) -> None:
        self._left = {row.name: row for row in rows}
        self._read = read

    def __call__(self, row: TensorSpec) -> NDArray[Any]:
        """The row's values."""
        del self._left[row.name]
        return self._read(row)

    def finish(self) -> None:
        """Read what is left, whatever became of the first: the other processes wait for it."""
        for row in [*self._left.values()]:
            self(row)
