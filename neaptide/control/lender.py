"""Joins the treasury to what is outside of it: gateways' connections, the ledger, and the budgets that are set.

Everything here runs on control's loop. What the treasury answers waits in one line: what is lent is stored first, in
one transaction for all that waits, then all is sent in its order. A gateway is known by its run (its journal's name),
and heard on its newest connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from neaptide.clock import mono_s
from neaptide.control.port import BudgetRow
from neaptide.control.publish import Gateway
from neaptide.control.treasury import ENDLESS, Fund, Grant, Loan, Message, Treasury
from neaptide.cost import budgets as names
from neaptide.cost.budgets import Budget
from neaptide.cost.leases import NOBODY, Lease
from neaptide.errors import StorageError
from neaptide.link import ASK, GRANT, LEASES, RECALL, frame
from neaptide.table import Ask, Granted, KeyRow, Leases, Recalled, Returned

TICK_S = 0.25  # who has waited too long is looked for so often
RETRY_S = 1.0  # the ledger could not be written
ENDED_S = 3600.0  # how long a period that is over may still be asked for
DAY_S = 86400

log = logging.getLogger("neaptide.control")


class Peer(NamedTuple):
    """The newest connection of a gateway's run."""

    gateway: Gateway
    connection: int  # counted by the gateway


