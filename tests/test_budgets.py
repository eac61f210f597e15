"""Budgets' names, what a request reserves and costs, and how a gateway and control pay for it, each on its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.clock import VirtualClock, mono_s
from neaptide.control.lender import Lender
from neaptide.control.publish import Gateway
from neaptide.cost.budgets import Budget, by_scope, check, renews_s, terms, unit_of
from neaptide.cost.leases import Lease, Leases
from neaptide.cost.ledger import open_ledger
from neaptide.cost.prices import Rate
from neaptide.cost.rate import cost_nanos, cost_tokens, reserve_nanos, reserve_tokens
from neaptide.errors import RequestError, StorageError
from neaptide.gateway.till import PAY_S
from neaptide.journal import Located
from neaptide.link import ASK, GRANT, LEASES, RECALL, RETURN, FrameReader, Hello
from neaptide.table import Ask, Granted, Held, KeyRow, Prices, Recalled, Returned, Table, Want
from neaptide.table import Leases as Told
from neaptide.types import Paid, Usage
from neaptide.wire.peek import answers
from tests.gateway_kit import Client, Running, chat, key_row, post, reply_json, run, serving, until

TOKENS = st.integers(0, 2**40)
NANOS = st.integers(0, 10**15)
MONEY, COUNT = "tenant:acme:money:2026-11", "key:id-test:tokens:total"
DAY_S = 1_795_312_800.0  # 2026-11-22T02:00:00Z


def budget(scope: str = "tenant:acme", **fields: Any) -> Budget:
    usual: dict[str, Any] = {"unit": "money", "period": "month", "amount": 100}
    return Budget(scope=scope, **{**usual, **fields})


# --- names


@pytest.mark.parametrize(
    ("period", "name", "renews"),
    [
        ("day", "tenant:a:b:money:2026-11-22", 1_795_392_000.0),
        ("month", "tenant:a:b:money:2026-11", 1_796_083_200.0),
        ("total", "tenant:a:b:money:total", None),
    ],
)
def test_a_name_tells_its_period_and_when_that_ends(period: Any, name: str, renews: float | None) -> None:
    found = budget("tenant:a:b", period=period).name(DAY_S)
    assert (found, unit_of(found), renews_s(found)) == (name, "money", renews)


@given(st.floats(0, 4e9), st.sampled_from(["day", "month"]))
def test_a_budget_has_its_name_until_it_renews_and_another_one_from_then_on(wall_s: float, period: Any) -> None:
    one = budget(period=period)
    renews = renews_s(one.name(wall_s))
    assert renews is not None
    assert renews > wall_s
    assert one.name(renews - 1) == one.name(wall_s) != one.name(renews)


@pytest.mark.parametrize("name", ["", "money", "x:money:2026-13", "x:money:2026-02-30", "x:money:9999-12", "a:b:c-d"])
def test_a_name_of_a_time_that_no_calendar_has_never_renews(name: str) -> None:
    assert renews_s(name) is None


def test_a_key_is_under_all_budgets_of_its_scopes_and_strict_where_one_is() -> None:
    every = [budget("all", period="total"), budget("project:acme/web", strict=True), budget(), budget("tenant:other")]
    scopes = by_scope([*every, budget("key:k1", unit="tokens", period="day")], DAY_S)
    assert terms(scopes, "k1", "acme", "web") == (
        ("key:k1:tokens:2026-11-22", "project:acme/web:money:2026-11", MONEY, "all:money:total"),
        True,
    )
    assert terms(scopes, "k2", "acme", "app") == ((MONEY, "all:money:total"), False)
    assert terms(by_scope(every[1:], DAY_S), "k2", "nobody", "web") == ((), False)


@pytest.mark.parametrize("scope", ["", "acme", "team:a", "key:", "project:acme", "project:/web", "tenant:" + "é" * 40])
def test_what_is_no_scope_is_refused_with_what_to_write(scope: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(budget(scope))
    assert "tenant:NAME" in caught.value.fix


# --- what a request reserves and costs


@given(TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, NANOS, NANOS, NANOS)
def test_what_was_reserved_is_never_less_than_the_cost(
    prompt: int, cached: int, output: int, more: int, longer: int, p: int, c: int, o: int
) -> None:
    usage = Usage(request_id="r", prompt_tokens=prompt, cached_tokens=cached, output_tokens=output)
    rate = Rate(p, c, o)
    assert reserve_nanos(rate, prompt + more, output + longer) >= cost_nanos(rate, usage) >= 0
    assert reserve_tokens(prompt + more, output + longer) >= cost_tokens(usage)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, 1),
        ({"n": None, "best_of": None}, 1),
        ({"n": 0}, 1),
        ({"n": 3}, 3),
        ({"n": 2, "best_of": 5}, 5),
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2], [3]]}, 3),
        ({"prompt": []}, 1),
    ],
)
def test_every_answer_that_a_body_asks_for_is_counted(asked: dict[str, Any], wanted: int) -> None:
    assert answers(json.dumps({"model": "m", **asked}).encode()) == wanted


@pytest.mark.parametrize("n", ["3", -1, 2**40, 1.5, True, [2]])
def test_a_number_of_answers_that_is_none_is_refused(n: Any) -> None:
    with pytest.raises(RequestError) as caught:
        answers(json.dumps({"model": "m", "n": n}).encode())
    assert caught.value.param == "n"


# --- the gateway: its till, and a control that the test plays


class Control:
    """What a gateway's till says, and what it hears."""

    def __init__(self, gateway: Running) -> None:
        self.till = gateway.door.till
        self.said: list[tuple[int, Any]] = []
        self.till.connected(lambda kind, told: self.said.append((kind, told)))

    def asks(self) -> list[Ask]:
        return [told for kind, told in self.said if kind == ASK]

    async def asked(self) -> Ask:
        await until(lambda: len(self.asks()))
        return self.asks()[-1]

    def grant(self, number: int, amounts: dict[str, int], exhausted: Sequence[str] = ()) -> None:
        self.till.hear(GRANT, msgspec.json.encode(Granted(number, amounts, tuple(exhausted))))

    def recall(self, name: str) -> int:
        """All that the gateway does not need of it."""
        self.till.hear(RECALL, msgspec.json.encode(Recalled(name, 7)))
        kind, told = self.said[-1]
        assert (kind, told.budget, told.round) == (RETURN, name, 7)
        return int(told.amount)


