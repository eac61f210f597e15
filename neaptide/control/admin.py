"""The admin API: Starlette over a ControlPort, on a listener of its own.

Every operation stands once in OPERATIONS: the routes and the OpenAPI document are both made from it, so that they
cannot differ. `Guard` goes ahead of all of them: Host (DNS rebinding), bearer token, body size, security headers. Only
/health, the documents and the pages' assets need no token; none of them tells anything of the running service. No
CORS: pages of other origins have no business here.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neaptide import __version__
from neaptide.control.port import (
    ApplyReport,
    BackupReport,
    Choices,
    ConfigView,
    ControlPort,
    CreatedKey,
    Decisions,
    DownReport,
    GroupBy,
    KeyChange,
    KeyInfo,
    Keys,
    Models,
    NewKey,
    NewOverride,
    ScaleRow,
    Scales,
    Shadows,
    Status,
    UsageFilter,
    UsagePage,
    UsageTotals,
)
from neaptide.errors import NeaptideError

log = logging.getLogger("neaptide.control")
MAX_BODY = 1 << 20  # bytes; a configuration is a few kilobytes
OPEN = ("/health", "/docs", "/openapi.json", "/openapi-inference.json")  # exact, or below /docs/
SECURITY = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
T = TypeVar("T")


class AdminError(NeaptideError):
    """A request that the admin API refuses. E601-E609, with the HTTP status they are answered with."""

    exit_code = 4

    def __init__(self, status: int, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix, code=code)
        self.status = status


# --- operations -------------------------------------------------------------------------------------------------------


class NoQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No query parameters."""


class ApplyQuery(NoQuery, frozen=True, kw_only=True):
    dry_run: bool = False  # only tell the difference
    origin: str = ""  # absolute path of the file: relative sources are looked for beside it; "" = beside the last one


async def _apply(a: Ask) -> ApplyReport:
    return await a.port.apply(a.body, a.query.dry_run, a.query.origin)


class UsageQuery(UsageFilter, frozen=True, kw_only=True):
    cursor: str | None = None  # `next` of the page before
    limit: int = 100  # rows, 1 to 1,000


class TotalsQuery(UsageFilter, frozen=True, kw_only=True):
    by: GroupBy = "model"


class DecisionsQuery(NoQuery, frozen=True, kw_only=True):
    limit: int = 50  # plans, 1 to 500


class WhyQuery(NoQuery, frozen=True, kw_only=True):
    model: str = ""  # "" = every model
    limit: int = 20  # choices, 1 to 200


class ModelQuery(NoQuery, frozen=True, kw_only=True):
    model: str


class ShadowsQuery(NoQuery, frozen=True, kw_only=True):
    model: str = ""  # "" = every model
    days: int = 1  # the last ones, 1 to 35


class DownQuery(NoQuery, frozen=True, kw_only=True):
    grace_s: float = 20.0  # seconds that running answers get


class Ask(NamedTuple):
    """One request, parsed: path parameters, query struct, body."""

    port: ControlPort
    path: dict[str, str]
    query: Any
    body: Any


class Operation(NamedTuple):
    id: str  # operationId; "op.<id>" is its text in the catalogue
    method: str
    path: str  # below /api/v1
    answer: Any  # the struct of a 200 (201) answer
    run: Callable[[Ask], Awaitable[Any]]
    query: Any = NoQuery
    body: Any = None  # None: no body; str: text; a struct: JSON
    status: int = 200


