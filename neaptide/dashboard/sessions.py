"""Who may look: one-time tickets, exchanged for sessions. Both live in memory, so a restart of control ends them.

A ticket is worth nothing once used or old; a session is known by a cookie, and what changes something must carry the
session's own token beside it (a page of another origin can send the cookie, but not read the token). What is kept are
digests, so looking one up tells nothing by its timing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict

import msgspec

from neaptide.clock import Clock
from neaptide.control.roles import NOBODY, Who

TICKET_S = 600.0
SESSION_S = 12 * 3600.0
MAX_TICKETS = 64
MAX_SESSIONS = 64


class Session(msgspec.Struct, frozen=True, kw_only=True):
    token: str  # for the header of calls that change something
    until_s: float  # monotonic
    by: str = ""  # who asked for the link; told with what is set by hand
    who: Who = NOBODY  # whose token the link was made with, and the role that the session has


class Ticket(msgspec.Struct, frozen=True):
    until_s: float  # monotonic
    by: str
    who: Who


class Sessions:
    """At most MAX_TICKETS and MAX_SESSIONS: past them the oldest goes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tickets: OrderedDict[bytes, Ticket] = OrderedDict()  # by digest
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def ticket(self, by: str = "", who: Who = NOBODY) -> str:
        """A new ticket, good once within TICKET_S. Its session may do what `who` may: nothing unless told."""
        value = secrets.token_urlsafe(32)
        self._tickets[_digest(value)] = Ticket(self._clock.mono_s() + TICKET_S, by, who)
        while len(self._tickets) > MAX_TICKETS:
            self._tickets.popitem(last=False)
        return value

    def redeem(self, ticket: str) -> str | None:
        """The cookie of a new session; None for a ticket that is unknown, used or old."""
        used, now_s = self._tickets.pop(_digest(ticket), None), self._clock.mono_s()
        if used is None or used.until_s <= now_s:
            return None
        cookie, token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._sessions[_digest(cookie)] = Session(token=token, until_s=now_s + SESSION_S, by=used.by, who=used.who)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie

    def find(self, cookie: str) -> Session | None:
        """The session of a cookie while it lasts."""
        key = _digest(cookie)
        session = self._sessions.get(key)
        if session is not None and session.until_s <= self._clock.mono_s():
            del self._sessions[key]
            return None
        return session

    def end(self, cookie: str) -> None:
        self._sessions.pop(_digest(cookie), None)

    def __len__(self) -> int:
        return len(self._sessions)


def matches(session: Session, token: str) -> bool:
    """Whether `token` is the session's own."""
    return hmac.compare_digest(session.token.encode(), token.encode())


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()
