"""A request whose answer may be another's too: it is told again, or it is on its way, or this one makes it.

    find: kept -> told, no replica is asked        join: on its way -> waits for it; else it leads, and records

The leader is an exchange as any other; what it is told it records. At its end all who follow are told the same. Where
it has no answer the next of them leads; where its answer is not to be kept, all go their own ways. A leader whose
client leaves goes on for those who follow it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neaptide.clock import mono_s
from neaptide.errors import RequestError
from neaptide.gateway import answer, degrade, kept
from neaptide.gateway.cache import ROUTES, Cache, identity
from neaptide.gateway.exchange import DONE, OPEN, SENT, WAITING, Exchange
from neaptide.gateway.kept import GOOD_ENDS, PART_BYTES, Kept
from neaptide.gateway.sse import Counts
from neaptide.gateway.upstream import AnswerHead, Failure
from neaptide.link import EndHeader
from neaptide.table import KeyRow
from neaptide.types import Outcome

if TYPE_CHECKING:
    from neaptide.gateway.admit import Terms
    from neaptide.gateway.call import Call
    from neaptide.gateway.lane import Lane
    from neaptide.gateway.route import Target

MISS = b"x-neaptide-cache: miss\r\n"
IDS = {"chat.completions": "chatcmpl-", "completions": "cmpl-"}


def name_of(lane: Lane, call: Call, key: KeyRow, stream: bool, terms: Terms) -> bytes | None:
    """The identity of a request whose answer may be kept; None: of no other."""
    wanted = terms.cache
    if wanted is False or call.route not in ROUTES or lane.cache is None:
        return None
    if wanted is None and b'"temperature"' not in call.body:
        return None  # before anything is parsed
    if key.budgets and lane.cache.settings.price_millis:
        return None  # what has a price is paid before it is told, and that takes a turn
    scope = (key.tenant, lane.row.model, lane.row.revision, terms.revision, call.route)
    return identity(call.body, scope, stream, bool(wanted))


class Shared(Exchange):
    """`alone`: its client has left, and it goes on for others."""

    __slots__ = ("_flight", "_of", "_parts", "_size", "_whole", "alone")

    def __init__(self, *made: Any) -> None:
        super().__init__(*made)
        self._flight: Flight | None = None  # that it leads or follows
        self._of = ""  # the revision whose answer it looked for
        self._parts: list[bytes] = []
        self._size = 0  # bytes that it has taken of the cache's memory
        self._whole = self.alone = False

    def find(self, name: bytes | None, now: float, stale_s: float = 0.0) -> bool:
        """Whether its answer is here; it is told. Under pressure one that is `stale_s` old may do."""
        cache = self.lane.cache
        if cache is None or name is None:
            return False
        entry = cache.find(name, now, stale_s)
        if entry is None:
            return False
        age_s = now - entry.at_s
        is_stale = age_s >= cache.settings.ttl_s
        if is_stale:
            degrade.stale(self, age_s)
        self.told(entry.kept, cache, "stale" if is_stale else "hit", age_s, now)
        return True

    def join(self, name: bytes | None, now: float) -> bool:
        """Whether its answer is on its way; else it is from now on."""
        cache = self.lane.cache
        if cache is None or name is None:
            return False
        self._of = self.pinned or self.lane.row.revision
        flight = cache.flights.get(name)
        if flight is not None and flight.serves(self):
            flight.followers[self] = None
            self._flight = flight
            return True
        self.says += MISS
        self._flight = cache.flights[name] = Flight(cache, name, self)
        return False

    def lead(self, now: float, waited: bool) -> None:
        """Whom it followed has no answer: it asks itself. `waited`: that one was in the line, and so, as it were, was
        this one."""
        line, waited_s = self.lane.line, now - self.call.arrived_s
        if waited and waited_s >= line.max_wait_s:
            wait_s = line.retry_after_s(now, self.key.tenant, self.rank)
            what = f"No replica was free in time ({waited_s:.1f} s)."
            self.fail(RequestError(429, what, slug="wait_expired", retry_after_s=wait_s), now, "refused")
            return
        self.says += MISS
        self.door.line_up(self, now)

    def on_its_own(self, now: float) -> None:
        """Whom it followed has an answer that is not for others."""
        self._flight = None
        self.door.line_up(self, now)

    def told(self, found: Kept, cache: Cache, how: str, age_s: float, now: float) -> None:
        """An answer that another request has brought, `age_s` ago."""
        self._flight = None
        self.counts, self.finish, self.revision = found.counts, found.finish, found.revision
        self.timing.first_s = self.timing.last_s = now
        self.marks = {**(self.marks or {}), "cache": how, "price_millis": cache.settings.price_millis}
        lines = found.passed + b"x-neaptide-cache: %b\r\nage: %d\r\n" % (how.encode(), max(0, int(age_s)))
        self.answer = AnswerHead(200, found.content_type, lines, None, found.stream)
        told = found.told(IDS[self.call.route] + self.call.id, bool(self.asked.include_usage))
        if not found.stream:
            self._settle(self._head(len(told)) + told, now)
            return
        if self.opened:  # its head was out before anybody knew
            told = b": x-neaptide-cache: %b\n\n" % how.encode() + told
        self._settle(self._head(None) + self._framed(told, last=True), now)

    # --- recording

    def sent(self, target: Target, now: float, body: bytes, hide_usage: bool) -> None:
        if not self.ids and not self.resumes:
            self._forget()  # another replica begins afresh; of a resumed answer the beginning stands
        super().sent(target, now, body, hide_usage)

    def on_chunks(self, data: bytes, now: float) -> bool:
        return self._flight is None and super().on_chunks(data, now)

    def on_body(self, data: bytes, now: float) -> None:
        self._record(data, now)
        super().on_body(data, now)

    def on_end(self, data: bytes, now: float) -> None:
        self._record(data, now)
        self._whole = True
        super().on_end(data, now)

    def on_tokens(self, data: bytes, ids: bytes, now: float) -> None:
        self._record(data, now)
        super().on_tokens(data, ids, now)

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None:
        self._record(data, now)
        self._whole = end.status == 200 and end.finish in GOOD_ENDS
        super().on_link_end(end, data, now)

    def _record(self, data: bytes, now: float) -> None:
        flight, size = self._flight, len(data) + PART_BYTES
        if flight is None or not data:
            return
        if self._size + size > flight.cache.largest or not flight.cache.take(size):
            self._flight = None
            self._forget(flight)
            flight.dissolve(now)
            self.abandoned(now)
            return
        self._parts.append(data)
        self._size += size

    def _forget(self, flight: Flight | None = None) -> None:
        flight = flight or self._flight
        if flight is not None:
            flight.cache.give(self._size)
        self._parts, self._size = [], 0

    def recorded(self) -> Kept | None:
        """What it was told, as it is kept; None where it is not to be."""
        if not self._whole or self.answer.status != 200:
            return None
        data = b"".join(self._parts)
        last: bytes = b""
        parts: tuple[bytes, ...] | None
        if self.asked.stream:
            parts, last = kept.of_stream(data, self.counts) or (None, b"")
        else:
            parts = kept.of_whole(data)
        if parts is None:
            return None
        return Kept(
            parts=parts,
            last=last,
            stream=self.asked.stream,
            counts=self.counts or Counts(output=self.timing.tokens),
            finish=self.finish,
            content_type=answer.EVENTS if self.asked.stream else self.answer.content_type,
            passed=self.answer.passed,
            revision=self.revision,
        )

    # --- its end, and its client's

    def client_left(self, now: float) -> None:
        flight = self._flight
        if flight is None or flight.leader is not self or not flight.followers or self.state not in (SENT, OPEN):
            super().client_left(now)
            return
        self.outcome, self.error = "aborted", "client_left"
        self.alone, self.deadline_s = True, math.inf
        if self.paused_s:
            self.resume(now)

    def abandoned(self, now: float) -> None:
        """Nobody follows it any more."""
        if self.alone:
            super().client_left(now)

    def may_retry(self) -> bool:
        return not self.alone and super().may_retry()  # its body went with its client

    def on_failure(self, failure: Failure) -> None:
        if not self.alone:
            super().on_failure(failure)
            return
        now = mono_s()
        if failure.unreachable and self.target is not None:
            self.target.failed(now, self.sent_s)
        self._end_alone(now, "error", failure.slug)

    def fail(self, error: RequestError, now: float, outcome: Outcome = "error") -> None:
        if self.alone:
            self._end_alone(now, outcome, error.slug or "error")
        else:
            super().fail(error, now, outcome)

    def _end_alone(self, now: float, outcome: Outcome, slug: str) -> None:
        """What a replica broke nobody pays for, and its client has left."""
        if self.state != DONE:
            self.outcome, self.error = outcome, slug
            self._whole = False
            self._abort_upstream()
            self._settle(b"", now)

    def _settle(self, last: bytes, now: float) -> None:
        flight, self._flight = self._flight, None
        super()._settle(last, now)
        if flight is None:
            return
        if flight.leader is not self:
            flight.lost(self, now)
            return
        found = self.recorded()
        self._forget(flight)
        if found is not None:
            flight.landed(found, self.revision == self._of, now)
        elif self.begun and (self.outcome == "ok" or 400 <= self.answer.status < 500 or flight.failures):
            flight.dissolve(now)
        else:
            flight.failures += self.begun and not self.alone
            flight.failed(now, waited=not self.begun)


class Flight:
    """One request that asks a replica, and those who ask the same meanwhile."""

    __slots__ = ("_electing", "cache", "failures", "followers", "leader", "name")

    def __init__(self, cache: Cache, name: bytes, leader: Shared) -> None:
        self.cache, self.name = cache, name
        self.leader: Shared | None = leader
        self.followers: dict[Shared, None] = {}  # in the order of coming
        self._electing = False
        self.failures = 0  # of leaders that a replica had begun with: after the second each goes its own way

    def serves(self, other: Shared) -> bool:
        """Whether `other` does not fare worse by following: a leader of a lower class, of fewer replicas that it may go
        to, or one that is yet to be paid for may have long to wait."""
        leader = self.leader
        if leader is None or leader.state > OPEN:
            return False
        if leader.state != WAITING:
            return True
        return leader.ticket is not None and leader.rank <= other.rank and leader.key.inside <= other.key.inside

    def lost(self, follower: Shared, now: float) -> None:
        """It does not wait any more."""
        self.followers.pop(follower, None)
        if not self.followers and self.leader is not None:
            self.leader.abandoned(now)

    def landed(self, found: Kept, lasting: bool, now: float) -> None:
        """The answer is there. `lasting`: it is of the revision that was looked for."""
        self._over()
        if lasting:
            self.cache.keep(self.name, found, now)
        followers, self.followers = self.followers, {}
        for one in followers:
            one.told(found, self.cache, "shared", 0.0, now)

    def dissolve(self, now: float) -> None:
        """The answer is not to be kept: each asks for its own."""
        self._over()
        followers, self.followers = self.followers, {}
        for one in followers:
            one.on_its_own(now)

    def failed(self, now: float, waited: bool) -> None:
        """Its leader has no answer, and may have `waited` for a replica in vain: the first of the others asks. Each may
        fail at once, so it is a loop."""
        self.leader = None
        if self._electing:
            return
        self._electing = True
        while self.leader is None and self.followers:
            self.leader = first = next(iter(self.followers))
            del self.followers[first]
            first.lead(now, waited)
        self._electing = False
        if self.leader is None:
            self._over()

    def _over(self) -> None:
        self.leader = None
        if self.cache.flights.get(self.name) is self:
            del self.cache.flights[self.name]
