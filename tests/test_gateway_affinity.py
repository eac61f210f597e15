"""Prompts that begin alike go to the same replica, unless it is much more loaded; so do a session's requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from neaptide.gateway.affinity import KNOWN_BLOCKS, MATCH, SHORT_BYTES, Familiar, blocks_of, may_take
from tests.gateway_kit import AUTH, FakeReplica, Running, chat, post, reply_json, run, serving, until
from tests.test_gateway_http import holding

LONG = {"deployment": {"affinity": True}}


def conversation(name: str, turns: int, **more: Any) -> dict[str, Any]:
    """Each turn about a block and a half."""
    said = [{"role": "user", "content": f"{name} {turn} " + chr(97 + turn % 26) * 1500} for turn in range(turns)]
    return chat(**more) | {"messages": said}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


# ------------------------------------------------------------------------------------------------ blocks


def test_a_conversation_keeps_its_blocks_as_it_grows_whatever_stands_before_the_messages() -> None:
    first = blocks_of(body(model="m", messages=conversation("a", 3)["messages"]), 7)
    more = blocks_of(body(model="m", temperature=0.25, messages=conversation("a", 6)["messages"], stream=True), 7)
    assert len(first) >= 4
    assert more[: len(first)] == first
    other = blocks_of(body(model="m", messages=conversation("b", 3)["messages"]), 7)
    assert not set(other) & set(first)


def test_tools_with_a_parameter_called_prompt_are_not_its_beginning() -> None:
    tools = [{"type": "function", "function": {"name": "t", "parameters": {"prompt": "x" * 3000}}}]
    one = blocks_of(body(messages=conversation("a", 3)["messages"], tools=tools), 7)
    other = blocks_of(body(messages=conversation("b", 3)["messages"], tools=tools), 7)
    assert not set(one) & set(other)


def test_the_same_prompt_of_another_model_is_another_prompt() -> None:
    said = body(messages=conversation("a", 3)["messages"])
    assert not set(blocks_of(said, 7)) & set(blocks_of(said, 8))


def test_a_block_stands_for_all_before_it() -> None:
    """The same words after another beginning are another block."""
    tail = "z" * 6000
    one = blocks_of(body(prompt="a" * 2000 + tail), 7)
    other = blocks_of(body(prompt="b" * 2000 + tail), 7)
    assert not set(one) & set(other)


@pytest.mark.parametrize("short", [b"", b"{}", body(prompt="x" * 200), body(prompt="x" * (SHORT_BYTES - 20))])
def test_a_short_prompt_has_none(short: bytes) -> None:
    assert blocks_of(short, 7) == []


def test_a_beginning_that_is_known_at_half_of_a_prompt_attracts_it_and_a_system_prompt_does_not() -> None:
    familiar = Familiar()
    familiar.went([1, 2, 3, 4], "r0")
    familiar.went([1, 20, 30, 40], "r1")
    present = {"r0", "r1"}
    assert familiar.replica([1, 2, 3, 4, 5, 6], present) == "r0"
    assert familiar.replica([1, 20, 30], present) == "r1"
    assert MATCH == 0.5
    assert familiar.replica([1, 21, 31, 41], present) is None  # a quarter of it
    assert familiar.replica([1, 2, 3, 4], {"r1"}) is None  # where most of it went is gone


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    familiar = Familiar(most=10)
    familiar.went(range(8), "old")
    familiar.went(range(100, 108), "new")
    assert len(familiar) == 10
    assert familiar.replica([0], {"old"}) is None
    assert familiar.replica([100], {"new"}) == "new"
    assert KNOWN_BLOCKS > 0


def test_a_replica_much_more_loaded_than_the_least_is_left_alone() -> None:
    assert may_take(1, 0)
    assert not may_take(2, 0)
    assert may_take(16, 10)
    assert not may_take(17, 10)


# ------------------------------------------------------------------------------------------------ through the gateway


async def asks(running: Running, request: dict[str, Any], extra: bytes = AUTH) -> None:
    assert (await running.ask(post(request, extra=extra))).status == 200


def who(replicas: list[FakeReplica], name: str) -> list[int]:
    """How many requests of this conversation each one had."""
    return [sum(name in json.dumps(a.json) for a in replica.asked) for replica in replicas]


def test_a_conversation_stays_where_it_was_and_others_are_spread() -> None:
    async def main() -> None:
        async with serving(reply_json, reply_json, reply_json, **LONG) as (running, replicas):
            for turn in range(2, 7):
                names = ("red", "green", "blue")
                for name in (*names[turn % 3 :], *names[: turn % 3]):
                    await asks(running, conversation(name, turn))
            assert all(sorted(who(replicas, name)) == [0, 0, 5] for name in ("red", "green", "blue"))
            assert sorted(len(r.asked) for r in replicas) == [5, 5, 5]

    run(main())


def test_a_conversation_that_the_client_names_stays_too_however_short_its_prompts() -> None:
    async def main() -> None:
        async with serving(reply_json, reply_json, reply_json, **LONG) as (running, replicas):
            for i in range(6):
                await asks(running, chat(user=f"mine{i}"), AUTH + b"x-neaptide-conversation: abc\r\n")
                await asks(running, chat(user=f"other{i}"))
            assert sorted(who(replicas, "mine")) == [0, 0, 6]

    run(main())


def test_it_goes_elsewhere_where_its_replica_is_full_or_gone() -> None:
    async def main() -> None:
        release = asyncio.Event()
        two = (holding(release), holding(release))
        async with serving(*two, **LONG, replica={"max_running": 2}) as (running, replicas):
            tasks = []
            for i in range(4):
                tasks.append(asyncio.create_task(running.ask(post(conversation("red", 3)))))
                await until(lambda n=i + 1: sum(r.running for r in replicas) == n)
            assert [r.running for r in replicas] == [2, 2]
            release.set()
            assert {(await task).status for task in tasks} == {200}

    run(main())


def test_without_a_shared_cache_the_load_alone_decides() -> None:
    async def main() -> None:
        async with serving(reply_json, reply_json) as (running, replicas):
            for _ in range(6):
                await asks(running, conversation("red", 3))
            assert [len(r.asked) for r in replicas] == [3, 3]

    run(main())
