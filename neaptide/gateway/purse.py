"""What this gateway may spend of each budget, and who waits for more. Pure: it sends nothing, `turn` says what to ask.

    pay -> paid | waits -> turn: Ask -> granted -> paid | refused        settle at the end; leave: its client is gone

One Ask at a time, with all budgets of those who wait; its answer resolves all that it covered. So nobody holds one
budget while waiting for another, and nothing is asked for twice.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Generic, NamedTuple, TypeVar

from neaptide.table import Ask, Held, Want

T = TypeVar("T")
Needs = Mapping[str, int]  # by budget; nano-units or tokens
BUDGETS_AN_ASK = 1000  # a frame is 1 MiB


class Verdict(NamedTuple, Generic[T]):
    """Of one who waited. `refused`: the budget that has no more for it, or of which nobody knows (`alone`, `turn` while
    `away`, `granted` with `unknown`); "" where it is paid."""

    item: T
    refused: str


class _Lease:
    __slots__ = ("gave", "got", "least", "left", "wanted")

    def __init__(self) -> None:
        self.left = 0  # to spend; below zero where requests cost more than their reserve
        self.least = 0  # that was left at any time since the last look for a surplus
        self.wanted = 0  # by those who wait
        self.got = self.gave = 0  # of all grants, and back: what control's books must say


class Purse(Generic[T]):
    """All leases of a gateway. Who waits is served in the order of coming, but for what others wait for in vain."""

    __slots__ = ("_asked", "_gave", "_leases", "_number", "_waiting", "away")

    def __init__(self) -> None:
        self.away = True  # control cannot be asked
        self._asked, self._number = False, 0  # the last Ask: whether it is open, and its number
        self._leases: dict[str, _Lease] = {}
        self._gave: set[str] = set()  # budgets given back since the open Ask, which need not know it
        # By id(item), in the order of coming; with the number of the first Ask that is for it too.
        self._waiting: dict[int, tuple[T, dict[str, int], int]] = {}

    def __len__(self) -> int:
        """Who waits."""
        return len(self._waiting)

    @property
    def budgets(self) -> int:
        """Of which there is or was a lease."""
        return len(self._leases)

    def left(self, budget: str) -> int:
        lease = self._leases.get(budget)
        return lease.left if lease is not None else 0

    def pay(self, item: T, needs: Needs) -> bool:
        """Whether it is paid now; else it waits, after those who wait for the same."""
        due = {budget: amount for budget, amount in needs.items() if amount > 0}
        leases = [(self._lease(budget), amount) for budget, amount in due.items()]
        if all(lease.left - lease.wanted >= amount for lease, amount in leases):
            self._take(due)
            return True
        self._waiting[id(item)] = (item, due, self._number + 1)
        for lease, amount in leases:
            lease.wanted += amount
        return False

    def leave(self, item: T) -> None:
        """It does not wait any more: served, refused, or its client is gone."""
        found = self._waiting.pop(id(item), None)
        if found is not None:
            for budget, amount in found[1].items():
                self._leases[budget].wanted -= amount

    def settle(self, needs: Needs, cost: Needs) -> None:
        """It reserved `needs` and has cost `cost`. Whoever waits has asked, and its answer serves it."""
        for budget in needs.keys() | cost.keys():
            self._lease(budget).left += needs.get(budget, 0) - cost.get(budget, 0)

    def turn(self) -> tuple[list[Verdict[T]], Ask | None]:
        """At the end of a loop turn in which somebody waits: who can go on or cannot, and what to ask."""
        if self._asked or not self._waiting:
            return [], None
        found = self._serve(frozenset(), self.away)
        wants: dict[str, int] = {}
        for _, needs, _ in self._waiting.values():
            if len(wants) >= BUDGETS_AN_ASK:
                break
            for budget, amount in needs.items():
                wants[budget] = wants.get(budget, 0) + amount
        if not wants:
            return found, None
        self._asked, self._number = True, self._number + 1
        self._gave.clear()
        return found, Ask(self._number, {b: Want(amount, self._leases[b].left) for b, amount in wants.items()})

    def granted(
        self, number: int, amounts: Needs, exhausted: frozenset[str], unknown: bool = False
    ) -> list[Verdict[T]]:
        """Control's answer to an Ask. `exhausted`: budgets that have no more than this; `unknown`: control cannot say.
        After it, give back `recalled` of those that are exhausted: it is too little for whoever wanted it."""
        if number != self._number or not self._asked:
            return []  # of a connection that is gone: `back` told control that it never came
        self._asked = False
        for budget, amount in amounts.items():
            lease = self._lease(budget)
            lease.left += amount
            lease.got += amount
        return self._serve(exhausted - self._gave, unknown)

    def recalled(self, budget: str) -> int:
        """What control gets back: all that is not reserved. What somebody here waits for is in an Ask anyway."""
        lease = self._lease(budget)
        idle = max(0, lease.left)
        lease.left -= idle
        lease.least = min(lease.least, lease.left)
        lease.gave += idle
        if idle and self._asked:
            self._gave.add(budget)
        return idle

    def surplus(self) -> dict[str, int]:
        """What nothing needed since the last call goes back: how much, by budget. Nothing while somebody waits, whose
        Ask says what is left."""
        if self.away or self._asked or self._waiting:
            return {}
        back: dict[str, int] = {}
        for budget, lease in self._leases.items():
            if lease.least > 0:
                back[budget] = lease.least
                lease.left -= lease.least
                lease.gave += lease.least
            lease.least = lease.left
        return back

    def forget(self, others: Container[str]) -> None:
        """Of budgets that are not among `others` nothing is kept but what is there to give back."""
        for budget, lease in list(self._leases.items()):
            if budget not in others and lease.left <= 0 and not lease.wanted:
                del self._leases[budget]

    def alone(self) -> list[Verdict[T]]:
        """Control is away: leases are spent, and nobody is granted more. Who has waited in vain."""
        self.away, self._asked = True, False
        return self._serve(frozenset(), True)

    def back(self) -> dict[str, Held]:
        """Control is there again: what to tell it first, whole: what it does not name counts as never had."""
        self.away = self._asked = False
        return {budget: Held(lease.got, lease.gave) for budget, lease in self._leases.items() if lease.got}

    def _serve(self, exhausted: frozenset[str], hopeless: bool) -> list[Verdict[T]]:
        """Those who wait, from the first on; who must go on waiting keeps what it wants from those behind it."""
        found: list[Verdict[T]] = []
        held: dict[str, int] = {}
        for item, needs, since in list(self._waiting.values()):
            lacking = [b for b, amount in needs.items() if self._leases[b].left < amount]
            refused = next((b for b in lacking if hopeless or (since <= self._number and b in exhausted)), "")
            if not refused and any(self._leases[b].left - held.get(b, 0) < amount for b, amount in needs.items()):
                for budget, amount in needs.items():
                    held[budget] = held.get(budget, 0) + amount
                continue
            self.leave(item)
            if not refused:
                self._take(needs)
            found.append(Verdict(item, refused))
        return found

    def _take(self, needs: Needs) -> None:
        for budget, amount in needs.items():
            lease = self._leases[budget]
            lease.left -= amount
            if lease.left < lease.least:
                lease.least = lease.left

    def _lease(self, budget: str) -> _Lease:
        lease = self._leases.get(budget)
        if lease is None:
            lease = self._leases[budget] = _Lease()
        return lease
