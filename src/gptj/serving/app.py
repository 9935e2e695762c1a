"""The routes of the server, and what a request meets on its way: size, key, form, queue, time.

GET  /                       a page to try it
GET  /health                 whether the engine runs
GET  /metrics                for Prometheus
GET  /v1/models              the model and its adapters
POST /v1/completions         text continued
POST /v1/chat/completions    a conversation continued, where the folder has a chat template
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gptj.serving.answers import Answer, event
from gptj.serving.channel import Channel, Left
from gptj.serving.continuation import Continuation
from gptj.serving.refusals import Refusal, refusal_of
from gptj.serving.requests import CompletionRequest, read_chat, read_completion, read_json
from gptj.serving.service import Service

__all__ = ["Access", "Limits", "is_loopback", "make_app"]

PAGE = Path(__file__).with_name("page.html")
_log = logging.getLogger("gptj.serving")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of a request.

    Attributes:
        body_bytes: of its body.
        read_s: seconds until its body is there.
        answer_s: seconds until its answer is.
    """

    body_bytes: int = 4 * 2**20
    read_s: float = 20.0
    answer_s: float = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """The keys and origins that may ask.

    Attributes:
        api_key: needed for /v1 and /metrics; None lets everybody.
        origins: whose pages may read answers, "*" for all; none but our own where it is empty.
        loopback: whether only this machine reaches the server.
    """

    api_key: str | None = None
    origins: Sequence[str] = ()
    loopback: bool = True


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by this name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_app(service: Service, *, limits: Limits | None, access: Access | None) -> Starlette:
    """The application.

    Args:
        service: what is served; its engine must have been started.
        limits: what a request may take.
        access: who may ask.
    """
    doors = _Doors(service, limits or Limits(), access or Access())
    origins = list(doors.access.origins)
    cors = Middleware(
        _Preflights,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client in a browser sends x-stainless-* of its own
    )
    app = Starlette(
        routes=[
            Route("/", doors.page),
            Route("/health", doors.health),
            Route("/metrics", doors.metrics),
            Route("/v1/models", doors.models),
            Route("/v1/models/{name:path}", doors.model),
            Route("/v1/completions", doors.completions, methods=["POST"]),
            Route("/v1/chat/completions", doors.chat, methods=["POST"]),
        ],
        middleware=[Middleware(_WholeTargets), *([cors] if origins else [])],
        exception_handlers={Refusal: _answer_refusal, HTTPException: _answer_http, Exception: _answer_any},
    )
    app.router.redirect_slashes = False  # a path with a slash too many is not there, and said so in JSON
    return app


class _WholeTargets:
    """A target as proxies are told it, http://host/path, is taken for its path (RFC 9112, 3.2.2).

    Args:
        app: what is asked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = re.fullmatch(r"https?://[^/]*(/.*)?", scope.get("path", ""), re.DOTALL | re.IGNORECASE)
        await self._app(scope if whole is None else {**scope, "path": whole[1] or "/"}, receive, send)


class _Preflights(CORSMiddleware):
    """CORS, whose refusals are JSON as all are."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks whether a page may ask."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        own = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        said = "pages of this origin, or with this method, may not ask; --cors lets origins"
        return _error(Refusal(response.status_code, said, code="origin_not_allowed", headers=own))


# ---- errors


