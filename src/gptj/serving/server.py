"""The socket under the routes: how long a connection may be silent, and how the server ends.

The first signal ends it in order: no new requests, and those that are there are finished. The second ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptj.errors import InputError
from gptj.serving.refusals import Refusal

__all__ = ["HEADERS_S", "Server", "listen"]

HEADERS_S = 20.0
"""Seconds until a connection's first request must have begun."""

UNREAD_S = 30.0
"""Seconds for which a client may read nothing of what waits for it."""

_HEADER_BYTES = 64 * 1024

_HINTS = {
    errno.EADDRINUSE: "--port 0 takes any that is free",
    errno.EACCES: "Ports below 1024 are the system's: take one above",
    errno.EADDRNOTAVAIL: "Give an address of this machine; 0.0.0.0 is all of them",
    socket.EAI_NONAME: "Give an address of this machine; 0.0.0.0 is all of them",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        InputError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(512)
    except (OSError, OverflowError, UnicodeError) as error:
        found.close()
        place = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        number, why = (error.errno, error.strerror) if isinstance(error, OSError) else (None, str(error))
        hint = None if number is None else _HINTS.get(number)
        raise InputError(
            "cannot listen there", where="--host and --port", found=f"{place} ({why})", hint=hint
        ) from error
    return found


def _backlog() -> int:
    """Connections to be accepted in one go: an eighth of the files that may be open.

    Three eighths are held, three may be on their way from accept to `connection_made`, two are left to others. Where
    none is left, asyncio goes on, and writes a traceback each time: 190 MB in a minute were seen.
    """
    try:
        import resource
    except ImportError:  # not a system that has it
        return 128
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2048 if most == resource.RLIM_INFINITY else min(max(most // 8, 1), 2048)


class Protocol(H11Protocol):
    """HTTP that waits for nobody for ever, and refuses in JSON what is no HTTP.

    uvicorn waits between two requests, but not while the lines of one come byte by byte, or a body that was not read.
    """

    headers_s, rest_s, unread_s = HEADERS_S, 2.0, UNREAD_S
    _late: asyncio.TimerHandle | None = None
    _is_refused = False
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timeout of a request; close what is too much."""
        super().connection_made(transport)
        if len(self.connections) > 3 * self.config.backlog:
            headers = {"Retry-After": "1"}
            self._refuse(Refusal(503, "too many connections", code="too_many_connections", headers=headers), "Busy")
            transport.close()
            return
        transport.set_write_buffer_limits(high=0)  # whatever the system does not take is waited for
        self._late = self.loop.call_later(self.headers_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeouts."""
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the timeout of a client that does not read what waits for it."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stop that timeout."""
        self._stop_watching()
        super().resume_writing()

    def _watch(self, waiting: int) -> None:
        self._stop_watching()
        self._unread = self.loop.call_later(self.unread_s, self._leave_unread, waiting)

    def _leave_unread(self, before: int) -> None:
        """Close the connection of a client that has read none of the bytes that wait for it."""
        self._unread = None
        waiting = self.transport.get_write_buffer_size()
        if waiting < before:
            self._watch(waiting)
        else:
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        """Read on; wait for the rest of a request that has begun."""
        if self._is_refused:  # read and thrown away: the system takes an answer back where what was sent is not read
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(self.headers_s, self._give_up)

    def eof_received(self) -> Any:
        """Refuse a request that has no end, and who waits for a long answer with half a connection: they look alike."""
        is_waited_for = self.cycle is not None and not self.cycle.response_complete
        begun = self.conn.their_state is h11.SEND_BODY or (
            self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        )
        if not begun and is_waited_for and self.scope["method"] != "POST":
            return True  # the answer is short: it is written before the other half is closed
        if not self._is_refused and (begun or is_waited_for):
            self._refuse(Refusal(400, "the connection ended before the answer", code="invalid_http"), "Bad Request")
        return None

    def on_response_complete(self) -> None:
        """Close the connection of a client that goes on sending after its answer, or whose request had two lengths."""
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
            self.transport.close()  # a proxy may have taken the other for the request's end (RFC 9112, 6.1)
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(self.rest_s, self._leave, self.cycle)

    def _leave(self, cycle: Any) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(Refusal(408, "the request did not come in time"), "Request Timeout")

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for websockets gets an answer in HTTP, and there is nothing to install."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(Refusal(400, "this is no HTTP request", code="invalid_http"), "Bad Request")

    def _refuse(self, refusal: Refusal, phrase: str) -> None:
        body = json.dumps(refusal.body).encode()
        head = f"HTTP/1.1 {refusal.status} {phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun, or is there
            self.transport.close()
            return
        self._is_refused = True
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if self.cycle is not None and not self.cycle.response_complete:  # whose body this was
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        self.loop.call_later(self.rest_s, self.transport.close)


_AT_ONCE_S = 0.5
"""Seconds in which a server closes its listener and stops its connections, whose answers are not waited for."""


class Server(uvicorn.Server):
    """The server of an application.

    Args:
        app: of `make_app`.
        close: finishes what was begun, and is called when no request is left, with the seconds that it may take.
        drain_s: seconds that requests have to finish once the end was asked for.

    Attributes:
        was_forced: whether the end was asked for twice.
    """

    def __init__(self, app: Any, *, close: Callable[[float | None], Any], drain_s: float | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            access_log=False,
            log_config=None,
            backlog=_backlog(),
            server_header=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=None if drain_s is None else max(math.ceil(drain_s), 1),
        )
        super().__init__(config)
        self._close, self._ready = close, lambda: None
        self.should_exit = self.force_exit = False
        self.was_forced = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen to signals, in the main thread alone; afterwards all is as it was."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Shut down in order, at the second signal at once."""
        if self.should_exit:
            self.force_exit = self.was_forced = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so: from here on a signal ends it in order."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in order, at the second signal at once: from Python 3.12 on a listener waits for its connections."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not (ending.done() or self.force_exit):
            await asyncio.wait([ending], timeout=0.1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending, _AT_ONCE_S)

    def serve_on(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a shutdown is asked for, then finish the answers that were begun; `ready` says that it began."""
        self._ready = ready
        asyncio.run(self.serve(sockets=[listener]))
        self._close(0.0 if self.was_forced else None)