OPERATIONS = (
    Operation("getStatus", "GET", "/status", Status, lambda a: a.port.status()),
    Operation("apply", "POST", "/apply", ApplyReport, _apply, ApplyQuery, str),
    Operation("getConfig", "GET", "/config", ConfigView, lambda a: a.port.config()),
    Operation("listModels", "GET", "/models", Models, lambda a: a.port.models()),
    Operation("listKeys", "GET", "/keys", Keys, lambda a: a.port.keys()),
    Operation(
        "createKey", "POST", "/keys", CreatedKey, lambda a: a.port.create_key(a.body), NoQuery, NewKey, status=201
    ),
    Operation(
        "setKey", "PATCH", "/keys/{id}", KeyInfo, lambda a: a.port.set_key(a.path["id"], a.body), NoQuery, KeyChange
    ),
    Operation("revokeKey", "DELETE", "/keys/{id}", KeyInfo, lambda a: a.port.revoke_key(a.path["id"])),
    Operation("listUsage", "GET", "/usage", UsagePage, lambda a: _usage(a), UsageQuery),
    Operation(
        "getUsageTotals",
        "GET",
        "/usage/totals",
        UsageTotals,
        lambda a: a.port.usage_totals(_filter(a.query), a.query.by),
        TotalsQuery,
    ),
    Operation("listDecisions", "GET", "/decisions", Decisions, lambda a: _decisions(a), DecisionsQuery),
    Operation("listScales", "GET", "/scale", Scales, lambda a: a.port.scales()),
    Operation("explainScale", "GET", "/scale/why", Choices, lambda a: _choices(a), WhyQuery),
    Operation(
        "setScale", "POST", "/scale/override", ScaleRow, lambda a: a.port.set_override(a.body), NoQuery, NewOverride
    ),
    Operation(
        "clearScale", "DELETE", "/scale/override", ScaleRow, lambda a: a.port.clear_override(a.query.model), ModelQuery
    ),
    Operation("listShadows", "GET", "/scale/shadows", Shadows, lambda a: _shadows(a), ShadowsQuery),
    Operation("backup", "POST", "/backup", BackupReport, lambda a: a.port.backup(), status=201),
    Operation("down", "POST", "/down", DownReport, lambda a: _down(a), DownQuery, status=202),
)


def _filter(query: UsageFilter) -> UsageFilter:
    return UsageFilter(**{name: getattr(query, name) for name in UsageFilter.__struct_fields__})


async def _usage(a: Ask) -> UsagePage:
    _within("limit", a.query.limit, 1, 1000)
    return await a.port.usage(_filter(a.query), a.query.cursor, a.query.limit)


async def _decisions(a: Ask) -> Decisions:
    _within("limit", a.query.limit, 1, 500)
    return await a.port.decisions(a.query.limit)


async def _choices(a: Ask) -> Choices:
    _within("limit", a.query.limit, 1, 200)
    return await a.port.choices(a.query.model, a.query.limit)


async def _shadows(a: Ask) -> Shadows:
    _within("days", a.query.days, 1, 35)
    return await a.port.shadows(a.query.model, a.query.days)


async def _down(a: Ask) -> DownReport:
    _within("grace_s", a.query.grace_s, 0, 3600)
    return await a.port.down(a.query.grace_s)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise AdminError(400, "E605", f"{name}={value:g} is out of range", fix=f"{low:g} to {high:g}")


# --- the app ----------------------------------------------------------------------------------------------------------


class Front(Protocol):
    """Pages for people that bring a way in of their own beside the bearer token: the dashboard."""

    def routes(self) -> Sequence[BaseRoute]: ...

    def admits(self, scope: Scope) -> bool:
        """Whether this request may pass without the bearer token: an open page, or a session's request."""

    async def run(self) -> None:
        """What it does beside answering, until cancelled."""


def build_app(
    control: ControlPort,
    token: str,
    hosts: tuple[str, ...] = (),
    pages: tuple[BaseRoute, ...] | None = None,
    front: Front | None = None,
) -> Starlette:
    """The admin app. `hosts`: names besides localhost and IP addresses by which browsers may reach it. `pages`: the
    documentation's routes; None for the built-in ones."""
    if pages is None:
        from neaptide.control.pages import routes

        pages = routes(control)
    api = [Route(f"/api/v1{op.path}", _endpoint(control, op), methods=[op.method]) for op in OPERATIONS]
    app = Starlette(
        routes=[Route("/health", _health), *api, *pages, *(front.routes() if front else ())],
        exception_handlers={HTTPException: _http_error, NeaptideError: _known_error},
    )
    app.add_middleware(Guard, token=token, hosts=hosts, front=front)
    return app


