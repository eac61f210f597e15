"""Tenants, classes and deadlines through a real gateway over loopback: whoever floods, the others have their turn."""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer

from neaptide.clock import mono_s
from tests.gateway_kit import (
    COMPLETION,
    Answer,
    Asked,
    Behaviour,
    FakeReplica,
    Running,
    answer_bytes,
    chat,
    key_row,
    post,
    run,
    serving,
    until,
)

KEYS = [
    key_row("sk-flood", tenant="flood", priority="high"),
    key_row("sk-victim", tenant="victim"),
    key_row("sk-gold", tenant="gold"),
]


def auth(tenant: str, more: bytes = b"") -> bytes:
    return f"Authorization: Bearer sk-{tenant}\r\n".encode() + more


class Slots:
    """A replica whose answers end one at a time, when the test says so. An answer has as many tokens as `user` says."""

    def __init__(self) -> None:
        self.held: list[tuple[str, asyncio.Event]] = []
        self.order: list[str] = []  # tenants, as they came

    async def __call__(self, replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        tenant, _, tokens = asked.json["user"].partition(":")
        done = asyncio.Event()
        self.held.append((tenant, done))
        self.order.append(tenant)
        await done.wait()
        answer = json.loads(COMPLETION)
        answer["usage"]["completion_tokens"] = int(tokens)
        writer.write(answer_bytes(json.dumps(answer).encode()))
        await writer.drain()

    def end(self, at: int = 0) -> None:
        self.held.pop(at)[1].set()


class Guests:
    """Who asks; each request on a connection of its own."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.asks: list[asyncio.Task[Answer]] = []

    async def ask(self, tenant: str, tokens: int = 10, extra: bytes = b"", **fields: object) -> asyncio.Task[Answer]:
        request = post(chat(user=f"{tenant}:{tokens}", **fields), extra=auth(tenant, extra))
        seen = self.running.door.lanes["m"].metrics.arrivals
        self.asks.append(asyncio.create_task(self.running.ask(request)))
        await until(lambda: self.running.door.lanes["m"].metrics.arrivals > seen)
        return self.asks[-1]

    async def end_all(self, slots: Slots) -> None:
        while not all(ask.done() for ask in self.asks):
            if slots.held:
                slots.end()
            await asyncio.sleep(0.001)


def fair(slots: Behaviour, room: int, **deployment: object):
    return serving(slots, replica={"max_running": room}, keys=KEYS, deployment=deployment)


def test_a_victim_is_next_however_many_of_a_flood_wait_before_it() -> None:
    async def main() -> None:
        slots = Slots()
        async with fair(slots, room=2) as (running, _):
            guests = Guests(running)
            for _ in range(30):
                await guests.ask("flood")
            await until(lambda: len(slots.held) == 2)
            await guests.ask("victim")
            slots.end()
            await until(lambda: len(slots.held) == 2)
            assert slots.order == ["flood", "flood", "victim"]
            await guests.end_all(slots)
            assert {(await ask).status for ask in guests.asks} == {200}

    run(main())


def test_who_has_long_answers_has_fewer_of_them() -> None:
    async def main() -> None:
        slots = Slots()
        async with fair(slots, room=1) as (running, _):
            guests = Guests(running)
            for _ in range(20):
                await guests.ask("flood", tokens=400)
                await guests.ask("victim", tokens=100)
            await guests.end_all(slots)
            first = slots.order[:20]
            assert 15 <= first.count("victim") <= 17  # four answers of 100 tokens to one of 400

    run(main())


def test_a_slot_is_kept_free_for_who_is_below_its_share() -> None:
    async def main() -> None:
        slots = Slots()
        async with fair(slots, room=8) as (running, _):
            guests, target = Guests(running), running.door.targets["r0"]
            for _ in range(14):
                await guests.ask("flood")
            await until(lambda: len(slots.held) == 8)  # alone it has them all
            await guests.ask("victim")
            slots.end()
            await until(lambda: slots.order[-1] == "victim")
            slots.end(-1)  # the victim's
            await until(lambda: target.in_flight == 7)
            slots.end()  # a flood's: there is another one in its place, and no more
            await until(lambda: len(slots.order) == 10)
            running.door.sweep(mono_s())
            assert (target.in_flight, running.door.lanes["m"].line.waiting) == (7, 5)
            await guests.ask("victim")
            await until(lambda: slots.order[-1] == "victim")
            assert target.in_flight == 8
            await guests.end_all(slots)

    run(main())


def test_a_high_class_goes_before_and_is_the_keys_to_give() -> None:
    async def main() -> None:
        slots = Slots()
        async with fair(slots, room=1) as (running, _):
            guests = Guests(running)
            await guests.ask("gold")
            await until(lambda: slots.held)
            await guests.ask("victim", extra=b"x-neaptide-priority: high\r\n")  # its key allows normal
            await guests.ask("flood", extra=b"x-neaptide-priority: high\r\n")
            await guests.end_all(slots)
            assert slots.order == ["gold", "flood", "victim"]

    run(main())


def test_a_full_line_has_a_place_for_who_has_none() -> None:
    async def main() -> None:
        slots = Slots()
        async with fair(slots, room=1, max_waiting=4) as (running, _):
            guests = Guests(running)
            floods = [await guests.ask("flood") for _ in range(5)]
            victim = await guests.ask("victim")
            out = await floods[-1]
            assert (out.status, out.code) == (429, "queue_full")
            assert int(out.headers["retry-after"]) >= 1
            await guests.end_all(slots)
            assert (await victim).status == 200
            assert [(await ask).status for ask in floods[:-1]] == [200] * 4

    run(main())


def test_an_answer_that_cannot_end_by_its_deadline_is_not_begun() -> None:
    async def main() -> None:
        async def slow(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            await asyncio.sleep(0.3)
            writer.write(answer_bytes(COMPLETION))
            await writer.drain()

        async with serving(slow, keys=[*KEYS, key_row("sk-teach", tenant="teach")]) as (running, (replica,)):
            guests = Guests(running)
            soon = b"x-neaptide-deadline-ms: 100\r\n"
            begun = await (await guests.ask("gold", extra=soon))  # nobody knows yet how long it takes
            assert (begun.status, begun.code) == (504, "deadline_exceeded")
            await asyncio.gather(*[await guests.ask("teach") for _ in range(16)])
            known = len(replica.asked)
            refused = await (await guests.ask("gold", extra=soon))
            assert (refused.status, refused.code) == (429, "deadline_unreachable")
            assert "the quickest of the last answers took 0.3 s" in refused.json["error"]["message"]
            assert len(replica.asked) == known
            assert (running.row.outcome, running.row.error) == ("refused", "deadline_unreachable")
            assert (await (await guests.ask("gold", extra=b"x-neaptide-deadline-ms: 5000\r\n"))).status == 200

    run(main())
