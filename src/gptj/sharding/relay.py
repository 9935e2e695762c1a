"""A way to the service that processes know each other by, which stays open where the service is gone.

jax aborts a process the moment that its connection to the service breaks, with status -6 and pages of its own, before
anything else could say what happened. Through a `Relay` that connection ends here, and not with the first process.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

__all__ = ["Relay"]


class Relay:
    """Passes bytes between clients of this process and a service of another.

    Args:
        host, port: the service's.

    Attributes:
        address: HOST:PORT for the clients.
        keeps_open: whether a client's connection stays open when the service's breaks. It is then never answered.
        broken: is set when the service's connection broke before a client's.
    """

    def __init__(self, host: str, port: int) -> None:
        self._service = host, port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.keeps_open, self.broken = False, threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Both ways of one client's connection, until it ends."""
        try:
            service = socket.create_connection(self._service)
        except OSError:  # nobody listens yet: the client asks again
            client.close()
            return
        left = threading.Event()
        with client, service:
            for end in client, service:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answering = threading.Thread(target=self._answer, args=(service, client, left), daemon=True)
            answering.start()
            for data in _received(client):
                with contextlib.suppress(OSError):  # the service is gone, and the client must not be
                    service.sendall(data)
            left.set()
            _hang_up(service)
            answering.join()

    def _answer(self, service: socket.socket, client: socket.socket, left: threading.Event) -> None:
        """Pass on the service's bytes, until it ends."""
        with contextlib.suppress(OSError):  # the client is gone
            for data in _received(service):
                client.sendall(data)
        if not self.keeps_open:
            _hang_up(client)
        elif not left.is_set():
            self.broken.set()


def _received(source: socket.socket) -> Iterator[bytes]:
    """Yield the bytes that come, until the other side ends, however it does."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            yield data


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
