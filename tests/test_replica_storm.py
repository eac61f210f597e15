"""Any order of what gateways may do, against service, link and echo engine in one process: every stream ends once,
nothing is lost or doubled, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from neaptide import link
from tests.replica_stage import Stage

gateways = st.integers(0, 1)
actions = st.one_of(
    st.tuples(st.just("open"), gateways, st.integers(0, 60), st.booleans(), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 400)),
    st.tuples(st.just("credit"), gateways, st.integers(1, 3)),
    st.tuples(st.just("abort"), gateways, st.integers(1, 4)),
    st.tuples(st.just("drain")),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(actions, max_size=40), st.integers(1, 4), st.booleans())
@example([("open", 0, 2, True, False), ("step", 400), ("step", 200), ("credit", 0, 1), ("step", 1)], 1, False)
@example([("open", 0, 2, True, False), ("step", 400), ("step", 200), ("abort", 0, 1)], 1, False)
@example([("open", 1, 9, False, True), ("open", 1, 9, True, True), ("step", 90), ("drain",)], 1, True)
def test_whatever_gateways_do_every_stream_ends_once_and_nothing_is_left(
    storm: list[Any], max_running: int, loses: bool
) -> None:
    async def play() -> None:
        stage = Stage(max_running)
        stage.connect()
        stage.connect()
        for name, *args in storm:
            if name == "open":
                stage.open(*args)
            elif name == "step":
                stage.step(*args)
            elif name == "credit":
                stage.to_all(args[0], link.CREDIT, link.pack_credit(40_000), args[1])
            elif name == "abort":
                stage.to_all(args[0], link.ABORT, b"", args[1])
            else:
                stage.service.drain()
            assert not any(wire.aborted for _, wire in stage.gateways)
        if loses:
            stage.lose(0)
        for _ in range(40):  # read everything to its end
            stage.step(250)
            for gateway in range(1 if loses else 0, 2):
                stage.to_all(gateway, link.CREDIT, link.pack_credit(1 << 20), 1)
        stage.check()
        for gateway, (_, wire) in enumerate(stage.gateways):
            assert (loses and gateway == 0) or all(heard.end is not None for heard in wire.heard.values())
        assert not stage.service.busy()
        assert not stage.engine.busy()
        load = stage.service.load()
        assert (load.running, load.waiting, load.free_kv_tokens) == (0, 0, 1024)
        assert stage.service.held.bytes == 0
        stage.service.stop()

    asyncio.run(play())
