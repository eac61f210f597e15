"""What is left of each budget, and what is lent to which gateway. Pure: every call answers with what is to be sent.

A gateway is known by its journal, which is its run's own. Whoever calls stores a Grant before it is sent, sends all
messages to a gateway in this order, and tells `joined` what the gateway says it has had: so neither a grant that was
lost with a connection nor a book that is older than the leases lends anything twice or keeps anything back for ever.
It drops what an older connection still holds before it calls `joined`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from neaptide.table import Held, Want

SLICE = 100  # a lease has so manieth part of what can be lent on top of the need, shared by the gateways
PATIENCE_S = 1.0  # for gateways that are asked to give back what lies idle
ENDLESS = 1 << 62  # the amount of a budget that is not set: it may be set while requests run


class Grant(NamedTuple):
    """To a gateway, of one Ask."""

    gateway: str
    number: int
    amounts: dict[str, int]  # by budget
    exhausted: tuple[str, ...]  # budgets that have no more than this
    unknown: bool = False  # control does not know yet


class Recall(NamedTuple):
    """To a gateway: give back what is not reserved of this budget."""

    gateway: str
    budget: str
    round: int


Message = Grant | Recall


class Loan:
    """Of one budget to one gateway."""

    __slots__ = ("granted", "returned", "spent")

    def __init__(self, granted: int = 0, returned: int = 0, spent: int = 0) -> None:
        self.granted, self.returned, self.spent = granted, returned, spent

    @property
    def out(self) -> int:
        """What may still be spent there, or is reserved by what runs."""
        return max(0, self.granted - self.returned - self.spent)

    @property
    def debt(self) -> int:
        """What was spent there beyond it, by requests that cost more than their reserve."""
        return max(0, self.spent + self.returned - self.granted)


class Fund:
    """One budget of one period: another period is another budget, of another name."""

    __slots__ = ("amount", "loans", "spent")

    def __init__(self, amount: int, spent: int = 0) -> None:
        self.amount, self.spent = amount, spent
        self.loans: dict[str, Loan] = {}  # by gateway

    @property
    def free(self) -> int:
        """What can be lent."""
        return self.amount - self.spent - sum(loan.out for loan in self.loans.values())

    def loan(self, gateway: str) -> Loan:
        return self.loans.setdefault(gateway, Loan())

    def most(self, gateway: str, left: int) -> int:
        """What can be lent to it: what only covers its debt has been counted as spent already."""
        return max(0, self.free) + min(max(0, -left), self.loan(gateway).debt)


class Asked:
    """A gateway's Ask, and the recalls for its sake: nobody is asked twice in one connection."""

    __slots__ = ("asked", "number", "round", "since_s", "waits", "wants")

    def __init__(self, number: int, wants: dict[str, Want], now: float) -> None:
        self.number, self.wants = number, wants
        self.round, self.since_s = 0, now  # the last round of recalls; when the first was, or it came
        self.asked: set[tuple[str, str]] = set()  # (gateway, budget)
        self.waits: set[tuple[str, str]] = set()  # of these, who have not answered


