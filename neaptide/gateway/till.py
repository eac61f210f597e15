"""Pays requests from the budgets of their keys: what one may cost before it goes on, what it has cost at its end.

    pay -> it goes on | it waits, PAY_S at most -> it goes on, or is refused by the budget's name        settle: its end

Who waits here has no place in a line yet, and its client may leave for nothing. Requests of keys without budgets never
come here.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from neaptide.clock import mono_s, wall_s
from neaptide.cost.budgets import renews_s, unit_of
from neaptide.cost.rate import CHARGED, cost_nanos, cost_tokens, reserve_nanos, reserve_tokens
from neaptide.errors import RequestError
from neaptide.gateway.exchange import DONE, Exchange
from neaptide.gateway.purse import Purse, Verdict
from neaptide.link import ASK, GRANT, LEASES, RETURN
from neaptide.table import Granted, Leases, Prices, Recalled, Returned, Slow
from neaptide.types import Paid, Rate, Usage
from neaptide.wire.peek import answers

PAY_S = 5.0  # control asks other gateways for a second at most; whoever hears nothing for so long will not
SURPLUS_S = 10.0  # what nothing needed for so long goes back to control
HELD_A_FRAME = 4_000  # a name and two numbers each: a frame stays far below its limit
UNKNOWN_RETRY_S = 1.0  # control is started again in less

Say = Callable[[int, Any], None]  # to control: a frame's type, and what its payload says


class Bill:
    """Of one request: what it holds of each budget once it is `paid`, and by which price."""

    __slots__ = ("needs", "paid", "rate", "version")

    def __init__(self, needs: dict[str, int], rate: Rate | None, version: int) -> None:
        self.needs, self.rate, self.version = needs, rate, version
        self.paid = False


class Till:
    """The purse, its requests and its frames. `go_on(exchange, now)` takes up a request that has waited to be paid."""

    def __init__(self, go_on: Callable[[Exchange, float], None]) -> None:
        self._go_on = go_on
        self._purse: Purse[Exchange] = Purse()
        self._paying: dict[Exchange, Bill] = {}  # who waits, in the order of coming
        self._slow = Slow()
        self._in_force: frozenset[str] | None = None  # every budget that a key of the table is under, once looked for
        self._say: Say | None = None
        self._connections = 0
        self._scheduled = False
        self._looked_s = 0.0  # for a surplus

    def install(self, slow: Slow) -> None:
        if slow.version != self._slow.version:
            self._in_force = None
        self._slow = slow

    # --- requests

    def pay(self, exchange: Exchange, now: float) -> bool:
        """Whether it may go on now; else it waits here, or has been refused."""
        try:
            bill = exchange.bill = self._bill(exchange, self._slow.prices)
        except RequestError as error:
            exchange.fail(error, now, "refused")
            return False
        bill.paid = self._purse.pay(exchange, bill.needs)
        if not bill.paid:
            self._paying[exchange] = bill
            exchange.state_s = now
            self._ask_soon()
        return bill.paid

    def settle(self, exchange: Exchange, bill: Bill, usage: Usage) -> Usage:
        """It is over: its row, with what it pays; what it held beyond that is there again."""
        if not bill.paid:
            self._purse.leave(exchange)
            self._paying.pop(exchange, None)
            return usage
        cost = dict.fromkeys(bill.needs, 0)
        if usage.outcome in CHARGED:
            nanos = cost_nanos(bill.rate, usage) if bill.rate is not None else 0
            cost = {b: cost_tokens(usage) if unit_of(b) == "tokens" else nanos for b in bill.needs}
        self._purse.settle(bill.needs, cost)
        paid = tuple(Paid(budget, reserved, cost[budget]) for budget, reserved in bill.needs.items())
        return msgspec.structs.replace(usage, paid=paid, price_version=bill.version)

    def sweep(self, now: float) -> None:
        """Every 100 ms: who has waited too long; now and then, what to give back."""
        late = [(e, b) for e, b in self._paying.items() if now - e.state_s >= PAY_S or now >= e.deadline_s]
        for exchange, bill in late:
            lacking = (b for b, amount in bill.needs.items() if self._purse.left(b) < amount)
            exchange.fail(unknown(next(lacking, next(iter(bill.needs)))), now, "refused")
        if now - self._looked_s >= SURPLUS_S:
            self._looked_s = now
            self._give_surplus()

    @staticmethod
    def _bill(exchange: Exchange, prices: Prices) -> Bill:
        """What it may cost: a byte is a token at least, so its body bounds its prompt. RequestError 400 where it does
        not say how many answers it wants."""
        call, key, row = exchange.call, exchange.key, exchange.lane.row
        most = 0
        if call.route != "tokenize":
            asked, usual = exchange.asked.max_tokens, row.max_tokens_default
            most = usual if asked is None else asked if key.strict else min(asked, usual)
            most *= answers(call.body)
        rate = prices.rates.get(row.model)
        nanos = reserve_nanos(rate, call.size, most) if rate is not None else 0
        tokens = reserve_tokens(call.size, most)
        amounts = {budget: tokens if unit_of(budget) == "tokens" else nanos for budget in key.budgets}
        return Bill({budget: amount for budget, amount in amounts.items() if amount}, rate, prices.version)

    # --- control

    def connected(self, say: Say) -> None:
        """Control is there: it hears first what this gateway holds."""
        self._say = say
        self._connections += 1
        held = list(self._purse.back().items())
        for at in range(0, max(1, len(held)), HELD_A_FRAME):
            part, more = dict(held[at : at + HELD_A_FRAME]), at + HELD_A_FRAME < len(held)
            say(LEASES, Leases(self._connections, part, more))

    def disconnected(self) -> None:
        """Control is away: leases are spent, and whoever needs more is refused."""
        self._say = None
        self._tell(self._purse.alone(), unsure=True)

    def hear(self, kind: int, payload: bytes) -> None:
        """A GRANT or a RECALL. ValueError for what is none."""
        if kind == GRANT:
            number, amounts, exhausted, unsure = msgspec.json.decode(payload, type=Granted)
            self._tell(self._purse.granted(number, amounts, frozenset(exhausted), unsure), unsure)
            for budget in exhausted:
                self._give_back(budget, 0)
            if len(self._purse):
                self._ask_soon()
        else:
            self._give_back(*msgspec.json.decode(payload, type=Recalled))

    def _ask_soon(self) -> None:
        """At the end of this loop turn: one Ask for all who began to wait in it."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self) -> None:
        self._scheduled = False
        verdicts, ask = self._purse.turn()
        if ask is not None and self._say is not None:
            self._say(ASK, ask)
        self._tell(verdicts, unsure=True)

    def _tell(self, verdicts: Iterable[Verdict[Exchange]], unsure: bool) -> None:
        """Those who waited go on, or hear which budget stopped them. All are marked before the first one moves: it may
        end others."""
        heard = list(verdicts)
        for exchange, refused in heard:
            self._paying.pop(exchange).paid = not refused
        now = mono_s()
        for exchange, refused in heard:
            if refused:
                exchange.fail(unknown(refused) if unsure else exceeded(refused, wall_s()), now, "refused")
            elif exchange.state != DONE:
                self._go_on(exchange, now)

    def _give_back(self, budget: str, round: int) -> None:
        amount = self._purse.recalled(budget)
        if self._say is not None and (amount or round):
            self._say(RETURN, Returned(budget, amount, round))

    def _give_surplus(self) -> None:
        if self._say is None or not self._purse.budgets:
            return
        for budget, amount in self._purse.surplus().items():
            self._say(RETURN, Returned(budget, amount))
        if self._in_force is None:
            self._in_force = frozenset(budget for key in self._slow.keys for budget in key.budgets)
        self._purse.forget(self._in_force)


def exceeded(budget: str, now_wall_s: float) -> RequestError:
    """The budget has less left than the request may cost."""
    renews = renews_s(budget)
    left_s = None if renews is None else max(1.0, renews - now_wall_s)
    when = "it does not renew" if renews is None else f"it renews at {_moment(renews)}"
    return RequestError(
        429,
        f"The budget {budget} has less left than this request may cost; {when}.",
        slug="budget_exceeded",
        fix="Ask for fewer max_tokens, or have it raised: `neaptide budgets set`.",
        retry_after_s=left_s,
    )


def unknown(budget: str) -> RequestError:
    """Nobody can tell now whether there is enough."""
    return RequestError(
        503,
        f"What is left of the budget {budget} cannot be told now.",
        slug="budget_unknown",
        fix="Try again in a moment.",
        retry_after_s=UNKNOWN_RETRY_S,
    )


def _moment(at_s: float) -> str:
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
