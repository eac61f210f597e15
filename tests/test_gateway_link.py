"""The gateway before own replicas, over the link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from neaptide.link import CREDIT_BYTES, HEADERS, MAX_FRAME, Hello
from neaptide.table import Fast, ReplicaRow, Table, Timeouts
from tests.fake_link import FakeLinkReplica, Opened
from tests.gateway_kit import AUTH, Running, chat, event, gateway, post, run, table, until

DONE = b"data: [DONE]\n\n"
HELLO = Hello(token="boot", role="replica", name="r0")


@contextlib.asynccontextmanager
async def linked(
    count: int = 1, slots: int = 100, hello: Hello = HELLO, **options: Any
) -> AsyncIterator[tuple[Running, list[FakeLinkReplica]]]:
    """A gateway with its links up."""
    with tempfile.TemporaryDirectory(prefix="np") as directory:
        replicas = [await FakeLinkReplica(Path(directory, f"r{i}.link"), slots, hello).start() for i in range(count)]
        options.setdefault("replica", {"token": "boot"})
        try:
            async with gateway(table([f"link:{r.path}" for r in replicas], **options)) as running:
                await until(lambda: all(t.report is not None for t in running.door.lanes["m"].targets))
                yield running, replicas
        finally:
            for replica in replicas:
                await replica.stop()


async def opened(replica: FakeLinkReplica, count: int = 1) -> Opened:
    await until(lambda: len(replica.requests) >= count)
    return replica.requests[count - 1]


def test_a_stream_passes_token_by_token_and_its_counts_come_from_the_replica():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            extra = AUTH + b"X-Neaptide-Deadline-Ms: 60000\r\n"
            await client.send(post(chat(stream=True, stream_options={"include_usage": True}), extra=extra))
            request = await opened(replica)
            header = request.header
            assert (header.route, header.stream, header.include_usage) == ("chat.completions", True, True)
            assert header.deadline_in_s is not None
            assert 50 < header.deadline_in_s <= 60
            assert request.json == chat(stream=True, stream_options={"include_usage": True})
            for text in "ab":
                request.token(event(text))
                if text == "a":
                    status, headers = await client.head()
                    assert (status, headers["transfer-encoding"]) == (200, "chunked")
                assert await client.chunk() == event(text)
            assert not running.journal.rows
            request.end(
                event(None, "stop") + DONE,
                finish="stop",
                prompt_tokens=7,
                cached_tokens=4,
                output_tokens=2,
                engine_s=0.5,
                kv_token_s=3.0,
            )
            assert await client.chunk() == event(None, "stop") + DONE
            assert await client.chunk() == b""
            row = running.row
            assert (row.prompt_tokens, row.cached_tokens, row.output_tokens) == (7, 4, 2)
            assert (row.engine_s, row.kv_token_s, row.finish, row.outcome) == (0.5, 3.0, "stop", "ok")
            assert row.request_id == header.request_id
            assert row.tpot_s > 0

    run(main())


def test_a_whole_answer_comes_with_the_end():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            ask = asyncio.create_task(running.ask(post(chat())))
            request = await opened(replica)
            request.token(b"", (5,))
            request.token(b"", (6,))
            request.end(b'{"ok":1}', finish="stop", output_tokens=2)
            answer = await ask
            assert (answer.status, answer.json) == (200, {"ok": 1})
            assert running.row.ttft_s > 0

    run(main())


def test_tokens_of_one_read_become_one_chunk_a_client():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            clients = [await running.connect() for _ in range(3)]
            for client in clients:
                await client.send(post(chat(stream=True)))
            await opened(replica, 3)
            (wire,) = replica.wires
            wire.batch = []
            for request in replica.requests:
                request.token(event("a"))
                request.token(event("b"), (2, 3))
            wire.flush()
            for client in clients:
                await client.head()
                assert await client.chunk() == event("a") + event("b")
            wire.batch = []
            for request in replica.requests:
                request.token(event("c"))
                request.end(DONE, finish="length", output_tokens=4)
            wire.flush()
            for client in clients:
                assert await client.chunk() == event("c")
                assert await client.chunk() == DONE
            assert {row.output_tokens for row in running.journal.rows} == {4}

    run(main())


def test_a_replicas_refusal_is_a_plain_answer_even_to_a_stream():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            ask = asyncio.create_task(running.ask(post(chat(stream=True))))
            body = json.dumps({"error": {"message": "too long", "code": "context_length_exceeded"}}).encode()
            (await opened(replica)).end(body, status=400, error="context_length_exceeded")
            answer = await ask
            assert (answer.status, answer.code) == (400, "context_length_exceeded")
            assert answer.headers["content-type"] == "application/json"
            assert (running.row.outcome, running.row.error) == ("refused", "context_length_exceeded")

    run(main())


def test_headers_of_a_replica_are_added_from_a_short_list():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            ask = asyncio.create_task(running.ask(post(chat(stream=True))))
            request = await opened(replica)
            listed = [["Warning", '299 - "x"'], ["Set-Cookie", "a=b"], ["warning", "a\r\nb: c"]]
            request.wire.send(request.stream, HEADERS, json.dumps(listed).encode())
            request.token(event("a"))
            request.end(DONE, finish="stop")
            answer = await ask
            assert answer.headers["warning"] == '299 - "x"'
            assert "set-cookie" not in answer.headers
            assert "b" not in answer.headers

    run(main())


def test_a_large_body_goes_in_parts():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            body = chat(pad="x" * (3 * MAX_FRAME))
            ask = asyncio.create_task(running.ask(post(body)))
            request = await opened(replica)
            assert request.json == body
            request.end(b"{}", finish="stop")
            assert (await ask).status == 200

    run(main())


def test_the_client_leaves_and_the_replica_tells_what_it_cost():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            request = await opened(replica)
            request.token(event("a"))
            await client.head()
            client.close()
            await until(lambda: request.aborted)
            assert running.door.lanes["m"].targets[0].in_flight == 1  # the slot is freed when the replica ends
            assert not running.journal.rows
            request.end(finish="abort", prompt_tokens=9, output_tokens=5)
            await until(lambda: running.journal.rows)
            assert (running.row.outcome, running.row.prompt_tokens, running.row.output_tokens) == ("aborted", 9, 5)
            assert running.door.lanes["m"].targets[0].in_flight == 0

    run(main())


def test_a_slow_client_holds_back_credit_and_nobody_else():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            slow, quick = await running.connect(), await running.connect()
            await slow.send(post(chat(stream=True, user="slow")))
            await quick.send(post(chat(stream=True, user="quick")))
            await opened(replica, 2)
            requests = {r.json["user"]: r for r in replica.requests}
            sent = dict.fromkeys(requests, 0)
            piece = event("x" * 8000)

            def pump(who: str, most: int) -> bool:
                request = requests[who]
                while request.credit >= len(piece) + 6 and sent[who] < most:
                    request.credit -= len(piece) + 6
                    request.token(piece)
                    sent[who] += 1
                return sent[who] >= most

            async def read_quick() -> int:
                await quick.head()
                seen = 0
                while data := await quick.chunk():
                    seen += len(data)
                return seen

            reading = asyncio.create_task(read_quick())
            slow.reader._limit = 1 << 14  # type: ignore[attr-defined]
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            paused = lambda: any(x.paused_s for x in running.door.live)  # noqa: E731
            await until(lambda: pump("slow", 10_000) or paused())
            await until(lambda: pump("quick", 1000))
            assert requests["slow"].credit < len(piece) + 6 or sent["slow"] < 10_000
            requests["quick"].end(DONE, finish="stop")
            assert await reading == 1000 * len(piece) + len(DONE)
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            slow.reader._limit = 1 << 24  # type: ignore[attr-defined]
            total = sent["slow"] + 50
            draining = asyncio.create_task(slow.answer())
            await until(lambda: pump("slow", total))
            requests["slow"].end(DONE, finish="stop")
            assert len((await draining).body) == total * len(piece) + len(DONE)
            assert CREDIT_BYTES == 65536

    run(main())


def test_a_replica_takes_no_more_than_it_reported():
    async def main() -> None:
        async with linked(slots=2) as (running, (replica,)):
            asks = [asyncio.create_task(running.ask(post(chat()))) for _ in range(4)]
            await opened(replica, 2)
            await until(lambda: len(running.door.lanes["m"].line) == 2)
            replica.wires[0].load(running=2, slots=1)
            await opened(replica, 3)
            assert len(running.door.lanes["m"].line) == 1
            replica.requests[0].end(b"{}", finish="stop")  # a freed slot counts before the next report
            await opened(replica, 4)
            for request in replica.requests[1:]:
                request.end(b"{}", finish="stop")
            assert {(await a).status for a in asks} == {200}

    run(main())


def test_a_retryable_end_and_a_lost_connection_before_the_first_token_go_elsewhere():
    async def main() -> None:
        async with linked(2) as (running, replicas):
            ask = asyncio.create_task(running.ask(post(chat(stream=True))))
            await until(lambda: replicas[0].requests or replicas[1].requests)
            first, second = sorted(replicas, key=lambda r: not r.requests)
            first.requests[0].end(status=503, error="no_room", finish="error", retryable=True)
            (await opened(second)).wire.transport.abort()
            await opened(first, 2)
            first.requests[1].end(DONE, finish="stop")
            assert (await ask).status == 200
            assert len(running.row.attempts) == 3

    run(main())


def test_a_connection_lost_after_the_first_token_is_an_error_event_and_the_link_comes_back():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            (await opened(replica)).token(event("a"))
            await client.head()
            await client.chunk()
            replica.cut()
            last = await client.chunk()
            assert b'"replica_lost"' in last
            assert await client.chunk() == b""
            assert (running.row.outcome, running.row.output_tokens) == ("error", 1)
            ask = asyncio.create_task(running.ask(post(chat())))
            (await opened(replica, 2)).end(b"{}", finish="stop")
            assert (await ask).status == 200
            assert len(replica.wires) == 2

    run(main())


def test_an_error_in_the_middle_of_a_stream_is_an_error_event():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            request = await opened(replica)
            request.token(event("a"))
            await client.head()
            await client.chunk()
            request.end(finish="error", error="engine_failed", output_tokens=1)
            assert b'"engine_failed"' in await client.chunk()
            assert await client.chunk() == b""

    run(main())


def test_a_deadline_aborts_the_replica():
    async def main() -> None:
        options = {"deployment": {"timeouts": Timeouts(first_byte_s=0.1)}}
        async with linked(**options) as (running, (replica,)):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (504, "first_byte_timeout")
            await until(lambda: replica.requests[0].aborted)
            replica.requests[0].end(finish="abort")  # a late end harms nobody
            ask = asyncio.create_task(running.ask(post(chat())))
            (await opened(replica, 2)).end(b"{}", finish="stop")
            assert (await ask).status == 200

    run(main())


@pytest.mark.parametrize(
    "hello",
    [
        Hello(token="other", role="replica"),
        Hello(token="boot", role="gateway"),
        Hello(token="boot", role="replica", version=99),
        Hello(token="boot", role="replica", epoch=7),
    ],
)
def test_a_stranger_at_the_socket_gets_no_requests(hello: Hello):
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            replica = await FakeLinkReplica(Path(directory, "r.link"), hello=hello).start()
            row = ReplicaRow(id="r0", model="m", endpoint=f"link:{replica.path}", token="boot", epoch=3)
            held = table([], deployment={"max_wait_s": 0.3})
            async with gateway(Table(fast=Fast(version=1, replicas=(row,)), slow=held.slow)) as running:
                answer = await running.ask(post(chat()))
                assert answer.status == 429
                assert replica.hellos
                assert not replica.requests
                assert "r0" in running.door.gauges(0.0, 0).unreachable
            await replica.stop()

    run(main())


@pytest.mark.parametrize("raw", [b"\xff" * 9, (2).to_bytes(4, "little") + bytes(4) + b"\x63" + b"xx"])
def test_a_replica_that_breaks_the_protocol_loses_its_connection_only(raw: bytes):
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            request = await opened(replica)
            request.token(event("a"))
            await client.head()
            await client.chunk()
            request.wire.transport.write(raw)
            assert b'"replica_lost"' in await client.answer_rest()
            await until(lambda: len(replica.wires) == 2)
            ask = asyncio.create_task(running.ask(post(chat())))
            (await opened(replica, 2)).end(b"{}", finish="stop")
            assert (await ask).status == 200

    run(main())


def test_a_request_that_finds_no_link_waits_for_it():
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            path = Path(directory, "r.link")
            async with gateway(table([f"link:{path}"], replica={"token": "boot"})) as running:
                ask = asyncio.create_task(running.ask(post(chat())))
                await until(lambda: len(running.door.lanes["m"].line) == 1)
                replica = await FakeLinkReplica(path).start()
                (await opened(replica)).end(b"{}", finish="stop")
                assert (await ask).status == 200
                await replica.stop()

    run(main())


def test_a_replica_that_leaves_the_table_may_finish_what_it_runs():
    async def main() -> None:
        async with linked() as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            request = await opened(replica)
            request.token(event("a"))
            await client.head()
            running.install(table([]))
            assert not replica.wires[0].lost
            request.end(DONE, finish="stop", output_tokens=1)
            assert (await client.answer_rest()).endswith(DONE)
            await until(lambda: replica.wires[0].lost)

    run(main())
