"""What stands ahead of every route of the admin listener: Host (DNS rebinding), who asks, body size, security headers.

Only what is open to everybody passes without a token or a session; what somebody may do, the gate says. Refusals are
told to the audit log.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neaptide.control.roles import NOBODY, Who
from neaptide.errors import NeaptideError

if TYPE_CHECKING:
    from neaptide.control.gate import Access

log = logging.getLogger("neaptide.control")
MAX_BODY = 1 << 20  # bytes; a configuration is a few kilobytes
OPEN = ("/health", "/docs", "/openapi.json", "/openapi-inference.json")  # exact, or below /docs/
# Keys of the scope: a Who, the request's id, and whether who asks may still be here, for answers that take long.
WHO, REQUEST, STANDS = "neaptide.who", "neaptide.request", "neaptide.stands"
SECURITY = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class AdminError(NeaptideError):
    """A request that the admin API refuses. E601-E621, with the HTTP status they are answered with."""

    exit_code = 4

    def __init__(self, status: int, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix, code=code)
        self.status = status


class Front(Protocol):
    """Pages for people that bring a way in of their own beside the bearer token: the dashboard."""

    def routes(self) -> Sequence[BaseRoute]: ...

    def is_open(self, scope: Scope) -> bool:
        """Whether everybody may have this: a file of the page."""

    def who(self, scope: Scope) -> Who | None:
        """Whose session's request this is; None where it is no session's, or not fit for one."""

    async def run(self) -> None:
        """What it does beside answering, until cancelled."""


def answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def failure(error: NeaptideError) -> Response:
    """{"error": {code, what, why, fix}} with the error's status."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    body = msgspec.json.encode({"error": error.as_dict()})
    return Response(body, error.status, headers, media_type="application/json")


class Guard:
    """Ahead of every route. Pure ASGI: it counts a body while it comes, and adds its headers to errors too."""

    def __init__(self, app: ASGIApp, access: Access, hosts: tuple[str, ...], front: Front | None = None) -> None:
        self._app, self._access, self._front = app, access, front
        self._hosts = frozenset(h.lower() for h in (*hosts, "localhost"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        scope[REQUEST] = f"ctl-{secrets.token_hex(12)}"
        sender = _Sender(send, scope[REQUEST])
        try:
            scope[WHO], scope[STANDS] = self._admit(scope), partial(self._stands, scope)
            await self._app(scope, _bounded(receive), sender)
        except NeaptideError as e:  # refused here, or past the framework's own handlers
            if e.status in (401, 403):
                await self._access.denied(scope, e)
            await self._fail(e, scope, receive, sender)
        except Exception as e:
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = AdminError(500, "E999", f"{type(e).__name__}: {e}", why="a defect of Neaptide", fix="see log/")
            await self._fail(error, scope, receive, sender)

    def _admit(self, scope: Scope) -> Who:
        """AdminError unless Host, token and announced length are fit."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        host = headers.get(b"host", [])
        if len(host) != 1 or not self._is_ours(host[0].decode("latin-1")):
            name = host[0].decode("latin-1")[:100] if host else ""
            why = "a page of another origin may have pointed its own name at this address"
            fix = "use 127.0.0.1, or a name that stands in admin.listen or in the listener's certificate"
            raise AdminError(403, "E603", f"the host {name!r} is not served here", why=why, fix=fix)
        who = self._who(scope, headers.get(b"authorization", []))
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and int(length) > MAX_BODY:
            raise _too_large()
        return who

    def _stands(self, scope: Scope) -> bool:
        """Whether the request would still be let in: its token may be revoked since, its session have ended."""
        try:
            self._admit(scope)
        except AdminError:
            return False
        return True

    def _who(self, scope: Scope, given: list[bytes]) -> Who:
        """Whose token or session this is; NOBODY for what is open."""
        front = self._front
        if _is_open(scope["path"]) or (front and front.is_open(scope)):
            return NOBODY
        kind, _, value = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        found = self._access.find(value.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
        if found is None and front is not None and (session := front.who(scope)) and self._access.stands(session):
            found = session
        if found is None:
            why = "the admin API needs `Authorization: Bearer TOKEN`"
            fix = "the host's token stands in admin-token in the state directory; neaptide admins create makes others"
            raise AdminError(401, "E602", "the admin token is missing, wrong or revoked", why=why, fix=fix)
        return found

    def _is_ours(self, host: str) -> bool:
        """A name that cannot be somebody else's domain: an IP address, localhost, or one that was configured."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        bare = name.strip("[]").lower()
        try:
            ipaddress.ip_address(bare)
        except ValueError:
            return bare in self._hosts or "*." + bare.partition(".")[2] in self._hosts  # of a certificate
        return True

    async def _fail(self, error: NeaptideError, scope: Scope, receive: Receive, sender: _Sender) -> None:
        if not sender.started:  # else half an answer is out; the server closes the connection
            await failure(error)(scope, receive, sender)


class _Sender:
    """Adds the security headers and the request's id to whatever begins."""

    def __init__(self, send: Send, request: str) -> None:
        self._send = send
        self._added = (*SECURITY, (b"x-neaptide-request-id", request.encode()))
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            present = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *((k, v) for k, v in self._added if k not in present)]
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