class Treasury:
    """All budgets. Asks are answered once it is `open`: before, nothing is known of what was spent."""

    def __init__(self) -> None:
        self.opened = False
        self.funds: dict[str, Fund] = {}
        self.gateways: set[str] = set()  # connected
        self.mute: set[str] = set()  # of these, who did not answer a Recall and has said nothing since
        self.asks: dict[str, Asked] = {}  # by gateway, in the order of asking
        self.held: dict[str, dict[str, Held]] = {}  # by connected gateway, until it is open
        self._rounds = 0

    def open(self, funds: Mapping[str, Fund], now: float) -> list[Message]:
        self.opened, self.funds = True, dict(funds)
        for gateway, held in self.held.items():
            self._books(gateway, held)
        self.held.clear()
        return self._serve(now)

    def amend(self, budget: str, amount: int, now: float) -> list[Message]:
        """A budget is new, or its amount is another one; what was spent stays."""
        self.funds.setdefault(budget, Fund(ENDLESS)).amount = amount
        return self._serve(now)

    def forget(self, budget: str) -> None:
        """Its period has ended long ago."""
        self.funds.pop(budget, None)

    def spent(self, budget: str, gateway: str, amount: int) -> None:
        """A row of this gateway has been taken into the ledger."""
        fund = self.funds.get(budget)
        if fund is not None:
            fund.spent += amount
            fund.loan(gateway).spent += amount

    def joined(self, gateway: str, held: Mapping[str, Held], now: float) -> list[Message]:
        """It is connected; `held`: what it has had and given back, by its own account, of all budgets."""
        self._gone(gateway)
        self.gateways.add(gateway)
        if self.opened:
            self._books(gateway, held)
        else:
            self.held[gateway] = dict(held)
        return self._serve(now)

    def left(self, gateway: str, now: float) -> list[Message]:
        """It is not connected: it is asked nothing any more. Its loans stay: it may live and spend them."""
        self._gone(gateway)
        return self._serve(now)

    def over(self, gateway: str, now: float) -> list[Message]:
        """It is dead, and all that it wrote is in the ledger: what it did not spend is here again."""
        self._gone(gateway)
        for fund in self.funds.values():
            fund.loans.pop(gateway, None)
        return self._serve(now)

    def _gone(self, gateway: str) -> None:
        self.gateways.discard(gateway)
        self.mute.discard(gateway)
        self.asks.pop(gateway, None)
        self.held.pop(gateway, None)
        for ask in self.asks.values():
            ask.waits = {place for place in ask.waits if place[0] != gateway}
            ask.asked = {place for place in ask.asked if place[0] != gateway}

    def _books(self, gateway: str, held: Mapping[str, Held]) -> None:
        for budget in held:
            self.funds.setdefault(budget, Fund(ENDLESS))
        for budget, fund in self.funds.items():
            if gateway in fund.loans or budget in held:
                loan = fund.loan(gateway)
                loan.granted, loan.returned = held.get(budget, Held(0, 0))

    def ask(self, gateway: str, number: int, wants: Mapping[str, Want], now: float) -> list[Message]:
        if gateway not in self.gateways:
            return []
        self.mute.discard(gateway)
        self.asks[gateway] = Asked(number, dict(wants), now)
        return self._serve(now)

    def returned(self, gateway: str, budget: str, amount: int, round: int, now: float) -> list[Message]:
        """A gateway gives back; `round`: of the Recall that it answers, 0 of none."""
        if gateway not in self.gateways:
            return []
        self.mute.discard(gateway)
        amount = max(0, amount)
        if (fund := self.funds.get(budget)) is not None:
            fund.loan(gateway).returned += amount
        own = self.asks.get(gateway)
        if own is not None and budget in own.wants:  # what it gave back it needs again
            wanted, left = own.wants[budget]
            own.wants[budget] = Want(wanted, left - amount)
        for ask in self.asks.values():
            if ask.round == round:
                ask.waits.discard((gateway, budget))
        return self._serve(now)

    def late(self, now: float) -> list[Message]:
        """Who does not answer a Recall is not waited for, and is not asked again until it says something. Nor does
        anybody wait for control to open."""
        if not self.opened:
            late = [(name, ask) for name, ask in self.asks.items() if now - ask.since_s >= PATIENCE_S]
            for gateway, _ in late:
                del self.asks[gateway]
            return [Grant(gateway, ask.number, {}, (), True) for gateway, ask in late]
        for ask in self.asks.values():
            if ask.waits and now - ask.since_s >= PATIENCE_S:
                self.mute |= {gateway for gateway, _ in ask.waits}
                ask.waits.clear()
        return self._serve(now)

    def _serve(self, now: float) -> list[Message]:
        """Asks in their order, each whole; those that share no budget with one that waits go past it."""
        found: list[Message] = []
        blocked: set[str] = set()
        for gateway, ask in list(self.asks.items()) if self.opened else ():
            if ask.waits or not blocked.isdisjoint(ask.wants):
                blocked.update(ask.wants)
            elif idle := self._idle(gateway, ask):
                self._rounds += 1
                if not ask.round:
                    ask.since_s = now
                ask.round, ask.waits = self._rounds, set(idle)
                ask.asked |= ask.waits
                found += [Recall(other, budget, ask.round) for other, budget in idle]
                blocked.update(ask.wants)
            else:
                del self.asks[gateway]
                found.append(self._grant(gateway, ask))
        return found

    def _idle(self, asking: str, ask: Asked) -> list[tuple[str, str]]:
        """Who may have something to give back of what is short."""
        return [
            (other, budget)
            for budget, want in ask.wants.items()
            if (fund := self.funds.get(budget)) is not None and want.wanted - want.left > fund.most(asking, want.left)
            for other, loan in fund.loans.items()
            if other != asking and loan.out > 0 and other in self.gateways and other not in self.mute
            if (other, budget) not in ask.asked
        ]

    def _grant(self, gateway: str, ask: Asked) -> Grant:
        """What is needed and a little more; all there is where that is less. A budget that is not set has no end."""
        amounts: dict[str, int] = {}
        exhausted = []
        for budget, want in ask.wants.items():
            need, fund = max(0, want.wanted - want.left), self.funds.setdefault(budget, Fund(ENDLESS))
            amount = self._portion(fund, gateway, need, want.left)
            if amount < need:
                exhausted.append(budget)
            if amount:
                amounts[budget] = amount
        return Grant(gateway, ask.number, amounts, tuple(exhausted))

    def _portion(self, fund: Fund, gateway: str, need: int, left: int) -> int:
        most = fund.most(gateway, left)
        more = need and fund.amount != ENDLESS
        spare = max(0, most - need) // (SLICE * max(1, len(self.gateways))) if more else 0
        amount = min(most, need + spare)
        fund.loan(gateway).granted += amount
        return amount
