"""The truth experiment: which requests are sent, and that they are sent on time."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest

from bench import trace
from bench.kit import BenchError
from bench.openloop import Client
from neaptide.simulate.arrivals import Requests

MODEL = trace.Model("guide", context_tokens=1000, vocab_size=8192)


def recorded(seconds: float = 3600.0, rps: float = 5.0) -> trace.Asked:
    random = np.random.default_rng(0)
    t_s = np.sort(random.uniform(7.0, 7.0 + seconds, int(seconds * rps)))
    tokens = random.integers(1, 3000, (2, len(t_s)))
    return trace.fitted(Requests(t_s=t_s, in_tokens=tokens[0], out_tokens=tokens[1]), MODEL)


def test_lengths_are_clipped_to_the_context_and_the_first_arrival_is_at_zero() -> None:
    asked = recorded()
    assert asked.t_s[0] == 0.0
    assert (asked.in_tokens + asked.out_tokens).max() < MODEL.context_tokens
    assert min(asked.in_tokens.min(), asked.out_tokens.min()) >= 1


@pytest.mark.parametrize("rps", [1.0, 4.0, 12.0, 25.0])
def test_a_stretch_has_the_rate_that_is_wanted_however_it_compares_with_the_trace(rps: float) -> None:
    part = trace.stretch(recorded(), 600.0, rps, seed=1)
    assert len(part.t_s) / 600 == pytest.approx(rps, rel=0.15)
    assert part.t_s[0] == 0.0
    assert part.t_s[-1] <= 600
    assert (np.diff(part.t_s) >= 0).all()


def test_a_seed_says_which_stretch_it_is() -> None:
    whole = recorded()
    one, again, other = (trace.stretch(whole, 300.0, 2.0, seed) for seed in (1, 1, 2))
    assert one.t_s.tolist() == again.t_s.tolist()
    assert one.t_s.tolist() != other.t_s.tolist()


def test_more_than_all_of_the_trace_is_refused() -> None:
    with pytest.raises(BenchError, match="laid over itself"):
        trace.stretch(recorded(), 600.0, 100.0, seed=0)


def test_a_stretch_without_a_request_is_refused() -> None:
    with pytest.raises(BenchError, match="more minutes"):
        trace.stretch(recorded(), 1.0, 1e-6, seed=0)


def test_prompts_are_random_ids_of_the_model_as_long_as_asked_for() -> None:
    asked = trace.some(recorded(), 5, seed=3)
    plan = trace.plan(asked, MODEL, 3, at_once=2)
    assert [len(prompt) for _, prompt, _ in plan["requests"]] == asked.in_tokens.tolist()
    assert all(256 <= id < 8192 for _, prompt, _ in plan["requests"] for id in prompt)
    assert plan["at_once"] == 2


# ------------------------------------------------------------------------------------------------ the client


class Server:
    """Answers completions with as many tokens as asked for, after `wait_s`; remembers how many were in flight."""

    def __init__(self, wait_s: float = 0.0, refuses: bool = False) -> None:
        self._wait_s, self._refuses = wait_s, refuses
        self.in_flight = self.most = 0
        self.connections: list[asyncio.Task[Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.append(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length is not None
                await self._answer(json.loads(await reader.readexactly(int(length[1]))), writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async def _answer(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(self._wait_s)
        self.in_flight -= 1
        if self._refuses:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")
            return
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        events = [{"choices": [{"text": "x", "finish_reason": None}], "usage": None}] * asked["max_tokens"]
        events += [
            {"choices": [{"text": "", "finish_reason": "length"}], "usage": None},
            {"choices": [], "usage": usage},
        ]
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def played(server: Server, plan: dict[str, Any]) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listening:
            told = await Client(listening.sockets[0].getsockname()[1], "key", plan).run()
            await asyncio.gather(*server.connections)
            return told

    return asyncio.run(run())


def plan_of(*requests: tuple[float, int, int], **more: object) -> dict[str, Any]:
    return {"model": "m", "requests": [[at_s, [300] * prompt, out] for at_s, prompt, out in requests], **more}


def test_requests_are_sent_at_their_times_whether_or_not_others_have_ended() -> None:
    server = Server(wait_s=0.2)
    told = played(server, plan_of((0.0, 3, 4), (0.01, 5, 6), (0.02, 7, 1)))
    assert server.most == 3
    rows = told["rows"]
    assert [row[0] for row in rows] == [0, 1, 2]
    assert [row[4:] for row in rows] == [[3, 4, ""], [5, 6, ""], [7, 1, ""]]
    for at_s, (_, sent_s, first_s, end_s, *_) in zip((0.0, 0.01, 0.02), rows, strict=True):
        assert at_s <= sent_s < first_s <= end_s
    assert told["cpu_s"] > 0


def test_a_closed_loop_keeps_its_number_in_flight_on_as_many_connections() -> None:
    server = Server(wait_s=0.01)
    told = played(server, plan_of((0.0, 3, 2), (0.0, 4, 2), at_once=3, seconds=0.3))
    assert server.most == len(server.connections) == 3
    assert len(told["rows"]) > 6


def test_refused_and_broken_requests_are_rows_with_an_error() -> None:
    refused = played(Server(refuses=True), plan_of((0.0, 1, 1)))
    assert refused["rows"][0][6].startswith("429: busy")
    nobody = asyncio.run(Client(1, "key", plan_of((0.0, 1, 1))).run())
    assert "no connection" in nobody["rows"][0][6]
