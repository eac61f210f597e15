"""Expiry, scopes and limits of keys over HTTP: who is refused, with which words, and that everything comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from neaptide.clock import wall_s
from neaptide.gateway.quota import FLIGHT, REQUESTS, SUM, TOKENS
from neaptide.table import Cors, KeyRow, Quota
from tests.fake_link import FakeLinkReplica
from tests.gateway_kit import (
    EVENT_HEAD,
    KEY,
    Answer,
    Asked,
    FakeReplica,
    Running,
    chat,
    chunk,
    event,
    gateway,
    key_row,
    post,
    reply_by_body,
    run,
    serving,
    table,
    until,
)
from tests.test_gateway_process import endless

OTHER = b"Authorization: Bearer sk-other\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-test\r\n\r\n"


def limited(rpm: int | None = None, tpm: int | None = None, concurrency: int | None = None, of: str = "key") -> KeyRow:
    return key_row(quotas=(Quota(of, rpm, tpm, concurrency),))  # type: ignore[arg-type]


def counted(running: Running, of: str = "key") -> tuple[int, int, int]:
    """(requests and tokens of this minute, requests in flight) of the one key, or its tenant."""
    counters = running.door.throttle.counters
    name = "key:id-test" if of == "key" else "tenant:default"
    with counters as cells:
        at = counters.row(counters.id_of(name), 0.0)
        assert at is not None
        return cells[at + REQUESTS + SUM], cells[at + TOKENS + SUM], cells[at + FLIGHT]


def message(answer: Answer) -> str:
    assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
    assert answer.json["error"]["type"] == "rate_limit_error"
    return str(answer.json["error"]["message"])


# --- rpm


def test_rpm_names_itself_its_value_and_when_there_is_room() -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[limited(rpm=2), key_row("sk-other")]) as (running, (replica,)):
            first, second = [await running.ask(post(chat(stream=stream))) for stream in (False, True)]
            assert (first.status, second.status) == (200, 200)
            names = ["limit", "remaining", "reset"]
            told = [[a.headers[f"x-ratelimit-{name}-requests"] for name in names] for a in (first, second)]
            assert [t[:2] for t in told] == [["2", "1"], ["2", "0"]]
            assert "x-ratelimit-limit-tokens" not in first.headers
            for _ in range(3):
                answer = await running.ask(post(chat()))
                assert "This API key has reached its limit of 2 requests a minute (rpm)." in message(answer)
                assert 50 <= int(answer.headers["retry-after"]) <= 61
                assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert len(replica.asked) == 2
            assert counted(running) == (2, 0, 0)  # refusals are not counted
            assert [r.outcome for r in running.journal.rows] == ["ok", "ok", "refused", "refused", "refused"]
            free = await running.ask(post(chat(), extra=OTHER))
            assert free.status == 200
            assert not [name for name in free.headers if name.startswith("x-ratelimit")]

    run(main())


def test_a_kept_connection_is_held_to_the_limit_as_well() -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[limited(rpm=3)]) as (running, _):
            client = await running.connect()
            statuses = []
            for _ in range(5):
                await client.send(post(chat()))
                statuses.append((await client.answer()).status)
            assert statuses == [200, 200, 200, 429, 429]

    run(main())


def test_the_keys_of_a_tenant_share_its_limit() -> None:
    async def main() -> None:
        quota = (Quota("tenant", 3),)
        keys = [key_row(quotas=quota), key_row("sk-other", quotas=(Quota("key", 1), *quota))]
        async with serving(reply_by_body, keys=keys) as (running, _):
            statuses = [(await running.ask(post(chat(), extra=OTHER))).status for _ in range(3)]
            assert statuses == [200, 429, 429]
            assert [(await running.ask(post(chat()))).status for _ in range(2)] == [200, 200]
            assert "The tenant 'default' has reached its limit of 3" in message(await running.ask(post(chat())))
            assert counted(running, "tenant")[0] == 3

    run(main())


def test_a_new_limit_holds_from_the_next_table_on_and_counts_what_came_before() -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[limited(rpm=5)]) as (running, (replica,)):
            for _ in range(3):
                assert (await running.ask(post(chat()))).status == 200
            endpoint = f"http://127.0.0.1:{replica.port}/v1"
            running.install(table([endpoint], keys=[limited(rpm=2)]))
            assert "limit of 2 requests" in message(await running.ask(post(chat())))
            running.install(table([endpoint], keys=[key_row()]))
            assert (await running.ask(post(chat()))).status == 200

    run(main())


def test_what_was_refused_for_want_of_replicas_is_not_counted() -> None:
    async def main() -> None:
        keys = [limited(rpm=9, tpm=9000, concurrency=9)]
        async with serving(keys=keys, deployment={"max_waiting": 0}) as (running, _):
            for _ in range(4):
                assert (await running.ask(post(chat()))).code == "queue_full"
            assert counted(running) == (0, 0, 0)
            gone = await running.ask(post({"model": "unknown"}))
            assert gone.status == 404
            assert counted(running) == (0, 0, 0)

    run(main())


# --- tpm


def test_a_prompt_counts_as_its_bytes_until_its_replica_has_told() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def later(
            replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
        ) -> None:
            await go.wait()
            await reply_by_body(replica, reader, writer, asked)

        request = post(chat())
        size = len(request.partition(b"\r\n\r\n")[2])
        async with serving(later, keys=[limited(tpm=2 * size - 1)]) as (running, (replica,)):
            first = asyncio.create_task(running.ask(request))
            await until(lambda: replica.running == 1)
            assert counted(running) == (0, size, 1)
            refused = await running.ask(request)
            assert f"limit of {2 * size - 1} tokens a minute (tpm)" in message(refused)
            assert refused.headers["x-ratelimit-remaining-tokens"] == str(size - 1)
            go.set()
            assert (await first).status == 200
            assert counted(running) == (0, 9, 0)  # 7 of prompt and 2 of answer
            assert (await running.ask(request)).status == 200

    run(main())


def test_an_answer_counts_while_it_comes() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def slowly(
            replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
        ) -> None:
            writer.write(EVENT_HEAD + b"".join(chunk(event("a")) for _ in range(30)))
            await go.wait()
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

        async with serving(slowly, keys=[limited(tpm=10_000)]) as (running, _):
            client = await running.connect()
            request = post(chat(stream=True))
            size = len(request.partition(b"\r\n\r\n")[2])
            await client.send(request)
            await until(lambda: counted(running)[1] == size + 30)
            go.set()
            await client.answer()
            _, tokens, in_flight = counted(running)
            assert tokens >= size + 30  # a replica that tells no counts: the bound stays
            assert in_flight == 0

    run(main())


# --- concurrency: it always comes back


async def dies(replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked) -> None:
    writer.write(EVENT_HEAD + chunk(event("a")))
    await writer.drain()
    writer.transport.abort()


async def breaks(
    replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
) -> None:
    writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")


def test_concurrency_counts_those_that_wait_and_says_try_again() -> None:
    async def main() -> None:
        async with serving(keys=[limited(concurrency=2)]) as (running, _):
            waiting = [await running.connect() for _ in range(2)]
            for client in waiting:
                await client.send(post(chat()))
            await until(lambda: counted(running)[2] == 2)
            answer = await running.ask(post(chat()))
            assert "limit of 2 requests at once (concurrency)" in message(answer)
            assert answer.headers["retry-after"] == "1"
            for client in waiting:
                client.close()
            await until(lambda: counted(running)[2] == 0)

    run(main())


@pytest.mark.parametrize("behave", [reply_by_body, dies, breaks])
@pytest.mark.parametrize("stream", [False, True])
def test_however_a_request_ends_its_place_is_free(behave: Callable[..., Awaitable[None]], stream: bool) -> None:
    async def main() -> None:
        async with serving(behave, keys=[limited(concurrency=1)]) as (running, (replica,)):
            for _ in range(3):
                answer = await running.ask(post(chat(stream=stream)))
                assert answer.status != 429
                assert counted(running)[2] == 0
            assert len(replica.asked) >= 3

    run(main())


def test_a_client_that_leaves_gives_its_place_back() -> None:
    async def main() -> None:
        async with serving(endless, keys=[limited(concurrency=1, tpm=5000)]) as (running, _):
            for _ in range(3):
                client = await running.connect()
                await client.send(post(chat(stream=True)))
                assert (await client.head())[0] == 200
                assert counted(running)[2] == 1
                client.close()
                await until(lambda: counted(running)[2] == 0)
            assert counted(running)[1] >= 3 * len(str(chat(stream=True)))  # what was computed for it is not known

    run(main())


def test_a_link_s_replica_that_dies_or_ends_gives_the_place_back(tmp_path: Path) -> None:
    async def main() -> None:
        replica = await FakeLinkReplica(tmp_path / "r0.link").start()
        held = table([f"link:{replica.path}"], replica={"token": "boot"}, keys=[limited(concurrency=1)])
        async with gateway(held) as running:
            ask = asyncio.create_task(running.ask(post(chat())))
            await until(lambda: replica.requests)
            assert counted(running)[2] == 1
            replica.requests[0].end(b"{}", finish="stop")
            assert (await ask).status == 200
            assert counted(running)[2] == 0
            client = await running.connect()
            await client.send(post(chat()))
            await until(lambda: len(replica.requests) == 2)
            client.close()
            await replica.stop()
            await until(lambda: counted(running)[2] == 0)

    run(main())


# --- expiry and scopes


def test_a_key_that_expires_is_refused_on_a_kept_connection_too() -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[key_row(expires_wall_s=wall_s() + 0.4)]) as (running, _):
            client = await running.connect()

            async def ask() -> Answer:
                await client.send(post(chat()))
                return await client.answer()

            answers = [await ask()]
            while answers[-1].status == 200:
                answers.append(await ask())
            assert len(answers) > 1
            assert answers[-1].status == 401
            assert answers[-1].code == "expired_api_key"
            assert "the API key expired at 20" in answers[-1].json["error"]["message"]
            assert (await running.ask(MODELS)).code == "expired_api_key"

    run(main())


@pytest.mark.parametrize(
    ("scopes", "statuses"),
    [
        ((), [200, 200, 200]),
        (("inference",), [200, 403, 403]),
        (("tokenize", "models"), [403, 200, 200]),
    ],
)
def test_a_key_may_do_what_its_scopes_say(scopes: tuple[str, ...], statuses: list[int]) -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[key_row(scopes=scopes)]) as (running, _):
            requests = [post(chat()), post({"model": "m", "prompt": "x"}, path="/tokenize"), MODELS]
            answers = [await running.ask(request) for request in requests]
            assert [a.status for a in answers] == statuses
            refused: list[Any] = [a for a in answers if a.status == 403]
            assert all(a.code == "scope_not_allowed" for a in refused)
            assert all(", ".join(scopes) in a.json["error"]["message"] for a in refused)

    run(main())


def test_pages_of_other_origins_may_read_the_limits() -> None:
    async def main() -> None:
        async with serving(reply_by_body, keys=[limited(rpm=1)], cors=Cors(origins=("*",))) as (running, _):
            extra = b"Origin: http://x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
            answer = await running.ask(post(chat(), extra=extra))
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {name for name in answer.headers if name.startswith("x-ratelimit")} <= set(exposed)

    run(main())
