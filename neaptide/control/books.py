"""Control's bookkeeper: the ledger, its keys and the journals' intake, all on one thread of their own.

The event loop never waits for the database; the ledger never sees two threads. While the database is away the journals
keep everything, and intake goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from neaptide.clock import RealClock, mono_s
from neaptide.config import Settings
from neaptide.control import backup as archive
from neaptide.control import port
from neaptide.control.keys import KeyInfo, KeyStore
from neaptide.control.lender import Lender
from neaptide.cost.accounts import Terms
from neaptide.cost.budgets import A_SCOPE, Budget, check
from neaptide.cost.intake import Intake
from neaptide.cost.leases import Lease, Leases
from neaptide.cost.ledger import Ledger, Receipt, Total, UsageFilter, open_ledger
from neaptide.cost.prices import nanos, rates
from neaptide.errors import RequestError, StorageError
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.state import StateDir
from neaptide.fleet.tally import ask
from neaptide.link import TallyRow
from neaptide.table import KeyRow, Prices
from neaptide.types import Begin, Priority

PULL_S = 0.3
CLEAR_S = 600.0
DAY_S = 86400.0
T = TypeVar("T")


class Books:
    """`keys` is None until the ledger is open. Coroutines answer from the ledger's thread and raise StorageError."""

    def __init__(self, state: StateDir, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self.lender = Lender(self._lend)
        self.keys: tuple[KeyRow, ...] | None = None
        self.prices = Prices()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._clock = RealClock()
        self._ledger: Ledger | None = None
        self._store: KeyStore | None = None
        self._intake: Intake | None = None
        self._leases: Leases | None = None
        self._loop = asyncio.get_running_loop()
        self._error = ""
        self._pulled_s = mono_s()
        self._look_for_dead = True  # at start: whatever died while we were away
        self._wake = asyncio.Event()

    # -- life --------------------------------------------------------------------------------------------------

    async def open(self, default_key: str) -> None:
        """Open, migrate, adopt the default key. StorageError when the ledger cannot be had."""
        keys, budgets, leases, now_s = await self._call(lambda: self._open(default_key))
        self.lender.open(budgets, leases, now_s)
        self.keys = keys

    def _open(self, default_key: str) -> tuple[tuple[KeyRow, ...], tuple[Budget, ...], tuple[Lease, ...], float]:
        ledger = open_ledger(self.settings.ledger.url, self.state.root, self._clock)
        self._ledger = ledger
        ledger.on_paid = lambda journal, amounts: self._post(self.lender.paid, journal, amounts)
        self._price(ledger, self.settings)
        self._store = KeyStore(ledger, self.state.secret(self.state.pepper), self._clock)
        self._store.adopt(default_key, "default")
        self._intake = Intake(ledger, self.state.journal, self._clock)
        self._leases = Leases(ledger.database)
        now_s, budgets = self._clock.wall_s(), self._leases.budgets()
        return self._store.rows(), budgets, self._leases.of([b.name(now_s) for b in budgets]), now_s

    def _price(self, ledger: Ledger, settings: Settings) -> None:
        version = ledger.set_prices(rates(settings.prices), settings.currency)
        self.prices = Prices(version=version, currency=settings.currency, rates=ledger.prices.latest.rates)

    def configure(self, settings: Settings) -> None:
        """Prices take effect for requests that start from now on."""
        self.settings = settings
        ledger = self._ledger
        if ledger is not None:
            self._thread.submit(self._price, ledger, settings)

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
        await self._call(self._end_leases)

    def _end_leases(self) -> None:
        """Of gateways that are dead, with all that they wrote taken."""
        leases = self._open_leases()
        for gateway in leases.gateways():
            if self._books().is_closed(gateway):
                leases.over(gateway)
                self._post(self.lender.over, gateway)

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
            before_s = self._clock.wall_s() - self.settings.ledger.retention_days * DAY_S
            self._ledger.forget(before_s)
            self._open_leases().forget(before_s)

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

    async def _lend(self, leases: Sequence[Lease]) -> None:
        await self._call(lambda: self._open_leases().lend(leases))

    async def list_budgets(self) -> port.Budgets:
        await self._pull()
        return port.Budgets(currency=self.settings.currency, rows=self.lender.shown(self._clock.wall_s()))

    async def set_budget(self, new: port.NewBudget) -> port.BudgetRow:
        amount = nanos(new.amount) if new.unit == "money" else _whole(new.amount)
        if amount is None:
            fix = "Money has at most nine decimals, tokens are whole; neither is below 0."
            raise RequestError(400, f"{new.amount} is not an amount of {new.unit}.", param="amount", fix=fix)
        budget = Budget(scope=new.scope, unit=new.unit, period=new.period, amount=amount, strict=new.strict)
        check(budget)
        kind, _, name = budget.scope.partition(":")
        if kind == "key" and not any(key.id == name for key in self.keys or ()):
            raise RequestError(
                400, f"There is no key {name!r}.", param="scope", fix="`neaptide keys list` has their ids."
            )
        await self._call(partial(self._set_budget, budget))
        return self._shown(budget)

    def _set_budget(self, budget: Budget) -> None:
        leases, now_s = self._open_leases(), self._clock.wall_s()
        others = [b for b in leases.budgets() if b.scope == budget.scope and b.id != budget.id]
        if len(others) >= A_SCOPE:
            raise RequestError(
                400,
                f"{budget.scope} has {len(others)} budgets already: {', '.join(b.id for b in others)}.",
                param="scope",
                fix="Remove one: `neaptide budgets remove ID`.",
            )
        leases.set(budget, now_s)
        name = budget.name(now_s)
        self._post(self.lender.set, leases.budgets(), name, budget.amount, leases.of([name]))

    async def remove_budget(self, budget_id: str) -> port.BudgetRow:
        budget = next((b for b in self.lender.budgets if b.id == budget_id), None)
        if budget is None:
            raise port.NotFoundError(f"there is no budget {budget_id!r}", fix="neaptide budgets list")
        shown = self._shown(budget)
        await self._call(partial(self._remove_budget, budget))
        return shown

    def _remove_budget(self, budget: Budget) -> None:
        leases = self._open_leases()
        leases.remove(budget)
        self._post(self.lender.remove, leases.budgets(), budget.name(self._clock.wall_s()))

    def _shown(self, budget: Budget) -> port.BudgetRow:
        return next(row for row in self.lender.shown(self._clock.wall_s()) if row.id == budget.id)

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

    def _post(self, told: Callable[..., None], *what: object) -> None:
        """From the ledger's thread to control's loop, in the order in which the ledger was read and written."""
        self._loop.call_soon_threadsafe(told, *what)

    def _open_leases(self) -> Leases:
        if self._leases is None:
            raise _opening()
        return self._leases

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            raise _opening()
        return self._ledger

    def _keys(self) -> KeyStore:
        if self._store is None:
            raise _opening()
        return self._store

    def _books(self) -> Intake:
        if self._intake is None:
            raise _opening()
        return self._intake


def _opening() -> StorageError:
    return StorageError("the ledger is still opening", fix="ask again in a second", code="E511")


def _whole(amount: int | float) -> int | None:
    return int(amount) if isinstance(amount, int) or amount.is_integer() else None


def _shown(info: KeyInfo) -> port.KeyInfo:
    return port.KeyInfo(
        id=info.id,
        name=info.name,
        tail=info.last_four,
        tenant=info.tenant,
        project=info.project,
        priority=cast(Priority, info.priority),  # checked when it was written
        models=info.models,
        inside=info.inside,
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
        "inside": asked.inside,
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
