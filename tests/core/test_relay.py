"""The way to a service: whose end is the client's too, or is told beside it while the client goes on."""

from __future__ import annotations

import socket

import pytest

from gptj.sharding import Relay


def joined() -> tuple[Relay, socket.socket, socket.socket]:
    """A relay, and the two ends that it has between them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        relay = Relay(*listening.getsockname())
        host, _, port = relay.address.rpartition(":")
        client = socket.create_connection((host, int(port)), timeout=20)
        service, _ = listening.accept()
    service.settimeout(20)
    return relay, client, service


def read(end: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += end.recv(1 << 20)
    return found


def test_both_ways_are_passed_on_whole():
    relay, client, service = joined()
    with client, service:
        for one, other in ((client, service), (service, client)):
            one.sendall(b"x" * 3_000_000 if one is service else b"ask")
            assert read(other, 3 if one is client else 3_000_000).strip(b"x") == (b"ask" if one is client else b"")
        relay.keeps_open = True
        client.shutdown(socket.SHUT_RDWR)
        assert service.recv(1) == b""
        assert not relay.broken.wait(0.2)  # it was the client that left


def test_the_services_end_is_the_clients_unless_that_is_to_stay():
    relay, client, service = joined()
    with client, service:
        service.close()
        assert client.recv(1) == b"" and not relay.broken.is_set()
    relay, client, service = joined()
    with client, service:
        relay.keeps_open = True
        service.close()
        assert relay.broken.wait(20)
        for _ in range(9):
            client.sendall(b"is anybody there")  # into nothing, whatever the system says of it
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_client_whose_service_is_not_there_yet_may_ask_again():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = listening.getsockname()
    relay = Relay(*place)
    host, _, port = relay.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        assert client.recv(1) == b""
    with socket.create_server(place) as listening, socket.create_connection((host, int(port)), timeout=20) as client:
        service, _ = listening.accept()
        with service:
            client.sendall(b"ask")
            assert read(service, 3) == b"ask"