def _error(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error(error)


def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this path", 405: f"{request.method[:20]} is not for this path"}
    headers = dict(error.headers or {})
    return _error(Refusal(error.status_code, said.get(error.status_code, "refused"), headers=headers))


def _answer_any(request: Request, error: Exception) -> Response:
    return _error(refusal_of(error))


def _stopped() -> Refusal:
    return Refusal(503, "the server was stopped", code="shutting_down")


class _Doors:
    """The handlers of the routes."""

    def __init__(self, service: Service, limits: Limits, access: Access) -> None:
        self.service, self.limits, self.access = service, limits, access
        self._metrics = service.engine.metrics
        self._page, self._policy = _read_page()

    async def page(self, request: Request) -> Response:
        """The page."""
        headers = {"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self._page, headers={**headers, "Referrer-Policy": "no-referrer"})

    async def health(self, request: Request) -> Response:
        """Whether the engine runs."""
        alive = self.service.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """The metrics."""
        self._check_access(request)
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The models."""
        self._check_access(request)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, request: Request) -> Response:
        """One model."""
        self._check_access(request)
        name = request.path_params["name"]
        if name not in self.service.names:
            raise Refusal(404, "no model is called so here", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        positions = self.service.model_config.n_positions
        owned = {"id": name, "object": "model", "created": self.service.created, "owned_by": "gptj"}
        return {**owned, "max_model_len": positions}

    async def completions(self, request: Request) -> Response:
        """Completions."""
        return await self._counted(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        return await self._counted(request, read_chat)

    # ---- parts of the above

    async def _counted(self, request: Request, read: Callable[[dict[str, Any]], CompletionRequest]) -> Response:
        path, begin = request.url.path, time.monotonic()
        try:
            self._check_access(request)
            response = await self._answer(request, read, begin)
        except ClientDisconnect:  # before its body was there
            response = Response(status_code=499)
        except asyncio.CancelledError:  # the end was asked for twice, or took too long
            response = _error(_stopped())
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.error("a request failed", exc_info=error)
            response = _error(refusal)
        self._metrics.add("gptj_requests_total", path=path, status=str(response.status_code))
        return response

    def _check_access(self, request: Request) -> None:
        """Refuse who has not the key, and pages of others.

        A page in somebody's browser reaches what only this machine does; without a key, the page's own address is all
        that tells it from ours.
        """
        key = self.access.api_key
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), key.strip().encode())
            if scheme.lower() != "bearer" or not same:
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, "a wrong API key, or none", code="invalid_api_key", headers=headers)
            return
        origin = request.headers.get("origin")
        if origin is None or "*" in self.access.origins or origin in self.access.origins:
            return
        try:
            host, own = urlsplit(origin).hostname, urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            host = own = None
        if host is None or (not is_loopback(host) if self.access.loopback else host != own):
            raise Refusal(403, "pages of other origins may not ask; --cors lets them", code="origin_not_allowed")

    async def _answer(
        self, request: Request, read: Callable[[dict[str, Any]], CompletionRequest], begin: float
    ) -> Response:
        kind, _, more = request.headers.get("content-type", "").lower().partition(";")
        charset = re.search(r'charset\s*=\s*"?([^\s";]*)', more)
        if kind.strip() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
            raise Refusal(415, "Content-Type: expected application/json in UTF-8", code="unsupported_media_type")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise Refusal(415, "Content-Encoding: a body is read as it is", code="unsupported_media_type")
        body = await self._read_body(request)
        channel = Channel()
        asked, answer, continuations = await asyncio.to_thread(self._prepare, read, body, channel)
        making = _Making(self.service, asked, answer, continuations, channel, self.limits.answer_s)
        making.begin = begin
        self.service.engine.submit(continuations)
        return making.stream(request) if asked.stream else await making.whole(request)

    def _prepare(
        self, read: Callable[[dict[str, Any]], CompletionRequest], body: bytes, channel: Channel
    ) -> tuple[CompletionRequest, Answer, list[Continuation]]:
        """The parts of a request that take time and no event loop: JSON, tokens, settings."""
        asked = read(read_json(body))
        channel.waits = not asked.stream
        choices = self.service.choices(asked)
        return asked, Answer(self.service, asked, choices), self.service.continuations(asked, choices, channel.listener)

    async def _read_body(self, request: Request) -> bytes:
        """The body.

        Raises:
            Refusal: it is too large, or does not come in time.
        """
        limit = self.limits.body_bytes
        size, parts = 0, []
        waits = "expect" in request.headers  # its client sends nothing before it is told to go on
        told = request.headers.get("content-length", "")
        too_large = Refusal(413, f"the body is larger than {limit} bytes", code="body_too_large")
        too_large.headers["Connection"] = "close"
        if told.isdecimal() and int(told[:20]) > (limit if waits else 8 * limit):
            raise too_large
        try:
            async with asyncio.timeout(self.limits.read_s):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                    elif size > 8 * limit:  # up to there it is read, since who is still writing does not read
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "the body did not come in time", headers={"Connection": "close"}) from None
        if size > limit:
            raise too_large
        return b"".join(parts)


class _Making:
    """The continuations of a request, from the engine to the client.

    Args:
        service: what is served.
        asked, answer, continuations, channel: the request, its answer, and where that comes from.
        answer_s: seconds that it may take.
    """

    def __init__(
        self,
        service: Service,
        asked: CompletionRequest,
        answer: Answer,
        continuations: Sequence[Continuation],
        channel: Channel,
        answer_s: float,
    ) -> None:
        self._service, self._asked, self._answer = service, asked, answer
        self._continuations, self._channel = continuations, channel
        self._answer_s = answer_s
        self.begin = time.monotonic()

    async def whole(self, request: Request) -> Response:
        """The answer in one piece."""
        watch = self._watch(request)
        try:
            async with asyncio.timeout(self._answer_s):
                await self._events(lambda made: _nothing())
        except TimeoutError:  # OpenAI's client asks a second and a third time for what took too long, unless it is told
            headers = {"x-should-retry": "false"}
            raise Refusal(504, "the answer took too long", code="timeout", headers=headers) from None
        except Left:
            return Response(status_code=499)
        finally:
            self._end(watch)
        return JSONResponse(self._answer.whole)

    def stream(self, request: Request) -> Response:
        """The answer piece by piece."""
        return _EventStream(lambda send: self._stream(request, send))

    async def _stream(self, request: Request, send: Callable[[bytes], Any]) -> None:
        watch = self._watch(request)
        try:
            async with asyncio.timeout(self._answer_s):
                for one in self._answer.begin():
                    await send(one)
                await self._events(send)
                for one in self._answer.end():
                    await send(one)
        except Left:
            return
        except asyncio.CancelledError:
            await self._send_error(send, _stopped())
        except TimeoutError:
            await self._send_error(send, Refusal(504, "the answer took too long", code="timeout"))
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.error("a request failed", exc_info=error)
            await self._send_error(send, refusal)
        finally:
            self._end(watch)

    async def _send_error(self, send: Callable[[bytes], Any], refusal: Refusal) -> None:
        try:
            async with asyncio.timeout(1):
                await send(event(refusal.body))
        except (TimeoutError, OSError):
            return

    async def _events(self, send: Callable[[bytes], Any]) -> None:
        metrics, begun = self._service.engine.metrics, False
        while not self._answer.is_done:
            index, told = await self._channel.next()
            if not begun:
                metrics.observe("gptj_first_token_seconds", time.monotonic() - self.begin)
                begun = True
            self._answer.reused = sum(one.reused for one in self._continuations[:: self._asked.n])
            made = self._answer.add(index, told)
            if made is not None:
                await send(made)
        metrics.observe("gptj_request_seconds", time.monotonic() - self.begin)

    def _watch(self, request: Request) -> asyncio.Task[None]:
        async def until_left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._channel.leave()

        return asyncio.create_task(until_left())

    def _end(self, watch: asyncio.Task[None]) -> None:
        """Free what is still being made."""
        watch.cancel()
        for one in self._continuations:
            one.left = not one.ended
        self._service.engine.wake()


async def _nothing() -> None:
    return


class _EventStream(Response):
    """Server-sent events.

    Args:
        run: sends them, given what sends one.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Callable[[Callable[[bytes], Any]], Any]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run = run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_part(part: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._run(send_part)
        await send_part(b"", more=False)


def _read_page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and style, and ask this server alone."""
    page = PAGE.read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    rules = ["default-src 'none'", f"script-src {hashed('script')}", f"style-src {hashed('style')}"]
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return page, "; ".join(rules)
