"""Around every route of the admin listener: the role it needs, and a line in the audit log for what it changes.

`Access` joins the tokens and the log. A change is recorded ahead of it, as an intent, and after it, as a line; where
the intent cannot be written the change is refused (507).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from neaptide.clock import Clock
from neaptide.control.admins import Admins
from neaptide.control.audit import AuditLog, newest
from neaptide.control.chain import AuditPage, AuditQuery, AuditRow, Note, Outcome
from neaptide.control.guard import REQUEST, WHO, AdminError
from neaptide.control.roles import NOBODY, Need, Who, may, need_of
from neaptide.errors import NeaptideError, StorageError
from neaptide.fleet.state import StateDir

BURST, EVERY_S = 20, 3.0  # refusals that are written down: so many at once, then one in so many seconds
LONGEST_OBJECT, LONGEST_NOTE = 200, 1000  # characters
SECRET = re.compile(r"\b(sk|na)-[A-Za-z0-9_-]{12,}(?=[A-Za-z0-9_-]{4})")
Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
log = logging.getLogger("neaptide.control")


class Allowance:
    """A burst, then one every so often."""

    def __init__(self, now_s: float) -> None:
        self._left, self._at_s = float(BURST), now_s

    def take(self, now_s: float) -> bool:
        self._left = min(float(BURST), self._left + (now_s - self._at_s) / EVERY_S)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Access:
    """Who may do what, and the record of it. The log is written on a thread of its own."""

    def __init__(self, admins: Admins, audit: AuditLog, state: StateDir, clock: Clock) -> None:
        self.admins, self.find, self.stands = admins, admins.find, admins.stands
        self._log, self._directory, self._clock = audit, state.audit, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._unknown, self._known = Allowance(clock.mono_s()), Allowance(clock.mono_s())
        self._skipped = 0

    @classmethod
    def open(cls, state: StateDir, clock: Clock) -> Access:
        """Of a state directory. StorageError when its tokens or its log cannot be read; blocks."""
        return cls(Admins(state, clock), AuditLog(state.audit, clock), state, clock)

    async def close(self) -> None:
        if self._skipped:
            with contextlib.suppress(StorageError):
                await self._add(AuditRow(at_wall_s=self._clock.wall_s(), action="denied", outcome="refused"))
        await self._do(self._log.close)
        self._thread.shutdown(wait=False)

    async def rows(self, query: AuditQuery) -> AuditPage:
        """Lines of the log, newest first."""
        return AuditPage(rows=await asyncio.to_thread(newest, self._directory, query))

    # -- routes ----------------------------------------------------------------------------------------------------

    def gated(self, route: BaseRoute) -> Route:
        """The route behind its need. LookupError for one that is not in NEEDS."""
        if not isinstance(route, Route) or not route.methods:
            raise TypeError(f"{route} is no plain route: it cannot be guarded")
        needs = {method: need_of(method, route.path) for method in route.methods - {"HEAD"}}
        endpoint = route.endpoint

        async def gate(request: Request) -> Response:
            return await self._pass(needs["GET" if request.method == "HEAD" else request.method], endpoint, request)

        return Route(route.path, gate, methods=sorted(route.methods))

    async def _pass(self, need: Need, endpoint: Endpoint, request: Request) -> Response:
        who: Who = request.scope.get(WHO, NOBODY)
        if not may(who.role, need.least):
            error = _too_low(who, need, request)
            await self.denied(request.scope, error)
            raise error
        if not need.action:
            return await endpoint(request)
        if need.least is None:
            return await self._sign_in(need, endpoint, request)
        return await self._change(need, endpoint, request)

    async def _change(self, need: Need, endpoint: Endpoint, request: Request) -> Response:
        row = self._row(request.scope, need.action)
        await self._do(self._log.begin, row)
        try:
            response = await endpoint(request)
        except NeaptideError as e:
            await self._end(row, e.status, e.code, request)
            raise
        except Exception:  # not one that was cancelled: its outcome is unknown, as its intent will say
            await self._end(row, 500, "E999", request)
            raise
        await self._end(row, response.status_code, "", request)
        return response

    async def _end(self, row: AuditRow, status: int, code: str, request: Request) -> None:
        row = _ended(row, status, code, getattr(request.state, "note", None))
        await self._do(self._log.end, self._counted(row))

    async def _sign_in(self, need: Need, endpoint: Endpoint, request: Request) -> Response:
        """An open route that tells by a note whether there is something to record."""
        response = await endpoint(request)
        note: Note | None = getattr(request.state, "note", None)
        row = _ended(self._row(request.scope, need.action), response.status_code, "", note)
        if note is None or (row.outcome == "refused" and not self._noted(self._unknown)):
            return response
        await self._add(row)
        return response

    # -- lines -----------------------------------------------------------------------------------------------------

    async def denied(self, scope: Scope, error: NeaptideError) -> None:
        """A refusal for want of a token or a role; at most so many a minute are written down, the others counted."""
        who: Who = scope.get(WHO, NOBODY)
        if not self._noted(self._known if who.id else self._unknown):
            return
        note = Note(f"{scope['method']} {scope['path']}")
        try:
            await self._add(_ended(self._row(scope, "denied"), error.status, error.code, note))
        except StorageError as e:  # it is refused all the same
            log.warning("%s", e)

    def _noted(self, allowance: Allowance) -> bool:
        if allowance.take(self._clock.mono_s()):
            return True
        self._skipped += 1
        return False

    async def _add(self, row: AuditRow) -> None:
        row = self._counted(row)
        try:
            await self._do(self._log.add, row)
        except StorageError:
            self._skipped += row.skipped
            raise

    def _counted(self, row: AuditRow) -> AuditRow:
        """With the refusals that were left out before it."""
        skipped, self._skipped = self._skipped, 0
        return msgspec.structs.replace(row, skipped=skipped)

    def _row(self, scope: Scope, action: str) -> AuditRow:
        who: Who = scope.get(WHO, NOBODY)
        client = scope.get("client")
        return AuditRow(
            at_wall_s=self._clock.wall_s(),
            request=scope[REQUEST],
            who=who.id,
            name=who.name,
            role=who.role or "",
            via=who.via,
            peer=client[0] if client else "",
            action=action,
        )

    async def _do(self, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


def _too_low(who: Who, need: Need, request: Request) -> AdminError:
    return AdminError(
        403,
        "E620",
        f"{request.method} {request.url.path} needs the role {need.least}",
        why=f"the token {who.name or who.id!r} is {'an' if who.role in ('operator', 'admin') else 'a'} {who.role}'s",
        fix=f"ask an admin for a token: neaptide admins create --role {need.least}",
    )


def _ended(row: AuditRow, status: int, code: str, note: Note | None) -> AuditRow:
    """The line as it is written: how it ended, and on what."""
    outcome: Outcome = "done" if status < 400 else "refused" if status < 500 else "failed"
    told = note or Note()
    return msgspec.structs.replace(
        row,
        outcome=outcome,
        status=status,
        code=code,
        object=_plain(told.object, LONGEST_OBJECT),
        before=_plain(told.before, LONGEST_NOTE),
        after=_plain(told.after, LONGEST_NOTE),
    )


def _plain(text: str, longest: int) -> str:
    """At most so long, and nothing in it that looks like a key or token: an id may be one by mistake."""
    text = SECRET.sub(r"\1-***", text)
    return text if len(text) <= longest else text[: longest - 1] + "…"
