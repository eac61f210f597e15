"""A request's walk: `enter` reads from top to bottom. Everything it asks is decided elsewhere, purely."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from msgspec import Raw

from neaptide.clock import mono_s
from neaptide.errors import RequestError, StorageError
from neaptide.gateway import admit, degrade, ids, overdue, queue, record, refusals, relay, resume, route, watch
from neaptide.gateway.access import AccessLog, Line, UsageLine
from neaptide.gateway.admit import Terms
from neaptide.gateway.affinity import Familiar
from neaptide.gateway.breaker import BAD, NEITHER, result
from neaptide.gateway.call import Call
from neaptide.gateway.connection import FOREVER, Connection
from neaptide.gateway.exchange import DONE, WAITING, Exchange
from neaptide.gateway.lane import Lane
from neaptide.gateway.metrics import Metrics
from neaptide.gateway.route import Target
from neaptide.gateway.shared import Shared, name_of
from neaptide.gateway.shares import PROMPT_BYTE
from neaptide.gateway.throttle import Throttle
from neaptide.gateway.till import Till
from neaptide.gateway.upstream import Upstream
from neaptide.table import Gauges, KeyRow, ReplicaRow, Table
from neaptide.types import Begin, Usage
from neaptide.wire.peek import peek, splice

log = logging.getLogger("neaptide.gateway")


class Journal(Protocol):
    """What the door asks of the journal."""

    def begin(self, begin: Begin) -> None: ...
    def end(self, usage: Usage, then: Callable[[], None] | None) -> bytes | None: ...
    def refusal(self) -> str | None: ...


Connect = Callable[[ReplicaRow, Target, Callable[[], None]], Upstream]  # the last: call it when there is room


class Door:
    """Holds the table and all requests in flight. `connect` makes the upstream of a replica: the seam between
    routing and protocols."""

    def __init__(
        self,
        name: str,
        pepper: str,
        journal: Journal,
        connect: Connect,
        *,
        metrics: Metrics | None = None,
        access: AccessLog | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self.name = name
        self.journal = journal
        self.metrics = metrics or Metrics()
        self.access = access
        self.throttle = throttle or Throttle()
        self.ids = ids.Ids()
        self.table = Table()
        self.held = False  # a table was installed
        self.on_starving: Callable[[], None] | None = None  # a request waits and no replica is ready
        self.lanes: dict[str, Lane] = {}  # by model
        self.targets: dict[str, Target] = {}  # by replica id
        self._upstreams: dict[str, Upstream] = {}
        self.live: set[Exchange] = set()
        self._by_name: dict[str, Lane] = {}  # by deployment and alias
        self._familiar = Familiar()
        self.till = Till(self.go_on)
        self._pepper = bytes.fromhex(pepper)
        self._connect = connect
        self.keys = admit.Keys((), self._pepper)

    # --- the walk

    def enter(self, connection: Connection, call: Call, key: KeyRow, now: float) -> None:
        """A whole request has come; its head was admitted. Every way out of here ends in one answer and one row."""
        try:
            full_disk = self.journal.refusal()
            if full_disk is not None:
                raise refusals.disk_full(full_disk)
            asked = peek(call.body)
            lane = self._by_name.get(asked.model)
            if lane is None:
                raise refusals.unknown_model(asked.model)
            if key.models:
                admit.check_model(key, lane.row.model)
            terms = call.terms
            if terms is None:
                terms = call.terms = admit.terms(call.headers, key)
            deadline_s = admit.deadline_s(call.headers, asked.stream, call.arrived_s) if terms.timed else FOREVER
            permit = self.throttle.admit(key, call, now) if key.quotas else None
        except RequestError as error:
            self.refuse(connection, call, error, now)
            return
        name = name_of(lane, call, key, asked.stream, terms) if lane.cache is not None else None
        kind = Exchange if name is None else Shared
        connection.exchange = exchange = kind(self, connection, call, key, lane, asked, terms.priority, deadline_s)
        exchange.pinned = terms.revision
        exchange.permit = permit
        self.live.add(exchange)
        if name is None and lane.relief is None:
            self.line_up(exchange, now)
        else:
            self._spare(exchange, name, terms, now)

    def _spare(self, exchange: Exchange, name: bytes | None, terms: Terms, now: float) -> None:
        """Is its answer here or on its way, does a lesser one have to do? Else it lines up as any other."""
        lane, found = exchange.lane, degrade.NONE
        if lane.relief is not None and terms.degrade and exchange.call.route != "tokenize":
            found = lane.relief.now(lane.line, now)
        sharing = exchange if isinstance(exchange, Shared) else None
        if sharing is not None and sharing.find(name, now, found.stale_s):
            return
        try:
            changed = any(found) and degrade.apply(exchange, found, self.lanes, now)
        except RequestError as error:
            exchange.fail(error, now, "refused")
            return
        if sharing is not None and changed:  # another question now
            name = name_of(exchange.lane, exchange.call, exchange.key, exchange.asked.stream, terms)
            if sharing.find(name, now):
                return
        if sharing is None or not sharing.join(name, now):
            self.line_up(exchange, now)

    def line_up(self, exchange: Exchange, now: float) -> None:
        """To a replica, or into the line: its answer has to be made."""
        lane, key = exchange.lane, exchange.key
        if exchange.deadline_s < FOREVER and (late := lane.hopeless(exchange, now)) is not None:
            lane.metrics.arrivals += 1
            exchange.fail(late, now, "refused")
            return
        if not key.budgets or self.till.pay(exchange, now):
            self.go_on(exchange, now)

    def go_on(self, exchange: Exchange, now: float) -> None:
        """To a replica, or into the line: it is paid for, where its key has budgets."""
        lane = exchange.lane
        lane.metrics.arrivals += 1
        line, rank = lane.line, exchange.rank
        exchange.account = account = line.shares.of(exchange.key.tenant)
        line.shares.asked(account, rank, now)
        # Who runs nothing is below its share.
        may = lane.may(now) if line.shares.crowded and (account.running or line.waiting) else None
        allowed = may is None or may(account, rank)
        # In a mixed lane those who wait have no use for what is free, or they would have it.
        target = lane.pick(exchange, now) if allowed and (not line.waiting or lane.mixed) else None
        if target is None:
            self._wait(exchange, now)
            if line.lost or lane.mixed or (allowed and may is not None):
                self.pump(lane, now)  # what is free may be kept from those who wait, and be for it
        else:
            line.passed(account, rank)
            self._dispatch(exchange, target, now)

    def _wait(self, exchange: Exchange, now: float, since_s: float | None = None) -> None:
        """Into the line; or a refusal, where waiting is hopeless or the line is full."""
        lane = exchange.lane
        ready = route.reachable(lane.targets, now)
        try:
            if self.lanes.get(lane.row.model) is not lane:
                raise refusals.no_longer_served()
            if (barred := lane.barred(exchange)) is not None:
                raise barred
            if lane.row.failing and not ready:
                raise refusals.no_start(lane.row.failing)
            latest_s, tenant, rank = exchange.deadline_s, exchange.key.tenant, exchange.rank
            if since_s is None:
                if latest_s < FOREVER:
                    latest_s -= lane.quick_s(exchange, now)
                    lane.line.check_deadline(exchange.account, rank, now, latest_s)
                self._make_room(exchange, now)
            exchange.ticket = lane.line.enter(
                exchange, now, tenant=tenant, rank=rank, since_s=since_s, latest_s=latest_s
            )
            exchange.state = WAITING
        except RequestError as error:
            exchange.fail(error, now, "error" if error.status == 503 else "refused")
            return
        if not ready and self.on_starving is not None:
            self.on_starving()

    def _make_room(self, exchange: Exchange, now: float) -> None:
        """In a full line, somebody with less right to a place loses it."""
        line = exchange.lane.line
        # Who loses it may leave it to one who waits for the same answer.
        while (ticket := line.crowded_out(exchange.key.tenant, exchange.rank)) is not None:
            ticket.item.ticket = None
            error = queue.crowded(ticket, line.retry_after_s(now, ticket.account.tenant, ticket.rank))
            ticket.item.fail(error, now, "refused")

    def _dispatch(self, exchange: Exchange, target: Target, now: float) -> None:
        lane, call, asked = exchange.lane, exchange.call, exchange.asked
        row = target.row
        body, hide = call.body, False
        if not target.link and call.route != "tokenize":
            name = row.remote_model or lane.row.model
            hide = asked.stream and not asked.include_usage
            body = resume.body(exchange) if exchange.resumes else body
            if hide or name != asked.model:
                try:
                    body = splice(body, model=name if name != asked.model else None, include_usage=hide)
                except RequestError as error:
                    exchange.fail(error, now, "refused")
                    return
        if not exchange.begun:
            try:
                self.journal.begin(record.begin(exchange, row))
            except StorageError as e:  # the disk filled up while it waited
                exchange.fail(refusals.disk_full(e.what), now, "refused")
                return
            exchange.begun = True
            lane.running += 1
            exchange.account.charge(call.size * PROMPT_BYTE, exchange.rank)
        exchange.account.running += 1
        target.take()
        exchange.sent(target, now, body, hide)
        self._upstreams[row.id].send(relay.between(exchange) if row.resumes else exchange)
        if exchange.paused_s and exchange.handle is not None:
            exchange.handle.pause_reading()

    def again(self, exchange: Exchange, now: float, full: bool = False) -> None:
        """Another try, before the first byte: another replica, if one can take it; else the front of the line. `full`:
        the last one had no room."""
        last, lane = exchange.target, exchange.lane
        self._release(exchange, now, NEITHER if full else BAD)
        if full and last is not None:
            last.filled()
        lane.metrics.retries += 1
        target = lane.pick(exchange, now)
        if target is None:
            self._wait(exchange, now, since_s=exchange.lost_s or exchange.call.arrived_s)
        else:
            self._dispatch(exchange, target, now)

    def resume(self, exchange: Exchange, now: float, broke: bool) -> None:
        """Another replica goes on with an answer whose own was lost or `broke` it off; the front of the line where none
        has room."""
        lane = exchange.lane
        self._release(exchange, now, BAD if broke else NEITHER)
        lane.metrics.resumes += 1
        target = lane.pick(exchange, now)
        if target is None:
            self._wait(exchange, now, since_s=now)
        else:
            self._dispatch(exchange, target, now)

    def settle(self, exchange: Exchange, usage: Usage, now: float) -> None:
        """The request is over: its slot is free, its row is written, and then the client gets the last bytes."""
        self.live.discard(exchange)
        if exchange.bill is not None:
            usage = self.till.settle(exchange, exchange.bill, usage)
        lane = exchange.lane
        if exchange.ticket is not None:
            lane.line.leave(exchange.ticket)
            exchange.ticket = None
        self._release(exchange, now, result(usage))
        if exchange.begun:
            lane.running -= 1
            exchange.charge(usage.output_tokens)
            if usage.outcome == "ok" and usage.output_tokens:
                lane.served(now, usage.duration_s - usage.queued_s, usage.output_tokens)
        if exchange.permit is not None:
            self.throttle.settle(exchange.permit, usage, exchange.begun, now)
        lane.tokens += exchange.tokens
        lane.metrics.count(usage)
        row = self.journal.end(usage, exchange.say_last)
        if self.access is not None:
            connection = exchange.connection
            self.access.add(UsageLine(connection.peer, usage if row is None else Raw(row), connection.client))
        if lane.line.waiting:
            self.pump(lane, now)

    def _release(self, exchange: Exchange, now: float, told: int) -> None:
        """`told`: by the attempt that is over, of its replica (breaker.py)."""
        target, exchange.target = exchange.target, None
        if target is not None:
            if target.limiter is not None:
                watch.ended(target.limiter, exchange, now, told)
            target.release(told, exchange.sent_s, now)
            exchange.account.running -= 1

    def pump(self, lane: Lane, now: float) -> None:
        """Those who wait go to replicas that have room again. One that ends at once calls this again: the loop further
        out goes on."""
        if lane.pumping:
            return
        lane.pumping = True
        try:
            self._pump(lane, now)
        finally:
            lane.pumping = False

    def _pump(self, lane: Lane, now: float) -> None:
        line = lane.line
        while line.waiting:
            if route.choose(lane.targets, now, lane.turn, (), lane.row.model) is None:
                return
            ticket = line.first(now, lane.may(now), partial(lane.fits, now=now) if line.lost or lane.mixed else None)
            if ticket is None:
                return
            ticket.item.ticket = None
            target = lane.pick(ticket.item, now)
            if target is None:
                self._wait(ticket.item, now, since_s=ticket.entered_s)
                return
            self._dispatch(ticket.item, target, now)

    # --- refusals

    def refuse(self, connection: Connection, call: Call, error: RequestError, now: float) -> None:
        """Answer a request that never became an exchange. One row where a key was known and the disk can take it:
        a flood without keys must cost neither disk nor memory."""
        slug, size = error.slug or str(error.status), call.size  # the answer lets go of the body
        self.metrics.refuse(slug)
        connection.refuse(call, error)
        if call.key is None or not call.route:
            return
        usage = Usage(
            request_id=call.id,
            client_id=call.client_id.decode("ascii"),
            tenant=call.key.tenant,
            project=call.key.project,
            key=call.key.id,
            route=call.route,
            prompt_bytes=size,
            started_wall_s=call.wall_s,
            arrived_mono_s=call.arrived_s,
            duration_s=now - call.arrived_s,
            outcome="refused",
            status=error.status,
            error=slug,
        )
        if error.status != 507:
            self.journal.end(usage, None)

    # --- time

    def sweep(self, now: float) -> None:
        """Every 100 ms: what waited too long, what runs too long, and who may be tried again."""
        watch.look(self.live, self.targets.values(), now)
        for lane in list(self.lanes.values()):
            if lane.line.waiting:
                for ticket in lane.line.expired(now):
                    ticket.item.ticket = None
                    wait_s = lane.line.retry_after_s(now, ticket.account.tenant, ticket.rank)
                    error = queue.too_long(ticket, wait_s)
                    ticket.item.fail(error, now, "refused")
                self.pump(lane, now)
                if lane.row.failing and not route.reachable(lane.targets, now):
                    self._give_up(lane, now)
        for upstream in self._upstreams.values():
            upstream.sweep(now)
        self.till.sweep(now)
        for exchange in list(self.live):
            if exchange.state != DONE:
                exchange.charge(exchange.tokens)
                overdue.check(exchange, now)
        self.throttle.sweep(self.live, now)

    def end_all(self, error: RequestError, now: float) -> None:
        """The process ends: everybody is told."""
        # Those who wait for another's answer first, or each would ask for its own.
        for exchange in sorted(self.live, key=lambda e: e.state != WAITING or e.ticket is not None):
            exchange.fail(error, now)

    def _give_up(self, lane: Lane, now: float) -> None:
        """No replica starts: those who wait need not wait longer."""
        while (ticket := lane.line.first(now)) is not None:
            ticket.item.ticket = None
            ticket.item.fail(refusals.no_start(lane.row.failing), now, "error")

    # --- the table

    def install(self, table: Table) -> None:
        """Put `table` in force: running requests go on, those who wait keep their places."""
        now = mono_s()
        self.table, self.held = table, True
        self.till.install(table.slow)
        self.keys = admit.Keys(table.slow.keys, self._pepper, table.slow.auth)
        self.throttle.renew()
        lanes: dict[str, Lane] = {}
        for row in table.slow.deployments:
            lane = self.lanes.get(row.model) or Lane(row, self.metrics.model(row.model), self._familiar)
            lane.adopt(row)
            lane.line.shares.weigh(table.slow.weights)
            lanes[row.model] = lane
        for model, lane in self.lanes.items():
            if model not in lanes:
                self._close_lane(lane, now)
        self.lanes = lanes
        self._by_name = {alias: lane for lane in lanes.values() for alias in lane.row.aliases} | lanes
        self._set_replicas(r for r in table.fast.replicas if not lanes.keys().isdisjoint(r.serves()))
        for model, lane in lanes.items():
            lane.aim([t for t in self.targets.values() if model in t.row.serves()])
        self._bar(now)
        for lane in lanes.values():
            self.pump(lane, now)

    def _set_replicas(self, rows: Iterable[ReplicaRow]) -> None:
        """Keep targets whose address is unchanged (their pools and counts live on); replace the others."""
        targets: dict[str, Target] = {}
        upstreams: dict[str, Upstream] = {}
        for row in rows:
            target = self.targets.get(row.id)
            if target is not None and _same_process(target.row, row):
                target.adopt(row)
                upstreams[row.id] = self._upstreams[row.id]
            else:
                target = Target(row)
                upstreams[row.id] = self._connect(row, target, partial(self._room, target))
            targets[row.id] = target
        for replica, upstream in self._upstreams.items():
            if upstreams.get(replica) is not upstream:
                upstream.close()
        self.targets, self._upstreams = targets, upstreams

    def _bar(self, now: float) -> None:
        """Whoever waits for what the table has no more need not wait longer."""
        for exchange in [e for e in self.live if e.state == WAITING]:
            if (barred := exchange.lane.barred(exchange)) is not None:
                exchange.fail(barred, now, "refused")

    def _room(self, target: Target) -> None:
        """A replica may have become able to take more, for any of its models."""
        for model in target.row.serves():
            lane = self.lanes.get(model)
            if lane is not None:
                self.pump(lane, mono_s())

    def _close_lane(self, lane: Lane, now: float) -> None:
        while (ticket := lane.line.first(now)) is not None:
            ticket.item.ticket = None
            ticket.item.fail(refusals.no_longer_served(), now, "refused")
        lane.aim([])

    # --- what others ask

    def gauges(self, now: float, connections: int) -> Gauges:
        running: dict[str, int] = {}
        for exchange in self.live:
            model = exchange.lane.row.model
            running[model] = running.get(model, 0) + exchange.tokens
        return Gauges(
            gateway=self.name,
            mono_s=now,
            fast=self.table.fast.version,
            slow=self.table.slow.version,
            connections=connections,
            models={model: lane.gauge(now, running.get(model, 0)) for model, lane in self.lanes.items()},
            replicas={id: t.in_flight for id, t in self.targets.items()},
            unreachable=tuple(id for id, t in self.targets.items() if t.failures),
            erring=tuple(id for id, t in self.targets.items() if t.erring),
            disk=self.journal.refusal() or "",
        )

    def log_access(self, connection: Connection, call: Call, status: int, now: float) -> None:
        """The access line of what is not an exchange."""
        if self.access is not None:
            key = call.key.id if call.key is not None else ""
            duration_s = now - call.arrived_s
            path = call.path[:256].decode("latin-1")
            method = call.method.decode("latin-1")
            line = Line(call.wall_s, call.id, connection.peer, method, path, status, key, duration_s, connection.client)
            self.access.add(line)


def _same_process(a: ReplicaRow, b: ReplicaRow) -> bool:
    mine = (a.endpoint, a.epoch, a.token, a.remote_model, a.tls)
    return mine == (b.endpoint, b.epoch, b.token, b.remote_model, b.tls)