def priced(running: Running, *names: str, strict: bool = False, free: bool = False) -> None:
    """The gateway's key is under these budgets; output costs a nano a token."""
    held = running.door.table
    rates = {} if free else {"m": Rate(0, 0, 10**6)}
    keys = (key_row(budgets=names, strict=strict),)
    slow = msgspec.structs.replace(held.slow, keys=keys, prices=Prices(version=4, currency="CNY", rates=rates))
    running.install(Table(fast=held.fast, slow=slow))


Story = Callable[[Running, Control], Any]


def told(story: Story, *names: str, **how: bool) -> None:
    async def main() -> None:
        async with serving(reply_json) as (running, _):
            priced(running, *names, **how)
            await story(running, Control(running))

    run(main())


async def sent(running: Running, **fields: Any) -> Client:
    client = await running.connect()
    await client.send(post(chat(**fields)))
    return client


def test_a_request_waits_for_its_lease_goes_on_and_pays_what_it_cost() -> None:
    async def story(running: Running, control: Control) -> None:
        client = await sent(running, max_tokens=10)
        ask = await control.asked()
        assert ask == (1, {MONEY: Want(10, 0)})
        control.grant(1, {MONEY: 15})
        assert (await client.answer()).status == 200
        assert running.row.paid == (Paid(MONEY, 10, 2),)  # the replica says two tokens
        assert running.row.price_version == 4
        assert control.recall(MONEY) == 13
        assert len(control.asks()) == 1

    told(story, MONEY)


