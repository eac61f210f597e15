"""The dashboard's routes on the admin listener: the page at /, its files and its own calls below /ui/.

What stands below /ui/ serves the page alone and may change with it; scripts use /api/v1. `Dashboard` is the Front that
the admin app lets in: it tells whose session a request is of, where it carries no bearer token.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from neaptide.clock import Clock, RealClock
from neaptide.control.chain import Note
from neaptide.control.guard import STANDS, WHO, AdminError, answer
from neaptide.control.roles import Role, Who, may
from neaptide.dashboard import play
from neaptide.dashboard.feed import Feed
from neaptide.dashboard.pages import UI, File, files, policy
from neaptide.dashboard.sessions import SESSION_S, TICKET_S, Session, Sessions, matches
from neaptide.dashboard.source import Source

CHIPS = Path(__file__).parent.parent / "models" / "guide" / "chips.json"
MAX_PAGES = 32  # open at once
HEADER = "x-neaptide-session"  # carries a session's token with calls that change something
PASSED_ON = ("content-type", "retry-after", "x-request-id", "x-neaptide-request-id")
SAFE = ("GET", "HEAD")
SINCE = re.compile(r"\d{1,12}(\.\d{1,9})?")


class TicketAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /ui/ticket; none is an empty one."""

    by: Annotated[str, msgspec.Meta(max_length=64)] = ""  # who asks for the link
    role: Role | None = None  # of its session; None: that of the token


