"""The OpenAI API of one replica over plain HTTP: for whoever has no gateway, and for control's health checks.

The inference routes are bare ASGI (a stream's events go out as they come, and a client that leaves frees its slot);
Starlette does the routing, uvicorn the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Iterator, Sequence
from uuid import uuid4

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from neaptide import __version__
from neaptide.clock import mono_s, wall_s
from neaptide.engine import refusals
from neaptide.engine.intake import MAX_BODY_BYTES
from neaptide.engine.pool import Pool
from neaptide.engine.requests import Job
from neaptide.engine.service import DEAD, READY
from neaptide.errors import RequestError
from neaptide.link import CREDIT_BYTES, EndHeader, OpenHeader
from neaptide.wire import chunks

STUCK_S = 60.0  # an engine that has work and says nothing for this long is no longer alive
MAX_PREFIX_BYTES = 4 << 20
_prefixes = msgspec.json.Decoder(dict[str, list[list[int]]]).decode
POSTS = {"/v1/chat/completions": "chat.completions", "/v1/completions": "completions", "/tokenize": "tokenize"}


class HttpSink:
    """One request's Sink; `changed` is set whenever there is something to send, or nobody left to send it to."""

    def __init__(self) -> None:
        self.credit = CREDIT_BYTES
        self.extra: list[tuple[str, str]] = []
        self.data: list[bytes] = []
        self.owed = 0  # bytes taken from the credit, to be given back once they are written
        self.header: EndHeader | None = None
        self.last = b""
        self.gone = False
        self.changed = asyncio.Event()

    def headers(self, pairs: list[tuple[str, str]]) -> None:
        self.extra += pairs

    def token(self, ids: Sequence[int], data: bytes) -> None:
        size = 2 + 4 * len(ids) + len(data)
        self.credit -= size
        self.owed += size
        if data:
            self.data.append(data)
        self.changed.set()

    def end(self, header: EndHeader, last: bytes) -> None:
        self.header, self.last = header, last
        self.changed.set()