class Lender:
    """`store` writes leases into the ledger: it raises StorageError, and is tried again."""

    def __init__(self, store: Callable[[Sequence[Lease]], Awaitable[None]]) -> None:
        self.treasury = Treasury()
        self.budgets: tuple[Budget, ...] = ()
        self._store = store
        self._peers: dict[str, Peer] = {}  # by gateway's run
        self._line: list[tuple[Gateway, Message]] = []
        self._changed: set[tuple[str, str]] = set()  # (budget, gateway) whose counts are not stored
        self._wake = asyncio.Event()
        self._made_of: tuple[object, object, float] = (None, None, 0.0)  # `_rows`
        self._rows: tuple[KeyRow, ...] = ()
        self._ended: dict[str, float] = {}  # names whose period is over, since when

    # -- budgets: what the ledger says

    def open(self, budgets: tuple[Budget, ...], leases: Iterable[Lease], wall_s: float) -> None:
        """All that the ledger knows of the budgets and their leases of this period."""
        funds = {budget.name(wall_s): Fund(budget.amount) for budget in budgets}
        self.budgets = budgets
        for lease in leases:
            _book(funds[lease.budget], lease)
        self._post(self.treasury.open(funds, mono_s()))
        self._changed |= {(name, g) for name, fund in self.treasury.funds.items() for g in fund.loans}

    def set(self, budgets: tuple[Budget, ...], name: str, amount: int, leases: Sequence[Lease]) -> None:
        """A budget is set, and `budgets` are all now; `leases`: what the ledger has of it, called in the order in which
        the ledger was read and `paid` is told."""
        self.budgets = budgets
        fund = self.treasury.funds.setdefault(name, Fund(ENDLESS))
        fund.spent = 0
        for lease in leases:
            _book(fund, lease)
        self._post(self.treasury.amend(name, amount, mono_s()))

    def remove(self, budgets: tuple[Budget, ...], name: str) -> None:
        """It stops nobody any more; `budgets` are all that are left."""
        self.budgets = budgets
        self._post(self.treasury.amend(name, ENDLESS, mono_s()))

    def paid(self, gateway: str, amounts: Mapping[str, int]) -> None:
        """Rows of this gateway have been taken into the ledger."""
        if self.treasury.opened:  # else the ledger has yet to be read
            for budget, amount in amounts.items():
                self.treasury.spent(budget, gateway, amount)

    def over(self, gateway: str) -> None:
        """It is dead, and all that it wrote has been taken."""
        if self.treasury.opened:
            self._post(self.treasury.over(gateway, mono_s()))

    # -- what others ask

    def rows(self, keys: tuple[KeyRow, ...], wall_s: float) -> tuple[KeyRow, ...]:
        """`keys` with the budgets that they are under now; made anew only when something changed."""
        now, (old_keys, old_budgets, old_day) = mono_s(), self._made_of
        for name in [n for n, since_s in self._ended.items() if now - since_s > ENDED_S]:
            del self._ended[name]
            self.treasury.forget(name)
        if keys is not old_keys or self.budgets is not old_budgets or wall_s // DAY_S != old_day:
            self._made_of = (keys, self.budgets, wall_s // DAY_S)
            self._begin_periods(wall_s, now)
            scopes = names.by_scope(self.budgets, wall_s)
            self._rows = tuple(_under(key, scopes) for key in keys) if scopes else keys
        return self._rows

    def _begin_periods(self, wall_s: float, now: float) -> None:
        """Before any gateway hears of the new names: a budget that the treasury does not know has no end."""
        in_force = {budget.name(wall_s): budget.amount for budget in self.budgets}
        for name, amount in in_force.items():
            if name not in self.treasury.funds:
                self._post(self.treasury.amend(name, amount, now))
            self._ended.pop(name, None)
        for name in self.treasury.funds.keys() - in_force.keys():
            self._ended.setdefault(name, now)

    def shown(self, wall_s: float) -> tuple[BudgetRow, ...]:
        """Every budget that is set, with what is spent and lent of it in this period."""
        return tuple(_shown(budget, budget.name(wall_s), self.treasury) for budget in self.budgets)

    # -- connections

    def hear(self, gateway: Gateway, kind: int, payload: bytes) -> None:
        run, now = gateway.journal, mono_s()
        if kind == LEASES:
            connection, held, more = msgspec.json.decode(payload, type=Leases)
            gateway.leases |= held
            peer = self._peers.get(run)
            if not more and (peer is None or peer.connection < connection):
                self._peers[run] = Peer(gateway, connection)
                self._post(self.treasury.joined(run, gateway.leases, now))
                self._changed |= {(name, run) for name, fund in self.treasury.funds.items() if run in fund.loans}
            return
        if not self._is_newest(gateway):
            return
        if kind == ASK:
            number, wants = msgspec.json.decode(payload, type=Ask)
            self._post(self.treasury.ask(run, number, wants, now))
        else:
            budget, amount, round = msgspec.json.decode(payload, type=Returned)
            self._post(self.treasury.returned(run, budget, amount, round, now))
            self._changed.add((budget, run))

    def left(self, gateway: Gateway) -> None:
        if self._is_newest(gateway):
            del self._peers[gateway.journal]
            self._post(self.treasury.left(gateway.journal, mono_s()))

    def _is_newest(self, gateway: Gateway) -> bool:
        peer = self._peers.get(gateway.journal)
        return peer is not None and peer.gateway is gateway

    # -- the line

    async def run(self) -> None:
        """Stores and sends, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            self._post(self.treasury.late(mono_s()))
            await self._flush()

    def _post(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if (peer := self._peers.get(message.gateway)) is not None:
                self._line.append((peer.gateway, message))
            if isinstance(message, Grant):
                self._changed |= {(budget, message.gateway) for budget in message.amounts}
            self._wake.set()

    async def _flush(self) -> None:
        """What is lent, into the ledger; then everything to the gateways. What lends nothing does not wait for the
        ledger."""
        line, self._line = self._line, []
        lends = any(isinstance(message, Grant) and message.amounts for _, message in line)
        if (lends or not line) and not await self._keep():
            self._line[:0] = line
            return
        for gateway, message in line:
            if self._is_newest(gateway) and not gateway.writer.is_closing():
                gateway.writer.write(_frame(message))

    async def _keep(self) -> bool:
        """Whether all counts that changed are stored: nobody may spend what a restart would not know of."""
        changed, self._changed = self._changed, set()
        leases = [lease for place in changed if (lease := self._lease(*place)) is not None]
        try:
            if leases:
                await self._store(leases)
        except StorageError as e:
            self._changed |= changed
            log.warning("leases cannot be stored, so none is given: %s", e)
            await asyncio.sleep(RETRY_S)
            return False
        return True

    def _lease(self, budget: str, gateway: str) -> Lease | None:
        fund = self.treasury.funds.get(budget)
        loan = fund.loans.get(gateway) if fund is not None else None
        return Lease(budget, gateway, loan.granted, loan.returned) if loan is not None else None


def _book(fund: Fund, lease: Lease) -> None:
    """What the ledger says of a lease. What a gateway itself has said that it has had is newer."""
    fund.spent += lease.spent
    if lease.gateway == NOBODY:
        return
    if lease.gateway in fund.loans:
        fund.loans[lease.gateway].spent = lease.spent
    else:
        fund.loans[lease.gateway] = Loan(lease.granted, lease.returned, lease.spent)


def _under(key: KeyRow, scopes: Mapping[str, names.Terms]) -> KeyRow:
    terms = names.terms(scopes, key.id, key.tenant, key.project)
    if not terms.budgets:
        return key
    return msgspec.structs.replace(key, budgets=terms.budgets, strict=terms.strict)


def _shown(budget: Budget, name: str, treasury: Treasury) -> BudgetRow:
    fund = treasury.funds.get(name) or Fund(budget.amount)
    return BudgetRow(
        id=budget.id,
        name=name,
        scope=budget.scope,
        unit=budget.unit,
        period=budget.period,
        amount=budget.amount,
        strict=budget.strict,
        spent=fund.spent,
        lent=sum(loan.out for loan in fund.loans.values()),
        left=max(0, budget.amount - fund.spent),
        renews_wall_s=names.renews_s(name),
    )


def _frame(message: Message) -> bytes:
    if isinstance(message, Grant):
        told = Granted(message.number, message.amounts, message.exhausted, message.unknown)
        return frame(0, GRANT, msgspec.json.encode(told))
    return frame(0, RECALL, msgspec.json.encode(Recalled(message.budget, message.round)))
