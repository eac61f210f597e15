"""Requests that are held while a replica starts: the client hears that it still waits, and how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from neaptide.clock import mono_s
from neaptide.gateway.exchange import HEARTBEAT
from neaptide.gateway.overdue import HEARTBEAT_S
from neaptide.table import Table
from tests.gateway_kit import (
    KEY,
    Behaviour,
    Client,
    FakeReplica,
    Running,
    answer_bytes,
    chat,
    gateway,
    post,
    reply_by_body,
    run,
    table,
    until,
)


@asynccontextmanager
async def at_zero(**deployment: Any) -> AsyncIterator[Running]:
    async with gateway(table([], deployment=deployment)) as running:
        yield running


async def held(running: Running, request: bytes) -> Client:
    """A client whose request waits."""
    client = await running.connect()
    await client.send(request)
    await until(lambda: len(running.door.lanes["m"].line) == 1)
    return client


def pass_time(running: Running, beats: int = 1) -> None:
    now = mono_s()
    for i in range(beats):
        running.door.sweep(now + (i + 1) * HEARTBEAT_S)


async def starts(running: Running, behave: Behaviour) -> FakeReplica:
    """A replica is there."""
    replica = await FakeReplica(behave).start()
    running.install(table([f"http://127.0.0.1:{replica.port}/v1"]))
    return replica


async def heard(client: Client) -> list[bytes]:
    """The head's status must be 200; then all chunks to the end."""
    status, headers = await client.head()
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    chunks = []
    while piece := await client.chunk():
        chunks.append(piece)
    return chunks


def test_a_held_stream_hears_a_comment_every_five_seconds_and_then_its_answer() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            pass_time(running, beats=3)
            replica = await starts(running, reply_by_body)
            chunks = await heard(client)
            assert chunks[:3] == [HEARTBEAT] * 3
            answer = b"".join(chunks[3:])
            assert answer.count(b"data:") == 5
            assert answer.endswith(b"data: [DONE]\n\n")
            assert (running.row.outcome, running.row.status, running.row.output_tokens) == ("ok", 200, 3)
            await replica.stop()

    run(main())


def test_a_request_that_does_not_stream_is_held_in_silence() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat()))
            pass_time(running, beats=3)
            replica = await starts(running, reply_by_body)
            assert (await client.answer()).status == 200
            await replica.stop()

    run(main())


def test_a_short_wait_leaves_the_status_to_the_replica() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            running.door.sweep(mono_s() + HEARTBEAT_S - 1)
            replica = await starts(running, always_400)
            assert (await client.answer()).status == 400
            await replica.stop()

    run(main())


async def always_400(replica: FakeReplica, reader: Any, writer: Any, asked: Any) -> None:
    body = json.dumps({"error": {"message": "too\nlong", "code": "context_length"}}, indent=2).encode()
    writer.write(answer_bytes(body, status=400))
    await writer.drain()


async def endless_page(replica: FakeReplica, reader: Any, writer: Any, asked: Any) -> None:
    writer.write(answer_bytes(b"x" * 200_000, content_type="text/html"))
    await writer.drain()


def test_what_the_replica_refuses_after_a_heartbeat_is_an_error_event() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            pass_time(running)
            replica = await starts(running, always_400)
            chunks = await heard(client)
            event = b"".join(chunks[1:])
            assert event.startswith(b"data: ")
            assert event.count(b"\n") == 2
            assert json.loads(event[6:])["error"]["code"] == "context_length"
            assert (running.row.outcome, running.row.error) == ("refused", "replica_400")
            await replica.stop()

    run(main())


def test_a_replica_that_does_not_stream_after_a_heartbeat_is_not_gathered_without_bound() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            pass_time(running)
            replica = await starts(running, endless_page)
            event = b"".join((await heard(client))[1:])
            assert json.loads(event[6:])["error"]["code"] == "replica_no_stream"
            await replica.stop()

    run(main())


@pytest.mark.parametrize("failing", ["", "its weights are missing"])
def test_a_wait_that_ends_badly_is_an_error_event_once_the_head_is_out(failing: str) -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            pass_time(running)
            if failing:
                running.install(table([], deployment={"failing": failing}))
            running.door.sweep(mono_s() + (0 if failing else 70))
            event = b"".join((await heard(client))[1:])
            error = json.loads(event[6:])["error"]
            assert error["code"] == ("replica_failing" if failing else "wait_expired")
            assert running.row.outcome == ("error" if failing else "refused")

    run(main())


def test_the_openai_client_reads_a_held_stream_and_its_failure() -> None:
    async def main() -> None:
        async with at_zero() as running:
            sdk = AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=KEY, max_retries=0)
            for good in (True, False):
                asking = asyncio.create_task(_collect(sdk))
                await until(lambda: len(running.door.lanes["m"].line) == 1)
                pass_time(running)
                replica = await starts(running, reply_by_body if good else always_400)
                if good:
                    assert await asking == "abc"
                else:
                    with pytest.raises(APIError):
                        await asking
                running.install(Table(slow=running.door.table.slow))
                await replica.stop()
            await sdk.close()

    run(main())


async def _collect(sdk: AsyncOpenAI) -> str:
    messages: Any = [{"role": "user", "content": "hello"}]
    stream = await sdk.chat.completions.create(model="m", messages=messages, stream=True)
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


def test_a_client_that_leaves_while_it_is_held_is_forgotten() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True)))
            pass_time(running)
            client.close()
            await until(lambda: running.journal.rows)
            assert running.row.outcome == "aborted"
            assert len(running.door.lanes["m"].line) == 0

    run(main())


def test_an_old_client_hears_heartbeats_without_chunks() -> None:
    async def main() -> None:
        async with at_zero() as running:
            client = await held(running, post(chat(stream=True), version="1.0"))
            pass_time(running)
            replica = await starts(running, reply_by_body)
            answer = await client.answer()
            assert answer.headers["connection"] == "close"
            assert answer.body.startswith(HEARTBEAT)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            await replica.stop()

    run(main())