class Inference:
    """An ASGI endpoint for one inference route."""

    def __init__(self, service: Pool, route: str) -> None:
        self._service, self._route = service, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read(Request(scope), receive)
        except RequestError as e:
            await _error(e)(scope, receive, send)
            return
        if body is None:
            return
        opened = OpenHeader(request_id=uuid4().hex, route=self._route, body_bytes=len(body))
        sink = HttpSink()
        sink.headers([("X-Request-Id", opened.request_id)])
        job = self._service.open(opened, body, sink, from_body=True)
        watcher = asyncio.create_task(_watch(receive, sink))
        try:
            await self._answer(job, sink, send)
        finally:
            watcher.cancel()
            self._service.abort(job)  # a no-op once it has ended
            self._service.changed()

    async def _read(self, request: Request, receive: Receive) -> bytes | None:
        """The body, counted against the replica's bytes; None when the client left. RequestError 413, 415, 429."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, "Content-Encoding is not supported: send the body as it is.")
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY_BYTES:
                raise refusals.body_too_large(size, MAX_BODY_BYTES)
            if not message.get("more_body", False):
                break
        if (refusal := self._service.held.reserve(size)) is not None:
            raise refusal
        return b"".join(parts)

    async def _answer(self, job: Job, sink: HttpSink, send: Send) -> None:
        started = False
        while True:
            await sink.changed.wait()
            sink.changed.clear()
            if sink.gone:
                return
            data, owed, sink.data, sink.owed = b"".join(sink.data), sink.owed, [], 0
            header = sink.header
            if header is not None:
                data += sink.last
            if not started and (data or header is not None):
                started = True
                await send(_start(header, sink))
            if started:
                await send({"type": "http.response.body", "body": data, "more_body": header is None})
            if header is not None:
                return
            sink.credit += owed
            self._service.credit_came(job)


async def _watch(receive: Receive, sink: HttpSink) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    sink.gone = True
    sink.changed.set()


def _start(header: EndHeader | None, sink: HttpSink) -> Message:
    """Before its END an answer can only be a stream."""
    status, kind = (200, "text/event-stream") if header is None else (header.status, header.content_type)
    if header is not None and header.finish == "abort":
        status = 499  # nobody reads it
    headers = [("content-type", kind), *sink.extra]
    if kind == "text/event-stream":
        headers.append(("cache-control", "no-cache"))
    if status in (429, 503):
        headers.append(("retry-after", "1"))
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {"type": "http.response.start", "status": status, "headers": raw}


class Pages:
    """What is not inference: health, metrics, models."""

    def __init__(self, service: Pool, stages: dict[str, float]) -> None:
        self._service, self._stages = service, stages
        self._created_s = int(wall_s())

    async def health(self, request: Request) -> Response:
        """Liveness: 503 once the engine is gone or has been silent over work for STUCK_S."""
        stuck = self._service.stuck_s(mono_s()) > STUCK_S
        status = "stuck" if stuck else self._service.state
        return _json({"status": status, "stages": self._stages}, 503 if stuck or status == DEAD else 200)

    async def ready(self, request: Request) -> Response:
        state = self._service.state
        return _json({"status": state}, 200 if state == READY else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._service.metrics(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        body = chunks.model_list(self._service.contexts(), self._created_s)
        return Response(body, media_type="application/json")

    async def version(self, request: Request) -> Response:
        spec = self._service.spec
        return _json({"version": __version__, "engine": spec.engine, "revision": spec.revision})

    async def stages(self, request: Request) -> Response:
        return _json(self._stages)

    async def about(self, request: Request) -> Response:
        """What control shows of a replica: its start, what it can do, how busy it is."""
        service = self._service
        return _json(
            {
                "stages": self._stages,
                "description": service.description,
                "members": service.descriptions(),
                "load": service.load(),
                "steps": service.steps(),
                "primed_tokens": service.primed_tokens(),
            }
        )

    async def prefixes(self, request: Request) -> Response:
        """Beginnings of prompts, as token ids: to be had and given with the boot token alone, whoever can connect."""
        token, sent = self._service.spec.token, request.headers.get("authorization", "")
        if not token or not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            return _error(RequestError(401, "The boot token is missing or wrong.", slug="invalid_api_key"))
        if request.method == "GET":
            return _json(self._service.prefixes())
        if int(request.headers.get("content-length", MAX_PREFIX_BYTES + 1)) > MAX_PREFIX_BYTES:
            return _error(refusals.body_too_large(MAX_PREFIX_BYTES + 1, MAX_PREFIX_BYTES))
        try:
            self._service.prime(_prefixes(await request.body()))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            return _error(RequestError(400, f"These are no prefixes: {e}"))
        return _json({"models": len(self._service.services)})


def application(service: Pool, stages: dict[str, float]) -> Starlette:
    """`stages`: seconds of each start-up stage; filled while the replica starts."""
    pages = Pages(service, stages)
    routes: list[BaseRoute] = [
        Route(path, Inference(service, route), methods=["POST"]) for path, route in POSTS.items()
    ]
    routes += [
        Route("/health", pages.health),
        Route("/health/ready", pages.ready),
        Route("/metrics", pages.metrics),
        Route("/v1/models", pages.models),
        Route("/version", pages.version),
        Route("/stages", pages.stages),
        Route("/about", pages.about),
        Route("/prefixes", pages.prefixes, methods=["GET", "POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_exception})


async def _http_exception(request: Request, e: Exception) -> Response:
    status = e.status_code if isinstance(e, HTTPException) else 500
    message = f"{request.method} {request.url.path[:128]} is not served here."
    return _error(RequestError(status, message, slug="not_found" if status == 404 else "method_not_allowed"))


def _error(e: RequestError) -> Response:
    headers = {"retry-after": "1"} if e.status in (429, 503) else None
    return Response(chunks.error_body(e), e.status, headers, "application/json")


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server(app: Starlette) -> HttpServer:
    """Serve with `await server(app).serve(sockets=[...])`; ends when `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        backlog=1024,
    )
    return HttpServer(config)