class Dashboard:
    """Implements Front."""

    def __init__(self, source: Source, clock: Clock | None = None) -> None:
        self._source = source
        self.sessions = Sessions(clock or RealClock())
        self.feed = Feed(source)
        self._files = files()
        self._page, self._door = File(UI / "index.html"), File(UI / "signin.html")
        self._policy = policy(self._page.content)
        self._open = {"/", *(f"/ui/{name}" for name in self._files)}
        # Cookies do not know ports: two Neaptides on one host need two names.
        self._cookie = f"neaptide_{urlsplit(source.admin_url).port or 80}"

    async def run(self) -> None:
        await self.feed.run()

    def routes(self) -> Sequence[BaseRoute]:
        return (
            Route("/", self.page),
            Route("/ui/ticket", self.ticket, methods=["POST"]),
            Route("/ui/session", self.session, methods=["GET"]),
            Route("/ui/session", self.leave, methods=["DELETE"]),
            Route("/ui/live", self.live),
            Route("/ui/history", self.history),
            Route("/ui/play", self.play, methods=["POST"]),
            Route("/ui/{name:path}", self.file),
        )

    # -- the way in ----------------------------------------------------------------------------------------------

    def is_open(self, scope: Scope) -> bool:
        """The page's files. The page itself asks for a session."""
        return scope["path"] in self._open and scope["method"] in SAFE

    def who(self, scope: Scope) -> Who | None:
        """Whose session's cookie this is, from our own pages alone; with its token to change something. A ticket is
        made with a bearer token alone."""
        headers = dict(scope["headers"])
        session = self._session(headers.get(b"cookie", b"").decode("latin-1"))
        if scope["path"] == "/ui/ticket" or session is None or not _same_origin(headers):
            return None
        token = headers.get(HEADER.encode(), b"").decode("latin-1")
        return session.who if scope["method"] in SAFE or matches(session, token) else None

    def _session(self, header: str) -> Session | None:
        return self.sessions.find(_cookie(header, self._cookie))

    async def page(self, request: Request) -> Response:
        """The page for a session or a fresh ticket; else how to get one. The ticket is answered with the page itself
        and not with a redirect: a browser would not send the strict cookie along after a link from elsewhere."""
        ticket = request.query_params.get("ticket")
        cookie = self.sessions.redeem(ticket) if ticket else None
        if cookie is not None and (fresh := self.sessions.find(cookie)) is not None:
            request.scope[WHO] = fresh.who
            request.state.note = Note(fresh.by, after=fresh.who.role or "")
            flags = f"Path=/; HttpOnly; SameSite=Strict; Max-Age={SESSION_S:.0f}"
            flags += "; Secure" if self._source.admin_url.startswith("https:") else ""
            return self._paint({"set-cookie": f"{self._cookie}={cookie}; {flags}"})
        if self._session(request.headers.get("cookie", "")) is None:
            if ticket:
                request.state.note = Note()  # a sign-in that was refused is recorded
            return Response(self._door.content, 401, {"content-type": self._door.type, "cache-control": "no-store"})
        return self._paint({})

    def _paint(self, headers: Mapping[str, str]) -> Response:
        told = {"content-security-policy": self._policy, "cache-control": "no-store", "content-type": self._page.type}
        return Response(self._page.content, headers={**told, **headers})

    async def ticket(self, request: Request) -> Response:
        """A new one-time link; a bearer token is its price."""
        try:
            asked = msgspec.json.decode(await request.body() or b"{}", type=TicketAsk)
        except msgspec.MsgspecError as e:
            raise AdminError(400, "E605", f"the body is not valid: {e}", fix='{"by": "your name"}, or none') from e
        who: Who = request.scope[WHO]
        role = asked.role or who.role
        if not may(who.role, role):
            fix = f"ask for {who.role}, or use a token of that role"
            raise AdminError(403, "E620", f"a link of the role {role} needs a token of it", fix=fix)
        request.state.note = Note(asked.by, after=role or "")
        ticket = self.sessions.ticket(asked.by, who._replace(role=role, via="link"))
        url = f"{self._source.admin_url}?ticket={ticket}"
        return answer({"url": url, "valid_s": TICKET_S}, 201)

    async def session(self, request: Request) -> Response:
        """What only the session's own page may know."""
        session = self._session(request.headers.get("cookie", ""))
        told = {"token": session.token, "by": session.by, "role": session.who.role} if session else {}
        return answer({"token": "", "by": "", "role": None, **told, "header": HEADER, "chips": chips()})

    async def leave(self, request: Request) -> Response:
        self.sessions.end(_cookie(request.headers.get("cookie", ""), self._cookie))
        gone = f"{self._cookie}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"
        return Response(status_code=204, headers={"set-cookie": gone})

    # -- what it shows -------------------------------------------------------------------------------------------

    async def file(self, request: Request) -> Response:
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise AdminError(404, "E606", f"there is no {request.url.path}", fix="see /docs")
        return found.answer(request)

    async def live(self, request: Request) -> Response:
        """Server-sent events; ?since= (wall seconds) leaves out the rows that the page still has."""
        if self.feed.pages >= MAX_PAGES:
            raise AdminError(429, "E608", f"{MAX_PAGES} pages are open already", fix="close one")
        told = request.query_params.get("since", "")
        since_s = float(told) if SINCE.fullmatch(told) else -math.inf
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        pieces = _while(request.scope[STANDS], self.feed.listen(since_s))
        return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)

    async def history(self, request: Request) -> Response:
        """The last 24 hours by the minute."""
        return Response(self.feed.columns("24h"), media_type="application/json")

    async def play(self, request: Request) -> Response:
        """A chat completion, asked of the gateway with the service's own key and passed on as it comes."""
        source = self._source
        asked = await play.post(
            source.api_url, "/chat/completions", await request.body(), source.key(), source.api_tls()
        )
        headers = {name: asked.headers[name] for name in PASSED_ON if name in asked.headers}
        return StreamingResponse(asked.pieces(), asked.status, headers)


async def _while(stands: Callable[[], bool], pieces: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """`pieces`, until who listens may no longer."""
    async with aclosing(pieces):
        async for piece in pieces:
            if not stands():
                return
            yield piece


def chips() -> dict[str, list[str]]:
    """Questions to begin with, by language: those that came with the built-in model; none without it."""
    try:
        return msgspec.json.decode(CHIPS.read_bytes(), type=dict[str, list[str]])
    except (OSError, ValueError):
        return {}


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _same_origin(headers: Mapping[bytes, bytes]) -> bool:
    """Browsers say who asks: our page, or the person (address bar). Those that do not say send Origin or nothing."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == headers.get(b"host")
