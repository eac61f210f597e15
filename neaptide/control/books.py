"""Control's bookkeeper: the ledger, its keys and the journals' intake, all on one thread of their own.

The event loop never waits for the database; the ledger never sees two threads. While the database is away the journals
keep everything, and intake goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from neaptide.clock import RealClock, mono_s
from neaptide.config import Settings
from neaptide.control import backup as archive
from neaptide.control import port
from neaptide.control.keys import KeyInfo, KeyStore
from neaptide.cost.accounts import Terms
from neaptide.cost.intake import Intake
from neaptide.cost.ledger import Ledger, Receipt, Total, UsageFilter, open_ledger
from neaptide.cost.prices import rates
from neaptide.errors import StorageError
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.state import StateDir
from neaptide.fleet.tally import ask
from neaptide.link import TallyRow
from neaptide.table import KeyRow
from neaptide.types import Begin, Priority

PULL_S = 0.3
CLEAR_S = 600.0
DAY_S = 86400.0
T = TypeVar("T")


class Books:
    """`keys` is None until the ledger is open. Coroutines answer from the ledger's thread and raise StorageError."""

    def __init__(self, state: StateDir, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self.keys: tuple[KeyRow, ...] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._clock = RealClock()
        self._ledger: Ledger | None = None
        self._store: KeyStore | None = None
        self._intake: Intake | None = None
        self._error = ""
        self._pulled_s = mono_s()
        self._look_for_dead = True  # at start: whatever died while we were away
        self._wake = asyncio.Event()

    # -- life --------------------------------------------------------------------------------------------------

    async def open(self, default_key: str) -> None:
        """Open, migrate, adopt the default key. StorageError when the ledger cannot be had."""
        await self._call(lambda: self._open(default_key))

    def _open(self, default_key: str) -> None:
        ledger = open_ledger(self.settings.ledger.url, self.state.root, self._clock)
        self._ledger = ledger
        ledger.set_prices(rates(self.settings.prices), self.settings.currency)
        self._store = KeyStore(ledger, self.state.secret(self.state.pepper), self._clock)
        self._store.adopt(default_key, "default")
        self._intake = Intake(ledger, self.state.journal, self._clock)
        self.keys = self._store.rows()

    def configure(self, settings: Settings) -> None:
        """Prices take effect for requests that start from now on."""
        self.settings = settings
        ledger = self._ledger
        if ledger is not None:
            self._thread.submit(ledger.set_prices, rates(settings.prices), settings.currency)

    def gateway_died(self) -> None:
        self._look_for_dead = True
        self._wake.set()

    async def keep(self, fleet: LocalDriver, token: str) -> None:
        """Take what the journals bring, close what the dead left open, clear what is old; until cancelled."""
        cleared_s = float("-inf")
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), PULL_S)
            self._wake.clear()
            try:
                await self._pull()
                if self._look_for_dead:
                    self._look_for_dead = False
                    await self._close_dead(fleet, token)
                if mono_s() - cleared_s > CLEAR_S:
                    await self._call(self._clear)
                    cleared_s = mono_s()
                self._error = ""
            except StorageError as e:  # the journals wait; status shows why
                self._error = str(e)
                self._look_for_dead = True  # it may have been that which failed
                await asyncio.sleep(1.0)

    async def _pull(self) -> None:
        await self._call(self._books().pull)
        self._pulled_s = mono_s()

    async def _close_dead(self, fleet: LocalDriver, token: str) -> None:
        dead = await self._call(self._books().dead)
        for journal, begins in dead.items():
            tally = await self._ask(begins, fleet, token)
            await self._call(partial(self._books().close_dead, journal, tally))

    async def _ask(self, begins: tuple[Begin, ...], fleet: LocalDriver, token: str) -> Mapping[str, TallyRow]:
        by_replica: dict[str, list[str]] = {}
        for begin in begins:
            by_replica.setdefault(begin.replica, []).append(begin.request_id)
        tally: dict[str, TallyRow] = {}
        for replica, ids in by_replica.items():
            if replica in fleet.pids():
                tally |= await ask(fleet.link_path(replica), token, ids)
        return tally

    def _clear(self) -> None:
        self._books().remove_taken(self.settings.journal.retention_days)
        if self._ledger is not None:
            self._ledger.forget(self._clock.wall_s() - self.settings.ledger.retention_days * DAY_S)

    async def close(self) -> None:
        """Take the journals' last records, then let go of the ledger."""
        if self._intake is not None:
            with contextlib.suppress(StorageError):  # they wait in the journal for the next start
                await self._pull()
        if self._ledger is not None:
            await self._call(self._ledger.close)
        self._thread.shutdown(wait=False)

    # -- what the admin API asks ---------------------------------------------------------------------------------

    async def status(self) -> port.LedgerStatus:
        label = self._ledger.database.label if self._ledger else "opening"
        return port.LedgerStatus(url=label, ok=not self._error, lag_s=self._lag_s(), error=self._error)

    def _lag_s(self) -> float:
        """Age of the oldest record that may not have been taken: nothing is older than the last pull."""
        age_s = mono_s() - self._pulled_s
        return age_s if age_s > 4 * PULL_S else 0.0

    async def list_keys(self) -> port.Keys:
        rows = await self._call(self._keys().list)
        return port.Keys(rows=tuple(map(_shown, rows)))

    async def create_key(self, new: port.NewKey) -> port.CreatedKey:
        made = await self._call(
            lambda: self._keys().create(
                new.name,
                tenant=new.tenant,
                project=new.project or "default",
                priority=new.priority,
                models=new.models,
                terms=Terms(**_terms(new)),
            )
        )
        await self._reload()
        return port.CreatedKey(key=made.secret, info=_shown(made.info))

    async def set_key(self, key_id: str, change: port.KeyChange) -> port.KeyInfo:
        info = await self._call(lambda: self._keys().set(key_id, _terms(change)))
        await self._reload()
        return _shown(info)

    async def revoke_key(self, key_id: str) -> port.KeyInfo:
        info = await self._call(lambda: self._keys().revoke(key_id))
        await self._reload()
        return _shown(info)

    async def _reload(self) -> None:
        self.keys = await self._call(self._keys().rows)

    async def usage(self, where: port.UsageFilter, cursor: str | None, limit: int) -> port.UsagePage:
        await self._pull()
        page = await self._call(lambda: self._open_ledger().usage(_filter(where), cursor=cursor or "", limit=limit))
        return port.UsagePage(
            rows=tuple(map(_row, page.receipts)), next=page.cursor or None, currency=self.settings.currency
        )

    async def totals(self, where: port.UsageFilter, by: port.GroupBy) -> port.UsageTotals:
        await self._pull()
        found = await self._call(lambda: self._open_ledger().totals(by, _filter(where)))
        rows = sorted(found, key=lambda t: (-t.amount_nanos, -t.requests))
        return port.UsageTotals(
            by=by, currency=self.settings.currency, rows=tuple(map(_total, rows[:1000])), total=_sum(found)
        )

    async def backup(self) -> port.BackupReport:
        return await asyncio.to_thread(archive.create, self.state.root)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            raise StorageError("the ledger is still opening", fix="ask again in a second", code="E511")
        return self._ledger

    def _keys(self) -> KeyStore:
        if self._store is None:
            raise StorageError("the ledger is still opening", fix="ask again in a second", code="E511")
        return self._store

    def _books(self) -> Intake:
        if self._intake is None:
            raise StorageError("the ledger is still opening", fix="ask again in a second", code="E511")
        return self._intake


