"""The gateway as a process: its table from control, its life from the supervisor, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI

from neaptide import link
from neaptide import table as tables
from neaptide.gateway.access import AccessLog, Line
from neaptide.gateway.follow import load_table, save_table
from neaptide.journal import decode
from neaptide.link import FETCH, GAUGES, HELLO, TABLE, FrameReader, Hello
from neaptide.specs import GatewaySpec
from neaptide.table import Delta, Gauges, Table
from tests.fake_link import FakeLinkReplica
from tests.gateway_kit import (
    EVENT_HEAD,
    KEY,
    PEPPER,
    Asked,
    Client,
    FakeReplica,
    chat,
    chunk,
    event,
    post,
    reply_by_body,
    run,
    table,
    until,
)
from tests.replica_process import ReplicaProcess

DONE = b"data: [DONE]\n\n"


class FakeControl:
    """Control's end of the channel, played by a test."""

    def __init__(self, path: Path, token: str = "boot") -> None:
        self.path, self.token = path, token
        self.fetches: list[dict[str, int]] = []
        self.gauges: list[Gauges] = []
        self.hellos: list[Hello] = []
        self.held = Table()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> FakeControl:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self.path.unlink(missing_ok=True)
        await asyncio.sleep(0)

    def send(self, delta: Delta) -> None:
        self._writers[-1].write(link.frame(0, TABLE, msgspec.json.encode(delta)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        frames = FrameReader()
        while data := await reader.read(65536):
            for f in frames.feed(data):
                if f.type == HELLO:
                    self.hellos.append(msgspec.json.decode(f.payload, type=Hello))
                    hello = Hello(token=self.token, role="control")
                    writer.write(link.frame(0, HELLO, msgspec.json.encode(hello)))
                elif f.type == FETCH:
                    self.fetches.append(json.loads(f.payload))
                    self.send(tables.whole(self.held))
                elif f.type == GAUGES:
                    self.gauges.append(msgspec.json.decode(f.payload, type=Gauges))


class Process:
    """`python -m neaptide.gateway` under a supervisor's pipe, in a directory of its own."""

    def __init__(self, directory: Path, **fields: Any) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        self.port = listener.getsockname()[1]
        read, self.lifeline = os.pipe()
        self.directory = directory
        inherited = [value for name, value in fields.items() if name == "counters_fd"]
        spec = GatewaySpec(
            id="gateway-0",
            epoch=1,
            listen_fd=listener.fileno(),
            control_path=str(directory / "control.sock"),
            table_path=str(directory / "table.json"),
            journal_dir=str(directory / "journal"),
            pepper=PEPPER,
            token="boot",
            access_log=str(directory / "access.log"),
            segment_bytes=1 << 20,
            **fields,
        )
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "neaptide.gateway"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(listener.fileno(), read, *inherited),
            env={**os.environ, "NEAPTIDE_LIFELINE": str(read)},
        )
        os.close(read)
        listener.close()
        assert self.popen.stdin is not None
        self.popen.stdin.write(msgspec.json.encode(spec))
        self.popen.stdin.close()

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(self, request: bytes) -> Any:
        client = await self.connect()
        await client.send(request)
        answer = await client.answer()
        client.close()
        return answer

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            while (await self.ask(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")).status != 200:
                await asyncio.sleep(0.01)

    def cut_lifeline(self) -> None:
        os.close(self.lifeline)
        self.lifeline = -1

    async def wait(self) -> int:
        return await asyncio.to_thread(self.popen.wait, 20)

    def rows(self) -> list[Any]:
        journal = self.directory / "journal"
        lines = [
            line
            for path in sorted(journal.glob("*.log"))
            for line in path.read_bytes().split(b"\n")
            if line.strip(b"\0")
        ]
        return [decode(line) for line in lines]

    def stop(self) -> str:
        if self.lifeline >= 0:
            os.close(self.lifeline)
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        assert self.popen.stderr is not None
        with self.popen.stderr as log:
            return log.read().decode()


@asynccontextmanager
async def started(stored: Table | None = None, **fields: Any) -> AsyncIterator[Process]:
    with tempfile.TemporaryDirectory(prefix="np") as directory:
        if stored is not None:
            save_table(Path(directory, "table.json"), stored)
        process = Process(Path(directory), **fields)
        try:
            yield process
        finally:
            log = process.stop()
            assert "Traceback" not in log, log


def stored_for(replica: FakeReplica) -> Table:
    return table([f"http://127.0.0.1:{replica.port}/v1"])


def test_it_serves_control_s_table_keeps_a_copy_and_reports():
    async def main() -> None:
        replica = await FakeReplica(reply_by_body).start()
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            control = await FakeControl(Path(directory, "control.sock")).start()
            control.held = table([])
            process = Process(Path(directory))
            await process.ready()
            assert (control.hellos[0].role, control.hellos[0].token, control.hellos[0].name) == (
                "gateway",
                "boot",
                "gateway-0",
            )
            assert control.fetches[0] == {"fast": 0, "slow": 0}

            ask = asyncio.create_task(process.ask(post(chat())))
            await until(
                lambda: (
                    control.gauges and "m" in control.gauges[-1].models and control.gauges[-1].models["m"].waiting == 1
                )
            )
            new = Table(fast=tables.Fast(version=2, replicas=stored_for(replica).fast.replicas), slow=control.held.slow)
            control.send(tables.difference(control.held, new))
            assert (await ask).status == 200
            await until(lambda: control.gauges[-1].models["m"].done == 1)
            assert (control.gauges[-1].fast, control.gauges[-1].replicas) == (2, {"r0": 0})

            control.held = new
            control.send(Delta(base_fast=77, fast=78, base_slow=1, slow=1))  # a gap: it asks for the whole
            await until(lambda: control.fetches[-1] == {"fast": 0, "slow": 0} and len(control.fetches) == 2)
            copy = Path(directory, "table.json")
            await until(lambda: load_table(copy) == new)
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600

            await control.stop()
            assert (await process.ask(post(chat()))).status == 200  # control is away
            control = await FakeControl(Path(directory, "control.sock")).start()
            control.held = new
            await until(lambda: control.fetches)
            assert control.fetches[0] == {"fast": 2, "slow": 1}
            await control.stop()
            assert "Traceback" not in process.stop()
        await replica.stop()

    run(main(), uv=False)


def test_a_stranger_at_control_s_socket_is_not_believed():
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            control = await FakeControl(Path(directory, "control.sock"), token="other").start()
            control.held = table([])
            process = Process(Path(directory))
            await until(lambda: len(control.hellos) >= 2)
            answer = await process.ask(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.status == 503
            await control.stop()
            assert "not control of this run" in process.stop()

    run(main(), uv=False)


def test_it_starts_from_its_copy_and_survives_a_damaged_one():
    async def main() -> None:
        replica = await FakeReplica(reply_by_body).start()
        async with started(stored_for(replica)) as process:
            await process.ready()
            assert (await process.ask(post(chat()))).status == 200
        for damaged in (b'{"fast": ', b'{"fast": {"version": "\xff"}}'):
            with tempfile.TemporaryDirectory(prefix="np") as directory:
                Path(directory, "table.json").write_bytes(damaged)
                process = Process(Path(directory))
                assert (await process.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
                assert "cannot be used" in process.stop()
        await replica.stop()

    run(main(), uv=False)


def test_sigterm_lets_a_stream_finish_and_ends_with_0():
    async def main() -> None:
        release = asyncio.Event()

        async def slowly(
            replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
        ) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")))
            await release.wait()
            writer.write(chunk(event("b") + DONE) + b"0\r\n\r\n")

        replica = await FakeReplica(slowly).start()
        async with started(stored_for(replica)) as process:
            await process.ready()
            client = await process.connect()
            await client.send(post(chat(stream=True)))
            await client.head()
            await client.chunk()
            process.popen.send_signal(signal.SIGTERM)
            await until(lambda: not listens(process.port))
            assert process.popen.poll() is None
            release.set()
            assert (await client.answer_rest()).endswith(DONE)
            assert await client.closed()
            assert await process.wait() == 0
            kinds = [type(row).__name__ for row in process.rows()]
            assert kinds == ["Begin", "Usage"]
            lines = [json.loads(line) for line in (process.directory / "access.log").read_text().splitlines()]
            assert any(line.get("usage", {}).get("request_id") == process.rows()[1].request_id for line in lines)
            assert KEY not in (process.directory / "access.log").read_text()
        await replica.stop()

    run(main(), uv=False)


def test_what_outlives_the_grace_is_told_so():
    async def main() -> None:
        replica = await FakeReplica(endless).start()
        async with started(stored_for(replica), grace_s=0.1) as process:
            client = await begun(process)
            process.popen.send_signal(signal.SIGTERM)
            assert b'"stopping"' in await client.answer_rest()
            assert await process.wait() == 0
            assert process.rows()[1].outcome == "error"
        await replica.stop()

    run(main(), uv=False)


def test_when_the_supervisor_is_gone_streams_are_told_and_the_process_ends():
    async def main() -> None:
        replica = await FakeReplica(endless).start()
        async with started(stored_for(replica), grace_s=1000) as process:
            client = await begun(process)
            process.cut_lifeline()
            assert b'"stopping"' in await client.answer_rest()
            await process.wait()
        await replica.stop()

    run(main(), uv=False)


async def endless(
    replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
) -> None:
    writer.write(EVENT_HEAD + chunk(event("a")))
    await reader.read(1)


async def begun(process: Process) -> Client:
    await process.ready()
    client = await process.connect()
    await client.send(post(chat(stream=True)))
    await client.head()
    await client.chunk()
    return client


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_sdk_talks_to_an_own_replica_through_the_gateway():
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            replica = ReplicaProcess(Path(directory), model="m")
            held = table([f"link:{replica.spec.link_path}"], replica={"token": "boot", "epoch": 3})
            save_table(Path(directory, "table.json"), held)
            process = Process(Path(directory))
            try:
                await process.ready()
                client = AsyncOpenAI(base_url=f"http://127.0.0.1:{process.port}/v1", api_key=KEY, max_retries=0)
                messages: Any = [{"role": "user", "content": "say it again"}]
                whole = await client.chat.completions.create(model="m", messages=messages, max_tokens=50)
                stream = await client.chat.completions.create(
                    model="m", messages=messages, max_tokens=50, stream=True, stream_options={"include_usage": True}
                )
                chunks = [c async for c in stream]
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                assert text == whole.choices[0].message.content
                assert text
                assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
                await client.close()
                process.popen.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
                ends = [r for r in process.rows() if type(r).__name__ == "Usage"]
                assert [e.output_tokens for e in ends] == [whole.usage.completion_tokens] * 2
            finally:
                log = process.stop()
                replica.stop()
            assert "Traceback" not in log, log

    run(main(), uv=False)


def test_the_gateway_takes_a_dead_link_s_streams_elsewhere():
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            replicas = [await FakeLinkReplica(Path(directory, f"r{i}.link")).start() for i in range(2)]
            save_table(
                Path(directory, "table.json"), table([f"link:{r.path}" for r in replicas], replica={"token": "boot"})
            )
            process = Process(Path(directory))
            await process.ready()
            await until(lambda: all(r.wires for r in replicas))
            ask = asyncio.create_task(process.ask(post(chat())))
            await until(lambda: any(r.requests for r in replicas))
            busy, other = sorted(replicas, key=lambda r: -len(r.requests))
            await busy.stop()
            await until(lambda: other.requests)
            other.requests[0].end(b"{}", finish="stop")
            assert (await ask).status == 200
            await other.stop()
            assert "Traceback" not in process.stop()

    run(main(), uv=False)


# --- the access log


def line(n: int) -> Line:
    return Line(1.0, f"id-{n}", "127.0.0.1", "GET", "/health", 200)


def test_the_access_log_is_json_lines_rotated_by_size(tmp_path: Path):
    path = tmp_path / "access.log"
    log = AccessLog(str(path), rotate_bytes=1000, keep=2)
    for n in range(60):
        log.add(line(n))
        log.flush()
        if n % 5 == 4:
            wait_written(tmp_path, n)
    log.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["access.log", "access.log.1", "access.log.2"]
    assert all(p.stat().st_size <= 1000 for p in tmp_path.iterdir())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text().splitlines()[-1])["id"] == "id-59"
    assert log.dropped == 0


def wait_written(directory: Path, n: int) -> None:
    async def written() -> None:
        await until(lambda: any(f'"id-{n}"' in p.read_text() for p in directory.iterdir() if p.exists()))

    run(written(), uv=False)


def test_an_access_log_that_cannot_be_written_drops_and_counts(tmp_path: Path):
    log = AccessLog(str(tmp_path / "missing" / "access.log"))
    log.add(line(1))
    log.close()
    assert log.dropped == 1


def test_a_stored_table_is_whole_or_absent(tmp_path: Path):
    path = tmp_path / "table.json"
    assert load_table(path) is None
    save_table(path, table([]))
    save_table(path, table(["http://x"]))
    assert load_table(path) == table(["http://x"])
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    with pytest.raises(OSError, match="No such file"):
        save_table(tmp_path / "missing" / "table.json", table([]))
