"""A stream outlives a replica that somebody else runs: another that continues text goes on, and nothing shows it."""

from __future__ import annotations

import asyncio
import json
import re
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from neaptide.config import parse
from neaptide.fleet.static import remote_rows
from neaptide.link import Hello
from neaptide.table import Fast, ReplicaRow, Table
from tests.fake_link import FakeLinkReplica
from tests.gateway_kit import (
    EVENT_HEAD,
    Answer,
    Asked,
    FakeReplica,
    answer_bytes,
    chat,
    chunk,
    event,
    gateway,
    post,
    run,
    serving,
    table,
    until,
)
from tests.test_gateway_link import opened

TEXT = 'the "tide" é 船 rises\n\n  and 😀 falls [DONE] at \\n noon, data: {} and ends.'
TOKENS = re.findall(r"\s*\S+", TEXT)
PROMPT = 7  # tokens of what the client says
CONTINUES = {"replica": {"resumes": True}}
ASKS_USAGE = {"stream_options": {"include_usage": True}}
DONE = b"data: [DONE]\n\n"


@dataclass
class Engine:
    """A small vLLM: says TEXT, goes on with what it is given, and dies after `lives` tokens by `dying`."""

    name: str = "a"
    lives: int | None = None
    dying: Callable[[Engine, Writer], Awaitable[None]] | None = None
    trims: bool = True  # its chat template strips what it is given to go on from
    whole: list[str] = field(default_factory=lambda: TOKENS)
    holds: asyncio.Event | None = None  # it waits for this where it would die
    held: list[Engine] = field(default_factory=list)

    async def __call__(self, replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        await copy(self).answer(writer, asked.json)

    async def answer(self, writer: Writer, body: dict[str, Any]) -> None:
        begun = self.given(body)
        left = re.findall(r"\s*\S+", "".join(self.whole)[len(begun) :]) if begun else self.whole
        prompt = PROMPT + len(re.findall(r"\s*\S+", begun))
        most = body.get("max_tokens") or len(left)
        self.chat = "messages" in body
        writer.write(EVENT_HEAD)
        if self.chat:
            await self.say(writer, {"role": "assistant", "content": ""})
        for said, token in enumerate(left[:most]):
            if said == self.lives:
                await self.end(writer)
            await self.say(writer, {"content": token})
        if self.lives == min(most, len(left)):
            await self.end(writer)
        await self.say(writer, {}, "length" if most < len(left) else "stop")
        if self.lives == -1:
            await self.end(writer)
        if (body.get("stream_options") or {}).get("include_usage"):
            output = min(most, len(left))
            counted = {"prompt_tokens": prompt, "completion_tokens": output}
            writer.write(chunk(self.event([], {**counted, "total_tokens": prompt + output})))
        writer.write(chunk(DONE) + b"0\r\n\r\n")
        await writer.drain()

    def given(self, body: dict[str, Any]) -> str:
        if "prompt" in body:
            return str(body["prompt"]).removeprefix("hello")
        last = body["messages"][-1]
        if last["role"] != "assistant":
            return ""
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
        text = last["content"].rstrip() if self.trims else last["content"]
        assert "".join(self.whole).startswith(text)
        return str(text)

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        row = {"id": f"cmpl-{self.name}", "object": kind, "created": ord(self.name), "model": f"model-{self.name}"}
        more = {"usage": usage} if usage else {}
        return b"data: " + json.dumps({**row, "choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"

    def piece(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return self.event([{"index": 0, **said, "finish_reason": finish}])

    async def say(self, writer: Writer, delta: dict[str, Any], finish: str | None = None) -> None:
        writer.write(chunk(self.piece(delta, finish)))
        await writer.drain()
        await asyncio.sleep(0)

    async def end(self, writer: Writer) -> None:
        if self.holds is not None:
            self.held.append(self)
            await self.holds.wait()
            return
        await (self.dying or at_a_boundary)(self, writer)
        await writer.drain()
        writer.close()
        raise ConnectionError("it died")


async def at_a_boundary(engine: Engine, writer: Writer) -> None:
    """Between two events."""


async def in_an_event(engine: Engine, writer: Writer) -> None:
    writer.write(chunk(engine.piece({"content": " never whole"})[:60]))


async def in_a_chunk(engine: Engine, writer: Writer) -> None:
    writer.write(chunk(engine.piece({"content": " never whole"}))[:70])


async def with_an_error_event(engine: Engine, writer: Writer) -> None:
    error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
    writer.write(chunk(b"data: " + json.dumps(error).encode() + b"\n\n") + chunk(DONE) + b"0\r\n\r\n")


async def as_if_it_had_ended(engine: Engine, writer: Writer) -> None:
    writer.write(b"0\r\n\r\n")


DEATHS = [at_a_boundary, in_an_event, in_a_chunk, with_an_error_event, as_if_it_had_ended]


def said(answer: Answer) -> list[dict[str, Any]]:
    """Its events; each of them whole, [DONE] the last and only there."""
    parts = [p for p in answer.body.split(b"\n\n") if p and not p.startswith(b":")]
    assert parts[-1] == b"data: [DONE]", answer.body[-300:]
    return [json.loads(p.removeprefix(b"data: ")) for p in parts[:-1]]


def told(events: list[dict[str, Any]]) -> str:
    choices = [c for e in events for c in e["choices"]]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


def finishes(events: list[dict[str, Any]]) -> list[str]:
    return [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]


@pytest.mark.parametrize("dying", DEATHS)
@pytest.mark.parametrize("lives", [0, 1, 5, len(TOKENS) - 1])
def test_wherever_a_replica_dies_the_client_reads_one_whole_answer(
    dying: Callable[[Engine, Writer], Awaitable[None]], lives: int
) -> None:
    async def main() -> None:
        async with serving(Engine("a", lives, dying), Engine("b"), **CONTINUES) as (running, (first, second)):
            events = said(await running.ask(post(chat(stream=True, **ASKS_USAGE))))
            if not first.asked:
                events = said(await running.ask(post(chat(stream=True, **ASKS_USAGE))))
            assert (told(events), finishes(events)) == (TEXT, ["stop"])
            assert {(e["id"], e["created"], e["model"]) for e in events} == {("cmpl-a", ord("a"), "model-a")}
            assert sum("role" in c["delta"] for e in events for c in e["choices"]) == 1
            counts = {"prompt_tokens": PROMPT, "completion_tokens": len(TOKENS)}
            assert [e["usage"] for e in events if e.get("usage")] == [{**counts, "total_tokens": PROMPT + len(TOKENS)}]
            row = running.row
            assert (row.outcome, row.prompt_tokens, row.output_tokens) == ("ok", PROMPT, len(TOKENS))
            assert [(a.replica, a.tokens) for a in row.attempts] == [("r0", lives), ("r1", len(TOKENS) - lives)]
            assert running.door.lanes["m"].metrics.resumes == 1
            assert len(second.asked[-1].json["messages"]) == (2 if lives else 1)

    run(main())


def test_a_client_that_did_not_ask_for_usage_sees_none() -> None:
    async def main() -> None:
        async with serving(Engine("a", 3, in_an_event), Engine("b"), **CONTINUES) as (running, _):
            for _ in range(2):
                events = said(await running.ask(post(chat(stream=True, max_tokens=6))))
                assert told(events) == "".join(TOKENS[:6])
                assert finishes(events) == ["length"]
                assert not any(e.get("usage") or not e["choices"] for e in events)
                assert (running.row.prompt_tokens, running.row.output_tokens) == (PROMPT, 6)

    run(main())


def test_a_completion_goes_on_from_its_prompt() -> None:
    async def main() -> None:
        async with serving(Engine("a", 3), Engine("b"), **CONTINUES) as (running, (first, second)):
            body = {"model": "m", "prompt": "hello", "stream": True, "max_tokens": 8, "min_tokens": 5}
            while not first.asked:
                events = said(await running.ask(post(body, "/v1/completions")))
            assert (told(events), finishes(events)) == ("".join(TOKENS[:8]), ["length"])
            more = second.asked[-1].json
            assert (more["prompt"], more["max_tokens"], more["min_tokens"]) == ("hello" + "".join(TOKENS[:3]), 5, 2)
            assert running.row.output_tokens == 8

    run(main())


SPACED = ["a", "b\n", "  ", "c", "\n", "\n", "d"]


@pytest.mark.parametrize("lives", range(1, len(SPACED)))
def test_white_space_that_a_template_would_strip_is_told_once(lives: int) -> None:
    def tokens(begun: str) -> list[str]:
        """What remains, in pieces of its own."""
        left = "".join(SPACED)[len(begun) :]
        return [left[: len(left) - len(left.lstrip())], *left.lstrip()]

    class Spaced(Engine):
        async def answer(self, writer: Writer, body: dict[str, Any]) -> None:
            begun, self.chat = self.given(body), True
            assert begun == begun.rstrip()
            writer.write(EVENT_HEAD)
            await self.say(writer, {"role": "assistant", "content": ""})
            for at, token in enumerate(tokens(begun) if begun else SPACED):
                if at == self.lives:
                    await self.end(writer)
                await self.say(writer, {"content": token})
            await self.say(writer, {}, "stop")
            writer.write(chunk(DONE) + b"0\r\n\r\n")

    async def main() -> None:
        engines = Spaced("a", lives, whole=SPACED), Spaced("b", whole=SPACED)
        async with serving(*engines, **CONTINUES) as (running, (first, _)):
            while not first.asked:
                answer = await running.ask(post(chat(stream=True, **ASKS_USAGE)))
            assert told(said(answer)) == "".join(SPACED)

    run(main())


def test_an_answer_whose_replica_died_after_its_end_is_whole() -> None:
    async def main() -> None:
        async with serving(Engine("a", -1), **CONTINUES) as (running, (replica,)):
            events = said(await running.ask(post(chat(stream=True, **ASKS_USAGE))))
            assert (told(events), finishes(events)) == (TEXT, ["stop"])
            assert (running.row.outcome, running.row.finish) == ("ok", "stop")
            assert running.row.output_tokens == len(TOKENS)
            assert len(replica.asked) == 1

    run(main())


def test_an_answer_that_had_all_its_tokens_asks_nobody_for_more() -> None:
    async def main() -> None:
        async with serving(Engine("a", 5), **CONTINUES) as (running, (replica,)):
            events = said(await running.ask(post(chat(stream=True, max_tokens=5))))
            assert (told(events), finishes(events)) == ("".join(TOKENS[:5]), ["length"])
            assert {e["id"] for e in events} == {"cmpl-a"}
            assert (running.row.outcome, running.row.finish, running.row.output_tokens) == ("ok", "length", 5)
            assert len(replica.asked) == 1

    run(main())


def test_16_streams_go_on_while_replica_after_replica_is_killed() -> None:
    async def main() -> None:
        gates = [asyncio.Event() for _ in range(3)]
        engines = [Engine(n, 4, holds=g) for n, g in zip("abc", gates, strict=True)]
        async with serving(*engines, **CONTINUES) as (running, replicas):
            body = post(chat(stream=True, **ASKS_USAGE))
            asks = [asyncio.create_task(running.ask(body)) for _ in range(16)]
            await until(lambda: sum(len(e.held) for e in engines) == 16)
            for at, replica in enumerate(replicas[:2]):
                moved = replica.running
                before = sum(len(e.held) for e in engines[at + 1 :])
                await replica.stop()
                await until(lambda b=before + moved, at=at: sum(len(e.held) for e in engines[at + 1 :]) == b)
            gates[2].set()
            answers = [said(await ask) for ask in asks]
            assert [told(events) for events in answers] == [TEXT] * 16
            assert all(len({e["id"] for e in events}) == 1 for events in answers)
            rows = running.journal.rows
            assert {(r.outcome, r.prompt_tokens, r.output_tokens) for r in rows} == {("ok", PROMPT, len(TOKENS))}
            assert {sum(a.tokens for a in r.attempts) for r in rows} == {len(TOKENS)}
            assert max(len(r.attempts) for r in rows) == 3

    run(main())


# --- where it cannot go on


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2}, {"seed": 1}, {"logprobs": True}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1},
        {"response_format": {"type": "json_object"}}, {"guided_regex": "a+"}, {"stop": ["船 rises"]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the"}]},
    ],
)  # fmt: skip
def test_what_the_text_does_not_tell_ends_the_stream_with_an_error_event(fields: dict[str, Any]) -> None:
    async def main() -> None:
        class Begins(Engine):
            def given(self, body: dict[str, Any]) -> str:
                return ""

        async with serving(Begins("a", 4), Begins("b", 4), **CONTINUES) as (running, (first, second)):
            answer = await running.ask(post(chat(**{"stream": True, **fields})))
            assert b'"replica_broke_off"' in answer.body
            assert answer.body.startswith(b"data: ")
            assert len(first.asked) + len(second.asked) == 1
            assert (running.row.outcome, running.row.output_tokens) == ("error", 4)

    run(main())


@pytest.mark.parametrize("delta", [{"tool_calls": [{"index": 0}]}, {"reasoning_content": "so"}])
def test_what_is_more_than_text_ends_the_stream_with_an_error_event(delta: dict[str, Any]) -> None:
    async def main() -> None:
        async def dying(engine: Engine, writer: Writer) -> None:
            writer.write(chunk(engine.piece(delta)))

        async with serving(Engine("a", 3, dying), Engine("b", 3, dying), **CONTINUES) as (running, (first, second)):
            answer = await running.ask(post(chat(stream=True)))
            assert b'"replica_broke_off"' in answer.body
            assert len(first.asked) + len(second.asked) == 1

    run(main())


def test_where_the_operator_does_not_say_so_nothing_is_resumed() -> None:
    async def main() -> None:
        async with serving(Engine("a", 3), Engine("b", 3)) as (running, (first, second)):
            answer = await running.ask(post(chat(stream=True)))
            assert b'"replica_broke_off"' in answer.body
            assert len(first.asked) + len(second.asked) == 1

    run(main())


def test_what_another_replica_says_after_a_refusal_is_not_taken_for_nothing() -> None:
    async def busy(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(answer_bytes(b"{}", 503))
        await writer.drain()

    async def main() -> None:
        async with serving(Engine("a", 3), busy) as (running, (_, second)):
            a, b = running.door.table.fast.replicas
            running.install(replace(running.door.table, fast=Fast(version=2, replicas=(a, replace(b, resumes=True)))))
            while not second.asked:
                answer = await running.ask(post(chat(stream=True)))
            assert [a.replica for a in running.row.attempts] == ["r1", "r0"]
            assert b'"replica_broke_off"' in answer.body
            assert answer.body.count(b'"role"') == 1

    run(main())


def test_a_replica_that_refuses_to_go_on_is_passed_over() -> None:
    async def refuses(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(answer_bytes(b'{"error":{"message":"no such field"}}', 400))
        await writer.drain()

    async def main() -> None:
        async with serving(Engine("a", 3), refuses, Engine("c"), **CONTINUES) as (running, (first, second, _)):
            for _ in range(6):
                answer = await running.ask(post(chat(stream=True)))
                if b"no such field" not in answer.body:  # a request of its own is told the refusal
                    assert told(said(answer)) == TEXT
            assert first.asked
            assert any("continue_final_message" in a.json for a in second.asked)

    run(main())


def test_a_replica_that_comes_back_goes_on_with_its_own() -> None:
    async def main() -> None:
        async with serving(Engine("a", 3, in_an_event), **CONTINUES) as (running, (replica,)):
            assert told(said(await running.ask(post(chat(stream=True))))) == TEXT
            deaths = (len(TOKENS) - 1) // 3
            assert len(replica.asked) == 1 + deaths == 1 + running.door.lanes["m"].metrics.resumes
            assert [a.tokens for a in running.row.attempts][:-1] == [3] * deaths

    run(main())


def test_a_stream_that_nobody_goes_on_with_ends_with_an_error_event() -> None:
    async def main() -> None:
        servers: list[FakeReplica] = []

        async def for_good(engine: Engine, writer: Writer) -> None:
            servers[0]._server.close()  # type: ignore[union-attr]
            await in_an_event(engine, writer)

        options = {"deployment": {"max_wait_s": 0.1}, **CONTINUES}
        async with serving(Engine("a", 3, for_good), **options) as (running, replicas):
            servers += replicas
            answer = await running.ask(post(chat(stream=True)))
            *events, last = answer.body.strip().split(b"\n\n")
            assert b'"error"' in last
            assert b"never whole" not in answer.body
            assert told([json.loads(e.removeprefix(b"data: ")) for e in events]) == "".join(TOKENS[:3])
            assert (running.row.outcome, running.row.output_tokens) == ("error", 3)

    run(main())


def test_a_request_of_which_two_replicas_in_a_row_die_without_a_token_is_given_to_no_third() -> None:
    async def main() -> None:
        engines = [Engine(n, 0) for n in "abc"]
        async with serving(*engines, **CONTINUES) as (running, replicas):
            answer = await running.ask(post(chat(stream=True)))
            assert b'"replica_broke_off"' in answer.body
            assert sum(len(r.asked) for r in replicas) == 2
            assert [a.tokens for a in running.row.attempts] == [0, 0]

    run(main())


def test_an_answer_longer_than_what_is_kept_is_passed_on_and_not_resumed() -> None:
    async def main() -> None:
        words = ["x" * 999 + " "] * 80
        async with serving(Engine("a", 79, whole=words), Engine("b", 79, whole=words), **CONTINUES) as (running, both):
            answer = await running.ask(post(chat(stream=True)))
            assert b'"replica_broke_off"' in answer.body
            assert sum(len(r.asked) for r in both) == 1

    run(main())


@pytest.mark.parametrize("began", ["own", "other"])
def test_a_text_never_goes_on_at_a_replica_of_ours_nor_ids_at_one_of_others(began: str, tmp_path: Path) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        engine = Engine("a", 3, holds=gate)
        replica = await FakeReplica(engine).start()
        hello = Hello(token="boot", role="replica", name="r", resumes=True)
        ours = await FakeLinkReplica(tmp_path / "own.link", 100, hello).start()
        remote = ReplicaRow(id="other", model="m", endpoint=f"http://127.0.0.1:{replica.port}/v1", resumes=True)
        own = ReplicaRow(id="own", model="m", endpoint=f"link:{ours.path}", token="boot")
        first, second = (own, remote) if began == "own" else (remote, own)
        async with gateway(with_replicas(1, first, replace(second, state="draining"))) as running:
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            if began == "own":
                (await opened(ours)).token(event("a"), (97,))
            assert (await client.head())[0] == 200
            await client.chunk()
            running.install(with_replicas(2, first, second))
            await until(lambda: all(t.connected and not t.draining for t in running.door.targets.values()))
            await (ours.stop() if began == "own" else replica.stop())
            await until(lambda: running.door.lanes["m"].line.waiting)
            assert len(replica.asked) + len(ours.requests) == 1
        gate.set()
        await replica.stop()
        await ours.stop()

    run(main())


def with_replicas(version: int, *rows: ReplicaRow) -> Table:
    return replace(table([]), fast=Fast(version=version, replicas=rows))


def test_the_configuration_says_which_replicas_go_on() -> None:
    text = "models: {m: {replicas: [{url: 'http://a/v1', resumes: true}, {url: 'http://b/v1'}]}}"
    model = parse(text, "x").models["m"]
    assert [row.resumes for row in remote_rows("m", model, "")] == [True, False]
