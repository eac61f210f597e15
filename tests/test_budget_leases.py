"""Budgets spent from leases, both halves joined in memory: never over, nothing refused while enough is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neaptide.control.treasury import ENDLESS, PATIENCE_S, Fund, Grant, Loan, Message, Recall, Treasury
from neaptide.gateway.purse import Purse, Verdict
from neaptide.table import Ask, Held, Want


class Door:
    """One gateway: requests that pay, wait, run and end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.purse: Purse[str] = Purse()
        self.needs: dict[str, dict[str, int]] = {}
        self.running: list[str] = []
        self.refused: dict[str, str] = {}  # by which budget

    def enter(self, request: str, needs: dict[str, int]) -> None:
        self.needs[request] = needs
        if self.purse.pay(request, needs):
            self.running.append(request)

    def hear(self, verdicts: Iterable[Verdict[str]]) -> None:
        for item, refused in verdicts:
            if refused:
                self.refused[item] = refused
            else:
                self.running.append(item)


class House:
    """Control and its gateways, and what is on the way between them, in order on each way."""

    def __init__(self, gateways: int, **budgets: int) -> None:
        self.treasury = Treasury()
        self.now = 0.0
        self.doors = {f"g{i}-1": Door(f"g{i}-1") for i in range(gateways)}
        self.silent: set[str] = set()  # gateways that hear nothing
        self.down: dict[str, deque[Message]] = {name: deque() for name in self.doors}
        self.up: dict[str, deque[Any]] = {name: deque() for name in self.doors}
        self.post(self.treasury.open({budget: Fund(amount) for budget, amount in budgets.items()}, 0.0))
        for name in self.doors:
            self.connect(name)

    def post(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if message.gateway in self.down:
                self.down[message.gateway].append(message)

    def connect(self, name: str) -> None:
        """A connection, perhaps after one that broke with all that was on it."""
        self.down[name].clear()
        self.up[name].clear()
        door = self.doors[name]
        door.hear(door.purse.alone())
        self.post(self.treasury.joined(name, door.purse.back(), self.now))

    def ask(self, name: str) -> None:
        door = self.doors[name]
        verdicts, ask = door.purse.turn()
        door.hear(verdicts)
        if ask is not None:
            self.up[name].append(ask)

    def control_reads(self, name: str) -> None:
        message = self.up[name].popleft()
        if isinstance(message, Ask):
            self.post(self.treasury.ask(name, message.number, message.wants, self.now))
        else:
            self.post(self.treasury.returned(name, *message, self.now))

    def gateway_reads(self, name: str) -> None:
        message, door = self.down[name].popleft(), self.doors[name]
        if isinstance(message, Recall):
            self.up[name].append((message.budget, door.purse.recalled(message.budget), message.round))
            return
        exhausted = frozenset(message.exhausted)
        door.hear(door.purse.granted(message.number, message.amounts, exhausted, message.unknown))
        for budget in message.exhausted:
            self.up[name].append((budget, door.purse.recalled(budget), 0))

    def pump(self) -> None:
        """Until nothing is on the way and nobody has anything to ask."""
        for _ in range(100_000):
            moved = False
            for name in list(self.doors):
                self.ask(name)
                while self.up[name]:
                    self.control_reads(name)
                    moved = True
                while self.down[name] and name not in self.silent:
                    self.gateway_reads(name)
                    moved = True
            if not moved:
                return
        raise AssertionError("they never stop asking")

    def end(self, door: Door, request: str, cost: dict[str, int]) -> None:
        """A request ends; its row is in the ledger at once."""
        door.running.remove(request)
        door.purse.settle(door.needs.pop(request), cost)
        for budget, amount in cost.items():
            self.treasury.spent(budget, door.name, amount)

    def dies(self, name: str) -> None:
        """Its process, and all that it wrote is read."""
        self.post(self.treasury.left(name, self.now))
        del self.doors[name], self.down[name], self.up[name]
        self.post(self.treasury.over(name, self.now))

    @property
    def running(self) -> int:
        return sum(len(door.running) for door in self.doors.values())


@pytest.mark.parametrize("gateways", [1, 2, 5])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("budgets", [("key",), ("key", "org")])
def test_500_requests_that_each_cost_their_reserve_against_a_budget_for_100_are_exactly_100(
    gateways: int, together: bool, budgets: tuple[str, ...]
) -> None:
    house = House(gateways, **dict.fromkeys(budgets, 100 * 7))
    doors, needs = list(house.doors.values()), dict.fromkeys(budgets, 7)
    for i in range(500):
        doors[i % gateways].enter(f"r{i}", needs)
        if not together:
            house.pump()
    house.pump()
    assert house.running == 100
    assert sum(len(door.refused) for door in doors) == 400
    for door in doors:
        for request in list(door.running):
            house.end(door, request, needs)
    assert house.treasury.funds["key"].spent == 700
    doors[0].enter("more", needs)
    house.pump()
    assert doors[0].refused["more"] == "key"


def test_two_gateways_that_ask_for_two_budgets_each_in_its_own_order_do_not_hold_each_other_up() -> None:
    house = House(2, key=700, org=700)
    for door, budgets in zip(house.doors.values(), (("key", "org"), ("org", "key")), strict=True):
        for i in range(250):
            door.enter(f"r{i}", dict.fromkeys(budgets, 7))
    for name in house.doors:  # both have asked before either is answered
        house.ask(name)
    house.pump()
    assert house.running == 100


def lying_idle() -> tuple[House, Door, Door]:
    """A budget of 100 of which 5 are spent and 35 lie in the lease of the first gateway."""
    house = House(2, money=100)
    one, other = house.doors.values()
    one.enter("a", {"money": 40})
    house.pump()
    house.end(one, "a", {"money": 5})
    return house, one, other


def test_what_lies_idle_in_one_gateway_is_called_back_before_another_refuses() -> None:
    house, one, other = lying_idle()
    other.enter("b", {"money": 90})
    house.pump()
    assert other.running == ["b"]
    assert one.purse.left("money") == 0


def test_a_gateway_that_does_not_answer_is_waited_for_once_for_a_second() -> None:
    house, one, other = lying_idle()
    house.silent.add(one.name)
    other.enter("b", {"money": 90})
    house.pump()
    assert (other.running, other.refused) == ([], {})
    for house.now in (PATIENCE_S / 2, PATIENCE_S):
        assert not other.refused
        house.post(house.treasury.late(house.now))
        house.pump()
    assert other.refused == {"b": "money"}
    other.enter("c", {"money": 90})
    house.pump()
    assert set(other.refused) == {"b", "c"}  # it is not asked again until it says something


def test_a_dead_gateways_lease_is_there_again_once_its_rows_are_taken() -> None:
    house = House(2, money=100)
    one, other = house.doors.values()
    one.enter("a", {"money": 60})
    house.pump()
    house.post(house.treasury.left(one.name, 0.0))
    other.enter("b", {"money": 60})
    house.pump()
    assert other.refused == {"b": "money"}  # it may live, and spend
    house.treasury.spent("money", one.name, 10)
    house.dies(one.name)
    other.enter("c", {"money": 60})
    house.pump()
    assert other.running == ["c"]


def test_a_grant_that_was_lost_with_its_connection_is_lent_again() -> None:
    house = House(1, money=100)
    (door,) = house.doors.values()
    door.enter("a", {"money": 90})
    house.ask(door.name)
    house.control_reads(door.name)
    assert house.treasury.funds["money"].free <= 10
    house.connect(door.name)  # what was on the way is gone
    assert house.treasury.funds["money"].free == 100
    assert door.refused == {"a": "money"}
    door.enter("b", {"money": 90})
    house.pump()
    assert door.running == ["b"]


def test_what_was_given_back_and_lost_on_the_way_is_there_again() -> None:
    house, one, other = lying_idle()
    other.enter("b", {"money": 90})
    house.ask(other.name)
    house.control_reads(other.name)
    house.gateway_reads(one.name)  # it gives back ...
    house.connect(one.name)  # ... and nobody hears it
    house.pump()
    assert other.running == ["b"]


def test_a_recall_that_was_lost_with_its_connection_is_sent_again() -> None:
    house, one, other = lying_idle()
    other.enter("b", {"money": 90})
    house.ask(other.name)
    house.control_reads(other.name)
    house.connect(one.name)  # it has not read what it was asked
    house.pump()
    assert other.running == ["b"]


def test_what_gateways_held_before_control_knew_anything_counts() -> None:
    treasury = Treasury()
    treasury.joined("g0-1", {"money": Held(30, 10)}, 0.0)
    fund = Fund(100)
    fund.loans["g0-1"] = Loan(granted=90)  # stored and never sent
    treasury.open({"money": fund}, 0.0)
    assert fund.free == 80


def test_while_control_does_not_know_what_was_spent_nobody_waits_for_long() -> None:
    treasury = Treasury()
    treasury.joined("g0-1", {}, 0.0)
    assert treasury.ask("g0-1", 1, {"money": Want(10, 0)}, 5.0) == []
    assert treasury.late(5.0 + PATIENCE_S / 2) == []
    assert treasury.late(5.0 + PATIENCE_S) == [Grant("g0-1", 1, {}, (), True)]
    assert treasury.open({"money": Fund(100)}, 7.0) == []


def test_a_budget_that_is_set_while_requests_run_counts_what_was_lent_before() -> None:
    house = House(2)
    one, other = house.doors.values()
    one.enter("a", {"money": 10})
    house.pump()
    house.post(house.treasury.amend("money", 100, 0.0))
    one.enter("b", {"money": 50})
    other.enter("c", {"money": 60})
    house.pump()
    assert house.running == 2
    assert sum(len(door.refused) for door in house.doors.values()) == 1


def test_a_new_period_is_another_budget_and_the_old_one_stays_spent() -> None:
    house = House(1, october=100)
    (door,) = house.doors.values()
    door.enter("a", {"october": 90})
    house.pump()
    house.end(door, "a", {"october": 90})
    house.post(house.treasury.amend("november", 100, 0.0))
    door.enter("b", {"november": 90})
    door.enter("late", {"october": 90})
    house.pump()
    assert door.running == ["b"]
    assert door.refused == {"late": "october"}


def test_a_budget_that_is_taken_away_and_set_again_has_spent_what_it_had() -> None:
    house = House(1, money=100)
    (door,) = house.doors.values()
    door.enter("a", {"money": 90})
    house.pump()
    house.end(door, "a", {"money": 90})
    for amount in (ENDLESS, 100):
        house.post(house.treasury.amend("money", amount, 0.0))
    door.enter("b", {"money": 90})
    house.pump()
    assert door.refused == {"b": "money"}


def test_what_was_not_needed_for_a_beat_goes_back_and_what_was_stays() -> None:
    house = House(1, money=10_000)
    (door,) = house.doors.values()
    door.enter("a", {"money": 50})
    house.pump()
    assert door.purse.surplus() == {}  # the lease is younger than the beat
    more = door.purse.left("money")
    door.enter("b", {"money": 10})
    house.end(door, "b", {"money": 0})
    assert door.purse.surplus() == {"money": more - 10}
    assert door.purse.left("money") == 10
    assert door.purse.surplus() == {"money": 10}
    door.purse.forget(())
    assert door.purse.back() == {}


def test_a_lease_of_a_period_that_is_over_is_given_back_after_its_last_request_and_forgotten() -> None:
    house = House(1, october=100)
    (door,) = house.doors.values()
    door.enter("a", {"october": 100})
    house.pump()
    door.purse.forget(("november",))
    house.end(door, "a", {"october": 40})
    door.purse.surplus()
    assert door.purse.surplus() == {"october": 60}
    door.purse.forget(("november",))
    assert door.purse.left("october") == 0


def test_before_it_knows_what_was_spent_control_lends_nothing() -> None:
    treasury = Treasury()
    assert treasury.joined("g0-1", {}, 0.0) == []
    assert treasury.ask("g0-1", 1, {"money": Want(10, 0)}, 0.0) == []
    (grant,) = treasury.open({"money": Fund(100, 95)}, 0.0)
    assert grant == Grant("g0-1", 1, {"money": 5}, ("money",))


def test_a_request_that_cost_more_than_its_reserve_is_paid_once() -> None:
    house = House(1, money=100)
    (door,) = house.doors.values()
    door.enter("long", {"money": 10})
    house.pump()
    lent = door.purse.left("money")
    house.end(door, "long", {"money": 50})
    assert door.purse.left("money") == lent - 40
    door.enter("b", {"money": 50})
    house.pump()
    assert door.running == ["b"]
    door.enter("c", {"money": 1})
    house.pump()
    assert door.refused == {"c": "money"}
    assert house.treasury.funds["money"].free == 0


def test_a_request_needs_room_in_all_its_budgets_and_hears_which_one_had_none() -> None:
    house = House(1, org=100, key=10)
    (door,) = house.doors.values()
    door.enter("a", {"org": 8, "key": 8})
    house.pump()
    door.enter("b", {"org": 8, "key": 8})
    door.enter("c", {"org": 8})
    house.pump()
    assert (door.running, door.refused) == (["a", "c"], {"b": "key"})


def test_what_costs_nothing_is_never_held_up() -> None:
    house = House(1, money=10)
    (door,) = house.doors.values()
    door.enter("a", {"money": 10})
    house.pump()
    house.end(door, "a", {"money": 90})  # the lease owes
    door.enter("free", {"money": 0})
    assert door.running == ["free"]


def test_with_control_away_leases_are_spent_and_then_requests_are_refused() -> None:
    house = House(1, money=10_000)
    (door,) = house.doors.values()
    door.enter("a", {"money": 10})
    house.pump()
    more = door.purse.left("money")
    assert 0 < more <= 100  # a hundredth
    door.hear(door.purse.alone())
    door.enter("b", {"money": more})
    door.enter("c", {"money": 1})
    assert door.running == ["a", "b"]
    verdicts, ask = door.purse.turn()
    door.hear(verdicts)
    assert (door.refused, ask, len(door.purse)) == ({"c": "money"}, None, 0)


def test_a_budget_that_is_not_set_stops_nobody() -> None:
    house = House(1)
    (door,) = house.doors.values()
    door.enter("a", {"gone": 10})
    house.pump()
    assert door.running == ["a"]


def test_who_waits_is_served_in_order_and_a_client_that_leaves_makes_way() -> None:
    house = House(1, a=5, b=5)
    (door,) = house.doors.values()
    door.enter("big", {"a": 10})
    door.enter("small", {"a": 1})
    door.enter("other", {"b": 5})
    door.purse.leave("big")
    house.pump()
    assert door.running == ["small", "other"]


class Budgets(RuleBasedStateMachine):
    """Whatever is lost, late or crosses on the way: never over; and once all is delivered nobody waits, and nobody was
    refused who asked alone for what was there."""

    @initialize(gateways=st.integers(1, 3), money=st.integers(0, 300), tokens=st.integers(0, 300))
    def build(self, gateways: int, money: int, tokens: int) -> None:
        self.house = House(gateways, money=money, tokens=tokens)
        self.amounts, self.serial = {"money": money, "tokens": tokens}, 0

    def door(self, n: int) -> Door:
        doors = list(self.house.doors.values())
        return doors[n % len(doors)]

    @rule(n=st.integers(0, 2), money=st.integers(0, 60), tokens=st.integers(0, 60))
    def enter(self, n: int, money: int, tokens: int) -> None:
        self.serial += 1
        self.door(n).enter(f"r{self.serial}", {"money": money, "tokens": tokens})

    @rule(n=st.integers(0, 2))
    def asks(self, n: int) -> None:
        self.house.ask(self.door(n).name)

    @rule(n=st.integers(0, 2))
    def goes_up(self, n: int) -> None:
        name = self.door(n).name
        if self.house.up[name]:
            self.house.control_reads(name)

    @rule(n=st.integers(0, 2))
    def goes_down(self, n: int) -> None:
        name = self.door(n).name
        if self.house.down[name]:
            self.house.gateway_reads(name)

    @rule(n=st.integers(0, 2))
    def connects_again(self, n: int) -> None:
        self.house.connect(self.door(n).name)

    @rule()
    def nobody_is_waited_for(self) -> None:
        self.house.now += PATIENCE_S
        self.house.post(self.house.treasury.late(self.house.now))

    @rule(n=st.integers(0, 2), share=st.floats(0, 1))
    def end(self, n: int, share: float) -> None:
        door = self.door(n)
        if door.running:
            needs = door.needs[door.running[0]]
            self.house.end(door, door.running[0], {b: int(share * amount) for b, amount in needs.items()})

    @rule(n=st.integers(0, 2))
    def client_leaves(self, n: int) -> None:
        door = self.door(n)
        waiting = [r for r in door.needs if r not in door.running and r not in door.refused]
        if waiting:
            door.purse.leave(waiting[0])
            door.refused[waiting[0]] = "left"

    @rule(n=st.integers(0, 2))
    def gives_back_what_it_does_not_need(self, n: int) -> None:
        door = self.door(n)
        for budget, amount in door.purse.surplus().items():
            self.house.up[door.name].append((budget, amount, 0))

    @precondition(lambda self: len(self.house.doors) > 1)
    @rule(n=st.integers(0, 2))
    def dies(self, n: int) -> None:
        self.house.dies(self.door(n).name)

    @rule(n=st.integers(0, 2), money=st.integers(1, 60))
    def alone_it_has_what_is_there(self, n: int, money: int) -> None:
        self.house.pump()
        assert all(len(door.purse) == 0 for door in self.house.doors.values())
        door, fund = self.door(n), self.house.treasury.funds["money"]
        there = fund.free + sum(d.purse.left("money") for d in self.house.doors.values())
        self.house.treasury.mute.clear()
        door.enter("alone", {"money": money})
        self.house.pump()
        assert ("alone" in door.running) == (money <= there)
        self.forget(door)

    def forget(self, door: Door) -> None:
        if "alone" in door.running:
            self.house.end(door, "alone", {})
        door.refused.pop("alone", None)
        door.needs.pop("alone", None)

    @rule(n=st.integers(0, 2), m=st.integers(0, 2), money=st.integers(1, 60), steps=st.integers(0, 6))
    def a_connection_breaks_in_the_middle_of_a_round(self, n: int, m: int, money: int, steps: int) -> None:
        house, door, broken = self.house, self.door(n), self.door(m)
        if door is broken:
            return
        house.pump()
        house.treasury.mute.clear()
        there = house.treasury.funds["money"].free + sum(d.purse.left("money") for d in house.doors.values())
        door.enter("alone", {"money": money})
        house.ask(door.name)
        for _ in range(steps):
            for name in house.doors:
                if house.up[name]:
                    house.control_reads(name)
                elif house.down[name]:
                    house.gateway_reads(name)
        house.connect(broken.name)
        house.pump()
        assert ("alone" in door.running) == (money <= there)
        self.forget(door)

    @invariant()
    def never_over(self) -> None:
        for budget, amount in self.amounts.items():
            fund = self.house.treasury.funds[budget]
            doors = self.house.doors.values()
            reserved = sum(d.needs[r].get(budget, 0) for d in doors for r in d.running)
            idle = sum(d.purse.left(budget) for d in doors)
            assert fund.spent + reserved + idle <= amount
            assert all(d.purse.left(budget) >= 0 for d in doors)


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
