"""An answer whose replica is lost goes on elsewhere: what the next replica is told, what the client and the row see."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from neaptide.link import Hello
from neaptide.wire.peek import replays
from tests.fake_link import FakeLinkReplica, Opened
from tests.gateway_kit import Client, Running, chat, event, post, run, until
from tests.test_gateway_link import DONE, linked, opened

REPLAYABLE = {"replayable": msgspec.Raw(b'["greedy","penalties"]')}
SAYS = Hello(token="boot", role="replica", name="r", resumes=True, describe=REPLAYABLE)
OURS = {"token": "boot", "revision": "rev-1"}


async def begun(running: Running, replica: FakeLinkReplica, *ids: int, **fields: Any) -> tuple[Client, Opened]:
    """A stream of which these tokens are out."""
    client = await running.connect()
    await client.send(post(chat(**{"stream": True, **fields})))
    request = await opened(replica)
    for at, id in enumerate(ids):
        request.token(event(chr(id)), (id,))
        if not at:
            await client.head()
        assert await client.chunk() == event(chr(id))
    return client, request


def of(request: Opened) -> tuple[tuple[int, ...], bytes]:
    """The ids and the body that a replica was given."""
    size = 4 * request.header.resumed
    return struct.unpack_from(f"<{request.header.resumed}I", request.body), request.body[size:]


async def asked_of_two(
    running: Running, replicas: list[FakeLinkReplica]
) -> tuple[Client, FakeLinkReplica, FakeLinkReplica]:
    """A stream that was asked for; the replica that has it, the other one."""
    client = await running.connect()
    await client.send(post(chat(stream=True)))
    await until(lambda: any(r.requests for r in replicas))
    one, other = replicas
    return (client, one, other) if one.requests else (client, other, one)


@pytest.mark.parametrize("how", ["cut", "engine_died", "draining"])
def test_a_stream_goes_on_at_another_replica_from_the_tokens_that_are_out(how: str) -> None:
    async def main() -> None:
        async with linked(2, hello=SAYS, replica=OURS) as (running, replicas):
            client, first, second = await asked_of_two(running, replicas)
            request = first.requests[0]
            request.token(event("a"), (97,))
            await client.head()
            assert await client.chunk() == event("a")
            request.token(event("b"), (98,))
            assert await client.chunk() == event("b")
            if how == "cut":
                first.cut()
            else:
                request.end(finish="error", error=how, status=502, output_tokens=9)
            more = await opened(second)
            assert of(more) == ((97, 98), request.body)
            assert (more.header.emitted_chars, more.header.request_id) == (None, request.header.request_id)
            assert more.header.created_s == request.header.created_s > 0
            more.token(event("c"), (99,))
            more.end(event(None, "stop") + DONE, finish="stop", prompt_tokens=7, output_tokens=1)
            assert await client.chunk() == event("c")
            assert await client.answer_rest() == event(None, "stop") + DONE
            row = running.row
            assert (row.outcome, row.prompt_tokens, row.output_tokens, row.finish) == ("ok", 7, 3, "stop")
            assert [a.tokens for a in row.attempts] == [2, 1]
            assert len({a.replica for a in row.attempts}) == 2
            assert running.door.lanes["m"].metrics.resumes == 1

    run(main())


def test_where_no_other_has_room_it_waits_before_all_others() -> None:
    async def main() -> None:
        async with linked(1, slots=1, hello=SAYS, replica=OURS) as (running, replicas):
            (replica,) = replicas
            client, _ = await begun(running, replica, 97)
            waiting = await running.connect()
            await waiting.send(post(chat(stream=True)))
            await until(lambda: running.door.lanes["m"].line.waiting == 1)
            replica.cut()
            await until(lambda: running.door.lanes["m"].line.waiting == 2)
            more = await opened(replica, 2)  # its link is up again
            assert of(more)[0] == (97,)
            more.end(event(None, "stop") + DONE, finish="stop", output_tokens=0)
            assert (await client.answer_rest()).endswith(DONE)
            other = await opened(replica, 3)
            assert other.header.resumed == 0
            waiting.close()

    run(main())


def test_an_answer_that_does_not_stream_is_told_whole() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, replicas):
            (replica,) = replicas
            client, request = await begun(running, replica, stream=False)
            request.token(b"", (97, 98))
            await until(lambda: any(e.timing.tokens == 2 for e in running.door.live))
            replica.cut()
            more = await opened(replica, 2)
            assert (of(more)[0], more.header.emitted_chars) == ((97, 98), 0)
            more.end(b'{"whole": 1}', finish="stop", prompt_tokens=7, output_tokens=1)
            answer = await client.answer()
            assert (answer.status, answer.json) == (200, {"whole": 1})
            assert running.row.output_tokens == 3

    run(main())


@pytest.mark.parametrize("fields", [{"seed": 1}, {"repetition_penalty": 1.1}])
def test_where_sampling_cannot_be_replayed_the_stream_ends_with_an_error_event(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, replicas):
            client, _ = await begun(running, replicas[0], 97, **fields)
            replicas[0].cut()
            assert b'"replica_lost"' in await client.answer_rest()
            assert (running.row.outcome, running.row.output_tokens) == ("error", 1)

    run(main())


def test_a_fault_of_the_request_itself_does_not_go_on() -> None:
    async def main() -> None:
        async with linked(2, hello=SAYS, replica=OURS) as (running, replicas):
            client, first, second = await asked_of_two(running, replicas)
            first.requests[0].token(event("a"), (97,))
            first.requests[0].end(finish="error", error="engine_error", status=502)
            assert b'"engine_error"' in (await client.answer()).body
            assert not second.requests

    run(main())


def test_a_request_of_which_two_replicas_in_a_row_die_without_a_token_is_given_to_no_third() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, replicas):
            (replica,) = replicas
            client, _ = await begun(running, replica, 97)
            for count in (2, 3):
                replica.requests[-1].end(finish="error", error="engine_died", status=502)
                replica.wires[-1].load(slots=100)  # an engine in its place
                await opened(replica, count)
            replica.requests[-1].end(finish="error", error="engine_died", status=502)
            assert b'"engine_died"' in await client.answer_rest()
            assert [a.tokens for a in running.row.attempts] == [1, 0, 0]
            assert (running.row.outcome, running.row.output_tokens) == ("error", 1)

    run(main())


def test_a_client_that_leaves_while_its_answer_is_between_replicas_is_recorded_with_what_it_had() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, replicas):
            (replica,) = replicas
            client, _ = await begun(running, replica, 97, 98)
            await replica.stop()
            await until(lambda: running.door.lanes["m"].line.waiting == 1)
            client.close()
            await until(lambda: running.journal.rows)
            assert (running.row.outcome, running.row.output_tokens) == ("aborted", 2)
            assert running.door.lanes["m"].line.waiting == 0

    run(main())


def test_deaths_by_a_broken_link_count_too() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, (replica,)):
            client, _ = await begun(running, replica, 97)
            for count in (2, 3):
                replica.cut()
                await opened(replica, count)
            replica.cut()
            assert b'"replica_lost"' in await client.answer_rest()
            assert [a.tokens for a in running.row.attempts] == [1, 0, 0]

    run(main())


def test_a_replica_that_has_no_room_is_no_death() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, (replica,)):
            client, _ = await begun(running, replica, 97)
            replica.cut()
            for count in range(2, 7):
                more = await opened(replica, count)
                more.end(finish="error", error="replica_full", status=429, retryable=True)
                replica.wires[-1].load(slots=100)
            more = await opened(replica, 7)
            more.token(event("b"), (98,))
            more.end(event(None, "stop") + DONE, finish="stop", output_tokens=1)
            assert (await client.answer_rest()).endswith(DONE)
            assert (running.row.outcome, running.row.output_tokens) == ("ok", 2)

    run(main())


def test_an_answer_older_than_the_longest_wait_still_waits_for_a_replica() -> None:
    async def main() -> None:
        options = {"hello": SAYS, "replica": OURS, "deployment": {"max_wait_s": 0.5}}
        async with linked(1, **options) as (running, (replica,)):
            client, request = await begun(running, replica, 97)
            for exchange in running.door.live:
                exchange.call.arrived_s -= 1.0  # it has run for longer than anybody may wait
            replica.cut()
            more = await opened(replica, 2)
            more.end(finish="error", error="draining", status=503, retryable=True)
            replica.wires[-1].load(slots=100)
            more = await opened(replica, 3)
            more.end(event(None, "stop") + DONE, finish="stop", output_tokens=0)
            assert (await client.answer_rest()).endswith(DONE)
            assert request.header.request_id == more.header.request_id

    run(main())


def test_an_answer_of_a_revision_that_is_gone_holds_up_nobody() -> None:
    async def main() -> None:
        async with linked(2, hello=SAYS, replica=OURS) as (running, replicas):
            client, first, second = await asked_of_two(running, replicas)
            first.requests[0].token(event("a"), (97,))
            await client.head()
            assert await client.chunk() == event("a")
            table = running.door.table
            rows = [
                msgspec.structs.replace(r, revision="rev-2") if r.endpoint.endswith(second.path.name) else r
                for r in table.fast.replicas
            ]
            fast = msgspec.structs.replace(table.fast, replicas=tuple(rows))
            running.install(msgspec.structs.replace(table, fast=fast))
            await first.stop()
            await until(lambda: running.door.lanes["m"].line.waiting == 1)
            for count in (1, 2, 3):
                other = await running.connect()
                await other.send(post(chat()))
                more = await opened(second, count)
                assert more.header.resumed == 0
                more.end(b"{}", finish="stop")
                assert (await other.answer()).status == 200
            client.close()

    run(main())


def test_an_answer_of_a_model_that_is_gone_ends() -> None:
    async def main() -> None:
        async with linked(1, hello=SAYS, replica=OURS) as (running, (replica,)):
            client, _ = await begun(running, replica, 97)
            table = running.door.table
            running.install(msgspec.structs.replace(table, slow=msgspec.structs.replace(table.slow, deployments=())))
            replica.cut()
            assert b'"model_not_found"' in await client.answer_rest()
            assert running.row.outcome == "error"

    run(main())


@pytest.mark.parametrize(
    ("fields", "features"),
    [
        ({}, set()),
        ({"temperature": 0}, {"greedy"}),
        ({"temperature": 0, "seed": 3}, {"greedy"}),
        ({"temperature": 0.7, "seed": 3}, {"seed"}),
        ({"presence_penalty": 0.5}, {"penalties"}),
        ({"frequency_penalty": 0.0, "repetition_penalty": 1.0}, set()),
        ({"repetition_penalty": 1.2}, {"repetition_penalty"}),
        ({"response_format": {"type": "json_object"}}, {"json_schema"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"logprobs": True}, {"logprobs"}),
        ({"logprobs": False}, set()),
        ({"logprobs": 0}, {"logprobs"}),
    ],
)
def test_what_an_answer_depends_on_is_read_off_its_request(fields: dict[str, Any], features: set[str]) -> None:
    assert replays(msgspec.json.encode(chat(**fields))) == features
