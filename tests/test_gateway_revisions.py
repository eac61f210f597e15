"""Shares of traffic by revision, a client's own choice of one, and data that never leaves the house."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from neaptide.gateway.affinity import Familiar, conversation_of, first_words
from neaptide.gateway.call import Call
from neaptide.gateway.exchange import Exchange
from neaptide.gateway.lane import Lane
from neaptide.gateway.metrics import Metrics
from neaptide.gateway.revisions import Split
from neaptide.gateway.route import Target
from neaptide.table import DeploymentRow, Fast, ReplicaRow, Table
from neaptide.wire.peek import peek
from tests.gateway_kit import (
    AUTH,
    COMPLETION,
    Behaviour,
    FakeReplica,
    Running,
    answer_bytes,
    chat,
    event,
    key_row,
    post,
    reply_json,
    run,
    serving,
    until,
)
from tests.test_gateway_affinity import conversation
from tests.test_gateway_http import holding
from tests.test_gateway_link import DONE, linked, opened
from tests.test_gateway_resume import SAYS

INSIDE = key_row("sk-inside", inside=True)
ASKS_INSIDE = b"Authorization: Bearer sk-inside\r\n"
KEYS = {"keys": [key_row(), INSIDE]}
NAMES = "abcde"


def everywhere(name: str) -> bool:
    return True


# ------------------------------------------------------------------------------------------------ the shares


@st.composite
def traffics(draw: st.DrawFn) -> dict[str, int]:
    cuts = sorted(draw(st.lists(st.integers(0, 100), max_size=4)))
    shares = [high - low for low, high in zip([0, *cuts], [*cuts, 100], strict=True)]
    return dict(zip(NAMES, shares, strict=False))


@given(traffics(), st.integers(0, 250))
def test_any_hundred_requests_in_a_row_have_exactly_the_shares(traffic: dict[str, int], skipped: int) -> None:
    split = Split(traffic)
    for _ in range(skipped):
        split.draw(everywhere)
    found = Counter(split.draw(everywhere) for _ in range(100))
    assert {name: found[name] for name in traffic} == traffic


@given(traffics())
def test_within_a_hundred_no_share_is_more_than_one_request_ahead_or_behind_for_each_other_revision(
    traffic: dict[str, int],
) -> None:
    split, found = Split(traffic), Counter[str]()
    for n in range(1, 101):
        found[split.draw(everywhere)] += 1
        most = max(1, sum(share > 0 for share in traffic.values()) - 1)
        assert all(abs(found[name] - n * share / 100) <= most for name, share in traffic.items())


def test_conversations_have_about_the_shares_and_each_its_own_revision_for_good() -> None:
    split = Split({"a": 70, "b": 25, "c": 5})
    numbers = [conversation_of(b"conversation-%d" % n, 7)[0] for n in range(10_000)]
    drawn = [split.draw(everywhere, number) for number in numbers]
    assert all(abs(drawn.count(name) - 100 * share) < 200 for name, share in split.traffic.items())
    assert [split.draw(everywhere, number) for number in numbers] == drawn


def test_where_shares_change_only_conversations_of_the_percents_that_change_hands_move() -> None:
    before, after = Split({"a": 90, "b": 10}), Split({"a": 80, "b": 20})
    moved = [n for n in range(100) if before.draw(everywhere, n) != after.draw(everywhere, n)]
    assert len(moved) == 10
    assert all(after.draw(everywhere, n) == "b" for n in moved)


def test_a_revision_that_is_not_there_leaves_its_part_to_those_that_are() -> None:
    split = Split({"a": 50, "b": 50, "c": 0})
    assert {split.draw(lambda name: name != "a") for _ in range(100)} == {"b"}
    assert split.draw(lambda name: name == "c") == ""  # a share of nothing: the lane's last resort
    assert split.draw(lambda name: name == "b", conversation=3) == "b"


# ------------------------------------------------------------------------------------------------ a lane


def lane_of(*rows: ReplicaRow, traffic: dict[str, int] | None = None, affinity: bool = False) -> Lane:
    metrics = Metrics()
    row = DeploymentRow(model="m", traffic=traffic or {}, affinity=affinity)
    lane = Lane(row, metrics.model("m"), Familiar())
    lane.adopt(row)
    lane.aim([Target(r) for r in rows])
    return lane


def row(id: str, revision: str = "", **more: Any) -> ReplicaRow:
    return ReplicaRow(id=id, model="m", endpoint="http://h/v1", revision=revision, **more)


def asking(lane: Lane, inside: bool = False, pinned: str = "", name: bytes = b"", body: bytes = b"") -> Exchange:
    call = Call(0.0)
    call.body = body or b'{"model": "m", "messages": []}'
    call.size = len(call.body)
    if name:
        call.headers[b"x-neaptide-conversation"] = name
    nobody = cast(Any, None)
    exchange = Exchange(nobody, nobody, call, key_row(inside=inside), lane, peek(call.body), "normal", 1e9)
    exchange.pinned = pinned
    return exchange


rows = st.lists(
    st.builds(
        ReplicaRow,
        id=st.uuids().map(str),
        model=st.just("m"),
        endpoint=st.just("http://h/v1"),
        revision=st.sampled_from(["a", "b", ""]),
        outside=st.booleans(),
        max_running=st.sampled_from([1, 2, None]),
        state=st.sampled_from(["ready", "ready", "ready", "draining"]),
    ),
    max_size=24,
)


@given(
    rows=rows,
    traffic=st.sampled_from([{}, {"a": 100}, {"a": 50, "b": 50}, {"b": 100, "a": 0}]),
    affinity=st.booleans(),
    asks=st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(["", "", "a", "b", "z"]),
            st.sampled_from([b"", b"c1", b"c2"]),
            st.integers(0, 3),  # replicas that it has been to
            st.booleans(),  # whether its answer has begun
            st.booleans(),  # whether where it goes fails
        ),
        max_size=12,
    ),
)
def test_no_table_and_no_request_sends_data_outside_that_stays_inside(
    rows: list[ReplicaRow], traffic: dict[str, int], affinity: bool, asks: list[Any]
) -> None:
    lane = lane_of(*rows, traffic=traffic, affinity=affinity)
    for now, (inside, pinned, name, tried, begun, fails) in enumerate(asks):
        exchange = asking(lane, inside, pinned, name)
        exchange.tried = tuple(r.id for r in rows[:tried])
        if begun:
            exchange.ids, exchange.revision = bytearray(4), "a"
            for any_of_them in lane.targets:
                any_of_them.resumes = True
        target = lane.pick(exchange, float(now))
        if target is None:
            assert not lane.fits(exchange, float(now))
            continue
        assert not (inside and target.row.outside)
        assert not pinned or target.row.revision == pinned
        assert not begun or target.row.revision == "a"
        assert lane.barred(exchange) is None
        target.take()
        if fails:
            target.failed(float(now))


def test_a_request_keeps_to_its_revision_while_that_is_there_however_busy() -> None:
    lane = lane_of(row("a0", "a"), row("b0", "b", max_running=1), traffic={"a": 0, "b": 100})
    busy = lane.pick(asking(lane), 0.0)
    assert busy is not None
    assert busy.row.id == "b0"
    busy.take()
    waits = asking(lane)
    assert lane.pick(waits, 0.0) is None
    assert not lane.fits(waits, 0.0)
    busy.failed(0.0)  # it cannot be reached: now none of b is there
    other = lane.pick(waits, 0.0)
    assert other is not None
    assert other.row.id == "a0"


@pytest.mark.parametrize("first", ["question {}", "question {} " + "x" * 5000])
def test_a_conversation_without_a_name_stays_with_its_revision_whatever_system_prompt_it_shares(first: str) -> None:
    lane = lane_of(row("a0", "a"), row("b0", "b"), traffic={"a": 50, "b": 50}, affinity=True)

    def goes(n: int, turns: int) -> str:
        said: list[dict[str, Any]] = [{"role": "system", "content": "s" * 3000}]
        for turn in range(turns):
            said += [{"role": "user", "content": first.format(n) if not turn else f"and {turn}?"}]
            said += [{"role": "assistant", "content": f"answer {turn}"}] if turn < turns - 1 else []
        body = json.dumps({"model": "m", "temperature": turns / 10, "messages": said, "stream": True}).encode()
        target = lane.pick(asking(lane, body=body), 0.0)
        assert target is not None
        return target.row.revision

    began = [goes(n, 1) for n in range(40)]
    assert min(Counter(began).values()) >= 8
    assert [goes(n, 2) for n in range(40)] == began
    assert [goes(n, 5) for n in range(40)] == began


@pytest.mark.parametrize(
    "body", [b"{}", b'{"messages": [{"role": "user", "content": "hi"}]}', b'{"user": "u", "prompt": "' + b"x" * 4000]
)
def test_who_says_little_or_nothing_belongs_to_no_conversation(body: bytes) -> None:
    assert first_words(body, 7) is None


def test_a_pool_is_split_by_its_members_revisions() -> None:
    member = {"m": "a", "other": "z"}
    lane = lane_of(row("p0", "pool", members=member), row("p1", "pool", members={**member, "m": "b"}))
    lane.adopt(replace(lane.row, traffic={"a": 0, "b": 100}))
    target = lane.pick(asking(lane), 0.0)
    assert target is not None
    assert target.row.id == "p1"


# ------------------------------------------------------------------------------------------------ through the gateway


def change(running: Running, *rows: dict[str, Any], **deployment: Any) -> None:
    """Install the table in force with other fields in its replicas and its deployment; fewer rows, fewer replicas."""
    table = running.door.table
    replicas = tuple(replace(r, **more) for r, more in zip(table.fast.replicas, rows, strict=False))
    deployments = tuple(replace(d, **deployment) for d in table.slow.deployments)
    slow = replace(table.slow, deployments=deployments)
    running.install(Table(fast=Fast(version=2, replicas=replicas), slow=slow))


def pin(revision: str) -> bytes:
    return AUTH + b"x-neaptide-revision: " + revision.encode() + b"\r\n"


A, B = {"revision": "a"}, {"revision": "b"}
OUT: dict[str, Any] = {"outside": True}
IN: dict[str, Any] = {}


def test_a_hundred_requests_have_the_shares_and_the_rows_say_which_revision_answered() -> None:
    async def main() -> None:
        async with serving(reply_json, reply_json, reply_json) as (running, replicas):
            change(running, A, A, B, traffic={"a": 90, "b": 10})
            client = await running.connect()
            for _ in range(100):
                await client.send(post(chat()))
                assert (await client.answer()).status == 200
            assert len(replicas[2].asked) == 10
            assert Counter(row.revision for row in running.journal.rows) == {"a": 90, "b": 10}

    run(main())


def test_a_client_may_name_the_revision_and_one_without_a_share_gets_nothing_else() -> None:
    async def main() -> None:
        async with serving(reply_json, reply_json) as (running, replicas):
            change(running, A, B, traffic={"a": 100, "b": 0})
            for _ in range(4):
                assert (await running.ask(post(chat()))).status == 200
            assert (await running.ask(post(chat(), extra=pin("b")))).status == 200
            assert [len(r.asked) for r in replicas] == [4, 1]
            assert running.row.revision == "b"
            change(running, {"state": "draining"}, {}, traffic={"a": 100, "b": 0})
            assert (await running.ask(post(chat()))).status == 200  # nothing else is there
            assert len(replicas[1].asked) == 2

    run(main())


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("nosuch", 404, "revision_not_found"), ("a b", 400, "invalid_revision"), ("x" * 161, 400, "invalid_revision")],
)
def test_a_revision_that_does_not_exist_is_refused_at_once(name: str, status: int, code: str) -> None:
    async def main() -> None:
        async with serving(reply_json) as (running, _):
            change(running, A)
            answer = await running.ask(post(chat(), extra=pin(name)))
            assert (answer.status, answer.code) == (status, code)
            assert running.row.outcome == "refused"

    run(main())


def test_who_waits_for_a_busy_revision_holds_up_nobody_of_another() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(reply_json, holding(release)) as (running, replicas):
            change(running, A, B | {"max_running": 1}, traffic={"a": 50, "b": 50})
            held = asyncio.create_task(running.ask(post(chat(), extra=pin("b"))))
            await until(lambda: replicas[1].running == 1)
            waits = asyncio.create_task(running.ask(post(chat(), extra=pin("b"))))
            line = running.door.lanes["m"].line
            await until(lambda: line.waiting == 1)
            for _ in range(3):
                assert (await running.ask(post(chat(), extra=pin("a")))).status == 200
            assert line.waiting == 1
            release.set()
            assert {(await task).status for task in (held, waits)} == {200}
            assert [len(r.asked) for r in replicas] == [3, 2]

    run(main())


def test_a_retry_stays_with_its_revision() -> None:
    async def main() -> None:
        async with serving(failing(1), reply_json, reply_json) as (running, replicas):
            change(running, B, B, A, traffic={"a": 0, "b": 100})
            while not replicas[0].asked:
                assert (await running.ask(post(chat()))).status == 200
            assert not replicas[2].asked
            assert running.row.revision == "b"

    run(main())


def failing(times: int) -> Behaviour:
    async def behave(replica: FakeReplica, reader: Any, writer: asyncio.StreamWriter, asked: Any) -> None:
        status = 503 if len(replica.asked) <= times else 200
        writer.write(answer_bytes(COMPLETION, status=status))
        await writer.drain()

    return behave


def test_an_answer_goes_on_at_its_own_revision_whatever_the_shares_have_become() -> None:
    async def main() -> None:
        async with linked(3, hello=SAYS, replica={"token": "boot"}) as (running, replicas):
            change(running, A, A, B, traffic={"a": 100, "b": 0})
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            await until(lambda: any(r.requests for r in replicas))
            (first,) = [r for r in replicas if r.requests]
            first.requests[0].token(event("a"), (97,))
            await client.head()
            assert await client.chunk() == event("a")
            change(running, A, A, B, traffic={"a": 0, "b": 100})
            first.cut()
            (second,) = [r for r in replicas[:2] if r is not first]
            more = await opened(second)
            more.end(event(None, "stop") + DONE, finish="stop", output_tokens=0)
            assert (await client.answer_rest()).endswith(DONE)
            assert running.row.revision == "a"

    run(main())


def test_a_named_conversation_stays_with_its_replica_while_that_can_take_it_and_moves_when_it_cannot() -> None:
    async def main() -> None:
        named = AUTH + b"x-neaptide-conversation: tide\r\n"
        two = (reply_json, reply_json)
        async with serving(*two, deployment={"affinity": True}) as (running, replicas):
            for turn in range(4):
                assert (await running.ask(post(chat(user=f"named{turn}"), extra=named))).status == 200
                assert (await running.ask(post(conversation("other", 2 + turn)))).status == 200
            counts = [sum("named" in str(a.json) for a in replica.asked) for replica in replicas]
            assert sorted(counts) == [0, 4]
            home = counts.index(4)
            change(running, *({"state": "draining" if at == home else "ready"} for at in range(2)))
            assert (await running.ask(post(chat(user="named4"), extra=named))).status == 200
            assert "named4" in str(replicas[1 - home].asked[-1].json)
            change(running, {"state": "ready"}, {"state": "ready"})  # its home is where it was last
            assert (await running.ask(post(chat(user="named5"), extra=named))).status == 200
            assert "named5" in str(replicas[1 - home].asked[-1].json)

    run(main())


# ------------------------------------------------------------------------------------------------ inside


def test_where_all_replicas_are_outside_a_key_whose_data_stays_inside_is_told_so_at_once() -> None:
    async def main() -> None:
        async with serving(reply_json, **KEYS) as (running, replicas):
            change(running, OUT)
            answer = await running.ask(post(chat(), extra=ASKS_INSIDE))
            assert (answer.status, answer.code) == (403, "data_class")
            assert "inside" in answer.json["error"]["message"]
            assert (await running.ask(post(chat()))).status == 200
            assert len(replicas[0].asked) == 1

    run(main())


def test_data_that_stays_inside_waits_for_a_replica_there_and_holds_up_nobody() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), reply_json, **KEYS) as (running, replicas):
            change(running, IN | {"max_running": 1}, OUT)
            asks = [asyncio.create_task(running.ask(post(chat(), extra=ASKS_INSIDE))) for _ in range(2)]
            await until(lambda: replicas[0].running == 1 and running.door.lanes["m"].line.waiting == 1)
            for _ in range(3):
                assert (await running.ask(post(chat()))).status == 200
            assert len(replicas[1].asked) == 3
            release.set()
            assert [(await task).status for task in asks] == [200, 200]
            assert [len(r.asked) for r in replicas] == [2, 3]

    run(main())


def test_a_retry_of_what_stays_inside_never_goes_outside() -> None:
    async def main() -> None:
        async with serving(failing(100), reply_json, **KEYS) as (running, replicas):
            change(running, IN, OUT)
            answer = await running.ask(post(chat(), extra=ASKS_INSIDE))
            assert answer.status == 503
            assert len(replicas[0].asked) == 3
            assert not replicas[1].asked

    run(main())


def test_who_waits_for_what_the_table_has_no_more_is_told_at_once() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), reply_json, **KEYS) as (running, replicas):
            change(running, IN | {"max_running": 1} | A, OUT | A)
            held = asyncio.create_task(running.ask(post(chat(), extra=ASKS_INSIDE)))
            await until(lambda: replicas[0].running == 1)
            waits = asyncio.create_task(running.ask(post(chat(), extra=ASKS_INSIDE)))
            await until(lambda: running.door.lanes["m"].line.waiting == 1)
            change(running, OUT | {"max_running": 1}, OUT)
            assert (await waits).code == "data_class"
            release.set()
            assert (await held).status == 200

    run(main())