def _endpoint(control: ControlPort, op: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        ask = Ask(control, dict(request.path_params), _query(request, op.query), await _body(request, op.body))
        return answer(await op.run(ask), op.status)

    return endpoint


def _query(request: Request, kind: type[T]) -> T:
    """Strict: unknown and repeated parameters, numbers that are none, NaN and infinities are refused."""
    pairs = request.query_params.multi_items()
    given = dict(pairs)
    if len(given) < len(pairs):
        raise AdminError(400, "E605", "a query parameter stands twice", fix="give it once")
    try:
        query = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as e:
        names = ", ".join(kind.__struct_fields__) or "none"  # type: ignore[attr-defined]
        raise AdminError(400, "E605", f"the query is not valid: {e}", why=f"parameters here: {names}") from e
    for name, value in msgspec.structs.asdict(query).items():  # type: ignore[arg-type]
        if isinstance(value, float) and not math.isfinite(value):
            raise AdminError(400, "E605", f"{name}={value} is not a finite number")
    return query


async def _body(request: Request, kind: Any) -> Any:
    if kind is None:
        return None
    raw = await request.body()
    try:
        return raw.decode() if kind is str else msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise AdminError(400, "E605", f"the body is not valid: {e}", fix="see /docs") from e


async def _health(request: Request) -> Response:
    return answer({"status": "ok", "version": __version__})


def answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def failure(error: NeaptideError) -> Response:
    """{"error": {code, what, why, fix}} with the error's status."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    body = msgspec.json.encode({"error": error.as_dict()})
    return Response(body, error.status, headers, media_type="application/json")


async def _known_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NeaptideError)  # noqa: S101  (what the handler is registered for)
    return failure(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return failure(AdminError(405, "E607", f"{request.method} is not allowed here", why=f"allowed: {allowed}"))
    return failure(AdminError(error.status_code, "E606", f"there is no {request.url.path}", fix="see /docs"))


class Guard:
    """Ahead of every route. Pure ASGI: it counts a body while it comes, and adds its headers to errors too."""

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...], front: Front | None = None) -> None:
        if len(token) < 16:
            raise ValueError("the admin token has fewer than 16 characters")
        self._app, self._token, self._front = app, token.encode(), front
        self._hosts = frozenset(h.lower() for h in (*hosts, "localhost"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        sender = _Sender(send)
        try:
            self._admit(scope)
            await self._app(scope, _bounded(receive), sender)
        except NeaptideError as e:  # refused here, or past the framework's own handlers
            await self._fail(e, scope, receive, sender)
        except Exception as e:
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = AdminError(500, "E999", f"{type(e).__name__}: {e}", why="a defect of Neaptide", fix="see log/")
            await self._fail(error, scope, receive, sender)

    def _admit(self, scope: Scope) -> None:
        """AdminError unless Host, token and announced length are fit."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        host = headers.get(b"host", [])
        if len(host) != 1 or not self._is_ours(host[0].decode("latin-1")):
            name = host[0].decode("latin-1")[:100] if host else ""
            why = "a page of another origin may have pointed its own name at this address"
            raise AdminError(403, "E603", f"the host {name!r} is not served here", why=why, fix="use 127.0.0.1")
        if not _is_open(scope["path"]) and not (self._front and self._front.admits(scope)):
            given = headers.get(b"authorization", [b""])
            kind, _, value = given[0].partition(b" ")
            if len(given) != 1 or kind.lower() != b"bearer" or not hmac.compare_digest(value.strip(), self._token):
                why = "the admin API needs `Authorization: Bearer TOKEN`"
                fix = "the token stands in admin-token in the state directory"
                raise AdminError(401, "E602", "the admin token is missing or wrong", why=why, fix=fix)
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and int(length) > MAX_BODY:
            raise _too_large()

    def _is_ours(self, host: str) -> bool:
        """A name that cannot be somebody else's domain: an IP address, localhost, or one that was configured."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        bare = name.strip("[]").lower()
        try:
            ipaddress.ip_address(bare)
        except ValueError:
            return bare in self._hosts
        return True

    async def _fail(self, error: NeaptideError, scope: Scope, receive: Receive, sender: _Sender) -> None:
        if not sender.started:  # else half an answer is out; the server closes the connection
            await failure(error)(scope, receive, sender)


class _Sender:
    """Adds the security headers to whatever begins."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            present = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *((k, v) for k, v in SECURITY if k not in present)]
        await self._send(message)


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise _too_large()
        return message

    return bounded


def _too_large() -> AdminError:
    return AdminError(413, "E604", f"the body is larger than {MAX_BODY} bytes", fix="send less")


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith("/docs/")
