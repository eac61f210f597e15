"""Looks at control once a second, remembers, and tells every open page what is new."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from neaptide.dashboard.flags import Flags, since
from neaptide.dashboard.history import ALL, History, Span
from neaptide.dashboard.live import FIELDS, NAN, Counters, Fleet, Tick, Window, ticks, window
from neaptide.dashboard.source import Look, ReplicaLine, Source
from neaptide.errors import NeaptideError

log = logging.getLogger("neaptide.dashboard")
EVERY_S = 1.0
LEDGER_EVERY_S = 5.0  # its rows give the quantiles; gauges say whether there can be new ones
LEDGER_ROWS = 400
WINDOW_S = 60.0
BEHIND = 8  # events that a slow page may lag; past it, it connects again
Event = tuple[str, bytes]


class Feed:
    """`run` is the task; `listen` is one open page."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._counters: Counters = {}
        self._looked_s = NAN
        self._windows: dict[str, Window | None] = {}
        self._rows_s = float("-inf")
        self._done_then = NAN
        self._plan_s = float("-inf")
        self._state: dict[str, Any] = {}
        self._replicas: tuple[ReplicaLine, ...] = ()
        self._pages: set[asyncio.Queue[Event | None]] = set()
        self.history, self.flags = History(), Flags()

    @property
    def pages(self) -> int:
        return len(self._pages)

    async def run(self) -> None:
        """Until cancelled. A defect here is logged and must not end control."""
        try:
            while True:
                try:
                    await self.beat(self._source.look())
                except Exception:
                    log.exception("the dashboard could not take this second's numbers")
                await asyncio.sleep(EVERY_S)
        finally:
            for page in self._pages:
                _offer(page, None)

    async def beat(self, look: Look) -> None:
        """One second's numbers: remembered, and told to every page."""
        before = len(self.flags.recent) and self.flags.recent[-1].id
        for wall_s, plan in look.plans:
            if wall_s > self._plan_s:
                self.flags.note(wall_s, plan)
        self._plan_s = max((t for t, _ in look.plans), default=self._plan_s)
        await self._read_ledger(look)
        self.history.note(look.wall_s, self._ticks(look), self._windows.get(ALL))
        self._replicas = look.replicas
        self._tell("tick", {**self.history.newest(), "replicas": look.replicas})
        state = self.state(look)
        if state != self._state:
            self._state = state
            self._tell("state", state)
        if fresh := since(self.flags.recent, before):
            self._tell("flags", fresh)

    def _ticks(self, look: Look) -> dict[str, Tick]:
        span_s = max(1e-3, look.mono_s - self._looked_s) if self._counters else EVERY_S
        told, self._counters = ticks(self._counters, look.gauges, span_s)
        self._looked_s = look.mono_s
        out = {}
        for model in look.fleets:
            tick = out[model] = told.get(model) or Tick(span_s=span_s)
            fleet = tick.fleet = look.fleets[model]
            tick.replica_cost = _cost(fleet, span_s)
            tick.window = self._windows.get(model)
        return out

    async def _read_ledger(self, look: Look) -> None:
        """The windows anew: every LEDGER_EVERY_S, and only while something ends or what ended is not yet old."""
        done = sum(m.done for g in look.gauges for m in g.models.values())
        due = look.mono_s - self._rows_s >= LEDGER_EVERY_S
        if not due or (done == self._done_then and not any(self._windows.values())):
            return
        try:
            rows = await self._source.newest(look.wall_s - WINDOW_S, LEDGER_ROWS)
        except NeaptideError as e:  # the ledger is away: its numbers go missing, the gauges' stay
            log.info("no rows from the ledger: %s", e)
            rows = ()
        self._rows_s, self._done_then = look.mono_s, done
        slos = {a.model: a.slo for a in look.about}
        pairs = [(r.usage, r.amount_nanos) for r in rows]
        cut = len(rows) == LEDGER_ROWS
        for model in look.fleets:
            mine = [p for p in pairs if p[0].model == model]
            self._windows[model] = window(mine, slos, look.wall_s, cut)
        self._windows[ALL] = window(pairs, slos, look.wall_s, cut)

    def state(self, look: Look) -> dict[str, Any]:
        """What seldom changes."""
        return {
            "version": self._source.version,
            "api": self._source.api_url,
            "currency": self._source.currency,
            "models": [{**msgspec.structs.asdict(a), "slo": msgspec.structs.asdict(a.slo)} for a in look.about],
        }

    def snapshot(self, since_s: float = float("-inf")) -> bytes:
        """All that a fresh page needs; of the rows only those after `since_s`."""
        return msgspec.json.encode(
            {
                "fields": FIELDS,
                "state": self._state,
                "flags": tuple(self.flags.recent),
                "replicas": self._replicas,
                "history": self.history.columns("15m", since_s),
                **self.history.newest(),
            }
        )

    def columns(self, span: Span) -> bytes:
        return msgspec.json.encode({"fields": FIELDS, **self.history.columns(span)})

    async def listen(self, since_s: float) -> AsyncGenerator[bytes, None]:
        """Server-sent events of one page: a snapshot, then what is new, until it leaves or lags too far behind."""
        mine: asyncio.Queue[Event | None] = asyncio.Queue(BEHIND)
        self._pages.add(mine)
        try:
            yield event("snapshot", self.snapshot(since_s))
            while (told := await mine.get()) is not None:
                yield event(*told)
        finally:
            self._pages.discard(mine)

    def _tell(self, kind: str, value: object) -> None:
        if not self._pages:
            return
        told = (kind, msgspec.json.encode(value))
        for page in list(self._pages):
            if not _offer(page, told):
                self._pages.discard(page)
                _offer(page, None)


def _offer(page: asyncio.Queue[Event | None], told: Event | None) -> bool:
    """Whether there was room; the end (None) always gets in."""
    if told is None and page.full():
        page.get_nowait()
    with contextlib.suppress(asyncio.QueueFull):
        page.put_nowait(told)
        return True
    return False


def event(kind: str, content: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"


def _cost(fleet: Fleet, span_s: float) -> float:
    return fleet.billed * fleet.price_per_hour * span_s / 3600 if fleet.price_per_hour else NAN
