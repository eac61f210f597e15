"""What a replica does when its engine, or its own code, fails one request: that one ends, the others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from neaptide.engine import pipe
from neaptide.engine.protocol import Emission
from neaptide.link import EndHeader
from tests.link_client import Heard
from tests.replica_stage import Stage


def play(act: Callable[[Stage], Any]) -> None:
    async def on_stage() -> None:
        stage = Stage(max_running=4)
        stage.connect()
        act(stage)
        stage.service.stop()

    asyncio.run(on_stage())


def say(stage: Stage, *emissions: Emission) -> None:
    stage.service.stepped(pipe.Stepped(list(emissions), stage.engine.free(), 0.01, 1))
    stage.service.changed()


def heard(stage: Stage, number: int) -> Heard:
    return stage.gateways[0][1].heard[number]


def end(stage: Stage, number: int) -> EndHeader:
    header = heard(stage, number).end
    assert header is not None
    return header


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_before_its_first_token_is_the_requests_fault(stream: bool) -> None:
    def act(stage: Stage) -> None:
        stage.open(0, 1, stream, False)
        say(stage, Emission(id=1, finish="error", error="no such thing"))
        assert (end(stage, 1).status, end(stage, 1).error, end(stage, 1).retryable) == (400, "engine_refused", False)
        assert json.loads(heard(stage, 1).last)["error"]["message"] == "no such thing"

    play(act)


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_what_the_engine_ends_in_the_middle_is_an_error_event_without_done(finish: str) -> None:
    def act(stage: Stage) -> None:
        stage.open(0, 1, True, False)
        stage.step(3)
        say(stage, Emission(id=1, finish=finish))
        assert (end(stage, 1).status, end(stage, 1).finish, end(stage, 1).error) == (502, "error", "engine_error")
        assert end(stage, 1).output_tokens == 3
        assert heard(stage, 1).events[-1]["error"]["code"] == "engine_error"

    play(act)


def test_an_answer_that_cannot_be_made_fails_alone() -> None:
    def act(stage: Stage) -> None:
        stage.open(0, 1, True, False)
        stage.open(0, 1, True, False)
        say(stage, Emission(id=1, token_ids=["no id"]), Emission(id=2, token_ids=[48]))  # type: ignore[list-item]
        assert (end(stage, 1).status, end(stage, 1).error) == (500, "internal_error")
        assert heard(stage, 2).end is None
        assert heard(stage, 2).ids == [48]

    play(act)


def test_a_request_for_a_draining_or_dead_replica_is_handed_back() -> None:
    def act(stage: Stage) -> None:
        stage.service.drain()
        stage.open(0, 1, True, False)
        assert (end(stage, 1).status, end(stage, 1).retryable) == (503, True)
        stage.service.engine_gone("test")
        stage.open(0, 1, True, False)
        assert (end(stage, 2).status, end(stage, 2).retryable) == (503, True)
        assert stage.service.load().draining

    play(act)


def test_an_engine_silent_over_work_is_noticed() -> None:
    def act(stage: Stage) -> None:
        assert stage.service.stuck_s(1e9) == 0.0
        stage.open(0, 1, True, False)
        assert stage.service.stuck_s(1e9) > 60.0

    play(act)