def test_who_is_too_late_hears_which_budget_and_when_it_renews() -> None:
    async def story(running: Running, control: Control) -> None:
        client = await sent(running, max_tokens=10)
        await control.asked()
        control.grant(1, {MONEY: 4}, [MONEY])
        answer = await client.answer()
        assert (answer.status, answer.code) == (429, "budget_exceeded")
        assert f"The budget {MONEY} has less left" in answer.json["error"]["message"]
        assert "it renews at 2026-12-01T00:00:00Z" in answer.json["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert (running.row.outcome, running.row.paid) == ("refused", ())
        assert control.said[-1] == (RETURN, Returned(MONEY, 4))  # it is too little for whoever wanted it

    told(story, MONEY)


def test_a_client_that_leaves_while_it_pays_costs_nothing() -> None:
    async def story(running: Running, control: Control) -> None:
        client = await sent(running, max_tokens=10)
        await control.asked()
        client.close()
        await until(lambda: running.journal.rows)
        assert (running.row.outcome, running.row.paid) == ("aborted", ())
        control.grant(1, {MONEY: 10})
        assert control.recall(MONEY) == 10

    told(story, MONEY)


def test_a_model_without_a_price_is_never_held_up_by_money() -> None:
    async def story(running: Running, control: Control) -> None:
        running.door.till.disconnected()
        assert (await running.ask(post(chat()))).status == 200
        assert not control.asks()

    told(story, MONEY, free=True)


def test_tokens_are_reserved_by_the_bodys_bytes_and_paid_by_what_was_counted() -> None:
    async def story(running: Running, control: Control) -> None:
        request = post(chat(max_tokens=10, n=2))
        size = int(request.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        client = await running.connect()
        await client.send(request)
        assert (await control.asked()).wants == {COUNT: Want(size + 20, 0)}
        control.grant(1, {COUNT: size + 20})
        assert (await client.answer()).status == 200
        assert running.row.paid == (Paid(COUNT, size + 20, 9),)

    told(story, COUNT)


@pytest.mark.parametrize(("strict", "reserved"), [(False, 1024), (True, 5000)])
def test_a_strict_budget_reserves_all_that_is_asked_for(strict: bool, reserved: int) -> None:
    async def story(running: Running, control: Control) -> None:
        await sent(running, max_tokens=5000)
        assert (await control.asked()).wants == {MONEY: Want(reserved, 0)}

    told(story, MONEY, strict=strict)


def test_while_control_is_away_a_lease_is_spent_and_then_nobody_knows() -> None:
    async def story(running: Running, control: Control) -> None:
        client = await sent(running, max_tokens=10)
        await control.asked()
        control.grant(1, {MONEY: 20})
        assert (await client.answer()).status == 200
        control.till.disconnected()
        assert (await running.ask(post(chat(max_tokens=18)))).status == 200  # 18 are left
        answer = await running.ask(post(chat(max_tokens=18)))
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "budget_unknown", "1")
        again = Control(running)
        assert again.said[0] == (LEASES, Told(2, {MONEY: Held(20, 0)}))

    told(story, MONEY)


def test_nobody_waits_to_pay_for_longer_than_five_seconds() -> None:
    async def story(running: Running, control: Control) -> None:
        client = await sent(running, stream=True)
        await control.asked()
        running.door.sweep(mono_s() + PAY_S)
        answer = await client.answer()
        assert (answer.status, answer.code) == (503, "budget_unknown")

    told(story, MONEY)


# --- control: the lender, between connections and the ledger


class Wire:
    """A gateway's connection, as control has it."""

    def __init__(self, lender: Lender, connection: int = 1) -> None:
        self.lender, self.frames = lender, FrameReader()
        self.heard: list[tuple[int, Any]] = []
        self.gateway = Gateway(Hello(name="gateway-0", epoch=7), self)  # type: ignore[arg-type]
        self.say(LEASES, Told(connection, {}))

    def say(self, kind: int, what: Any) -> None:
        self.lender.hear(self.gateway, kind, msgspec.json.encode(what))

    def write(self, data: bytes) -> None:
        self.heard += [(f.type, msgspec.json.decode(f.payload)) for f in self.frames.feed(data)]

    def is_closing(self) -> bool:
        return False


def lending(story: Callable[[Lender, list[Sequence[Lease]]], Any], *, broken: bool = False) -> None:
    """With a budget of 100 in force; the list is what was stored."""

    async def main() -> None:
        stored: list[Sequence[Lease]] = []

        async def store(leases: Sequence[Lease]) -> None:
            if broken:
                raise StorageError("the disk is full")
            stored.append(leases)

        lender = Lender(store)
        lender.open((budget(),), (), DAY_S)
        assert lender.rows((KeyRow(id="k", digest="d", tenant="acme"),), DAY_S)[0].budgets == (MONEY,)
        task = asyncio.create_task(lender.run())
        await story(lender, stored)
        task.cancel()

    asyncio.run(main())


def test_a_lease_is_stored_before_it_is_sent() -> None:
    async def story(lender: Lender, stored: list[Sequence[Lease]]) -> None:
        wire = Wire(lender)
        wire.say(ASK, Ask(1, {MONEY: Want(50, 0)}))
        await until(lambda: wire.heard)
        assert wire.heard == [(GRANT, [1, {MONEY: 50}, [], False])]
        assert stored[-1] == [Lease(MONEY, "gateway-0-7", 50)]

    lending(story)


def test_what_cannot_be_stored_is_not_lent() -> None:
    async def story(lender: Lender, stored: list[Sequence[Lease]]) -> None:
        wire = Wire(lender)
        wire.say(ASK, Ask(1, {MONEY: Want(50, 0)}))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not wire.heard

    lending(story, broken=True)


def test_what_an_older_connection_still_says_is_not_heard() -> None:
    async def story(lender: Lender, stored: list[Sequence[Lease]]) -> None:
        old = Wire(lender)
        new = Wire(lender, connection=2)
        old.say(ASK, Ask(1, {MONEY: Want(50, 0)}))
        old.say(LEASES, Told(1, {MONEY: Held(90, 0)}))
        lender.left(old.gateway)
        new.say(ASK, Ask(2, {MONEY: Want(100, 0)}))
        await until(lambda: new.heard)
        assert (old.heard, new.heard) == ([], [(GRANT, [2, {MONEY: 100}, [], False])])

    lending(story)


def test_a_new_period_begins_with_all_of_its_amount_and_the_keys_have_its_name() -> None:
    async def story(lender: Lender, stored: list[Sequence[Lease]]) -> None:
        wire = Wire(lender)
        wire.say(ASK, Ask(1, {MONEY: Want(100, 0)}))
        await until(lambda: wire.heard)
        keys = (KeyRow(id="k", digest="d", tenant="acme"),)
        (key,) = lender.rows(keys, DAY_S + 9 * 86400)
        assert key.budgets == ("tenant:acme:money:2026-12",)
        wire.say(ASK, Ask(2, dict.fromkeys([*key.budgets, MONEY], Want(60, 0))))
        await until(lambda: len(wire.heard) == 2)
        assert wire.heard[1] == (GRANT, [2, {"tenant:acme:money:2026-12": 60}, [MONEY], False])

    lending(story)


# --- the ledger


def test_rows_say_what_was_spent_once_and_a_dead_gateway_leaves_what_it_spent(tmp_path: Path) -> None:
    ledger = open_ledger("", tmp_path, VirtualClock(wall_s=DAY_S))
    leases = Leases(ledger.database)
    heard: list[tuple[str, dict[str, int]]] = []
    ledger.on_paid = lambda journal, amounts: heard.append((journal, dict(amounts)))
    leases.set(budget(), DAY_S)
    leases.lend([Lease(MONEY, "g-1", granted=60), Lease(MONEY, "g-2", granted=30, returned=5)])
    rows = [Usage(request_id=f"r{i}", paid=(Paid(MONEY, 9, 7),)) for i in range(3)]
    records = [Located(i * 10, i * 10 + 10, row) for i, row in enumerate(rows)]
    ledger.take("g-1", 1, records, 30)
    ledger.take("g-1", 1, records, 30)
    ledger.take("g-2", 1, records[:1], 10)  # the same request in another journal
    assert heard == [("g-1", {MONEY: 21})]
    assert leases.of([MONEY]) == (Lease(MONEY, "g-1", 60, 0, 21), Lease(MONEY, "g-2", 30, 5, 0))
    leases.lend([Lease(MONEY, "g-1", granted=70)])
    assert leases.of([MONEY])[0] == Lease(MONEY, "g-1", 70, 0, 21)
    leases.over("g-1")
    leases.over("g-1")
    assert set(leases.of([MONEY])) == {Lease(MONEY, "", 0, 0, 21), Lease(MONEY, "g-2", 30, 5, 0)}
    assert (leases.gateways(), leases.budgets()) == (("g-2",), (budget(),))
    leases.forget(DAY_S + 40 * 86400)
    assert leases.of([MONEY]) == ()
    assert [receipt.usage.paid for receipt in ledger.usage().receipts] == [(Paid(MONEY, 9, 7),)] * 3
    ledger.close()


def test_a_row_is_charged_by_the_prices_that_its_gateway_counted_with(tmp_path: Path) -> None:
    clock = VirtualClock(wall_s=DAY_S)
    ledger = open_ledger("", tmp_path, clock)
    first = ledger.set_prices({"m": Rate(0, 0, 10**6)}, "CNY")
    clock.advance(10)
    ledger.set_prices({"m": Rate(0, 0, 5 * 10**6)}, "CNY")
    clock.advance(10)
    late: dict[str, Any] = {"model": "m", "output_tokens": 3, "started_wall_s": clock.wall_s()}
    rows = [Usage(request_id="r1", price_version=first, **late), Usage(request_id="r2", **late)]
    ledger.take("g-1", 1, [Located(i * 10, i * 10 + 10, row) for i, row in enumerate(rows)], 20)
    assert {r.usage.request_id: r.amount_nanos for r in ledger.usage().receipts} == {"r1": 3, "r2": 15}
    ledger.close()