def _shown(info: KeyInfo) -> port.KeyInfo:
    return port.KeyInfo(
        id=info.id,
        name=info.name,
        tail=info.last_four,
        tenant=info.tenant,
        project=info.project,
        priority=cast(Priority, info.priority),  # checked when it was written
        models=info.models,
        created_wall_s=info.created_s,
        disabled=info.disabled,
        expires_wall_s=info.expires_s,
        scopes=cast(tuple[port.Scope, ...], info.scopes),
        rpm=info.rpm,
        tpm=info.tpm,
        concurrency=info.concurrency,
    )


def _terms(asked: port.NewKey | port.KeyChange) -> dict[str, Any]:
    """Those it names."""
    named: dict[str, Any] = {
        "expires_s": asked.expires_wall_s,
        "scopes": asked.scopes,
        "rpm": asked.rpm,
        "tpm": asked.tpm,
        "concurrency": asked.concurrency,
    }
    return {name: value for name, value in named.items() if value is not msgspec.UNSET}


def _filter(where: port.UsageFilter) -> UsageFilter:
    return UsageFilter(
        tenant=where.tenant or "",
        project=where.project or "",
        key=where.key or "",
        model=where.model or "",
        outcome=where.outcome or "",
        since_s=where.since_s,
        until_s=where.until_s,
    )


def _row(receipt: Receipt) -> port.UsageRow:
    return port.UsageRow(usage=receipt.usage, amount_nanos=receipt.amount_nanos)


def _total(total: Total) -> port.UsageTotal:
    return port.UsageTotal(
        group=total.name,
        requests=total.requests,
        ok=total.ok,
        refused=total.refused,
        failed=total.failed,
        aborted=total.aborted,
        prompt_tokens=total.prompt_tokens,
        cached_tokens=total.cached_tokens,
        reasoning_tokens=total.reasoning_tokens,
        output_tokens=total.output_tokens,
        amount_nanos=total.amount_nanos,
    )


def _sum(totals: tuple[Total, ...]) -> port.UsageTotal:
    names = [f for f in port.UsageTotal.__struct_fields__ if f != "group"]
    return port.UsageTotal(group="", **{n: sum(getattr(t, n) for t in totals) for n in names})
