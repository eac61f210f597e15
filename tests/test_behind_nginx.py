"""nginx before the gateway, as docs/behind-a-proxy.md sets it up: real processes, the very text of the page."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from neaptide.table import Limits
from tests.conftest import ROOT
from tests.gateway_kit import (
    COMPLETION,
    EVENT_HEAD,
    Answer,
    Asked,
    Behaviour,
    Client,
    FakeReplica,
    answer_bytes,
    chat,
    chunk,
    event,
    post,
    reply_json,
    run,
    table,
    until,
)
from tests.test_gateway_process import DONE, Process, listens, started

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="NOT RUN: nginx is missing (apt-get install nginx-light)")
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Front:
    """nginx with the page's configuration; only ports and its own files differ."""

    def __init__(self, directory: Path, gateway_port: int) -> None:
        assert NGINX is not None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (page,) = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs/behind-a-proxy.md").read_text(), re.DOTALL)
        text = page.replace("127.0.0.1:8000", f"127.0.0.1:{gateway_port}").replace("127.0.0.1:8080", self._listen)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        own = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
        text = text.replace("http {\n", f"http {{\naccess_log {directory}/access.log;\n{own}", 1)
        config = directory / "nginx.conf"
        config.write_text(f"daemon off;\nmaster_process off;\npid {directory}/pid;\n{text}")
        self.popen = subprocess.Popen(
            [NGINX, "-p", str(directory), "-c", str(config), "-e", str(directory / "error.log")]
        )

    @property
    def _listen(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24))

    async def ask(self, request: bytes) -> Answer:
        client = await self.connect()
        await client.send(request)
        answer = await client.answer()
        client.close()
        return answer

    def stop(self) -> None:
        self.popen.terminate()
        self.popen.wait(10)


@asynccontextmanager
async def fronted(
    directory: Path, behave: Behaviour, limits: Limits | None = None
) -> AsyncIterator[tuple[Front, Process, FakeReplica]]:
    replica = await FakeReplica(behave).start()
    async with started(table([f"http://127.0.0.1:{replica.port}/v1"], limits=limits)) as process:
        await process.ready()
        front = Front(directory, process.port)
        try:
            await until(lambda: listens(front.port))
            yield front, process, replica
        finally:
            front.stop()
            await replica.stop()


class Held:
    """A replica's stream whose second half waits."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(EVENT_HEAD + chunk(event("a")))
        await self.release.wait()
        writer.write(chunk(event("b") + DONE) + b"0\r\n\r\n")


async def next_event(client: Client) -> bytes:
    """The next whole event, however its bytes are cut into chunks."""
    data = b""
    while not data.endswith(b"\n\n"):
        piece = await client.chunk()
        assert piece, data
        data += piece
    return data


def test_a_token_comes_through_before_the_next_one_exists(tmp_path: Path) -> None:
    async def main() -> None:
        held = Held()
        async with fronted(tmp_path, held) as (front, _, _):
            client = await front.connect()
            await client.send(post(chat(stream=True)))
            status, headers = await client.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            assert await next_event(client) == event("a")
            held.release.set()
            assert await client.answer_rest() == event("b") + DONE
            client.close()

    run(main())


def test_a_drain_ends_a_stream_properly(tmp_path: Path) -> None:
    async def main() -> None:
        held = Held()
        async with fronted(tmp_path, held) as (front, process, _):
            client = await front.connect()
            await client.send(post(chat(stream=True)))
            await client.head()
            assert await next_event(client) == event("a")
            process.popen.send_signal(signal.SIGTERM)
            await until(lambda: not listens(process.port))
            held.release.set()
            assert (await client.answer_rest()).endswith(DONE)
            assert await process.wait() == 0
            assert (await front.ask(GET)).status == 502  # there is no next gateway in this test
            client.close()

    run(main())


def test_a_client_that_leaves_stops_the_replica(tmp_path: Path) -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")))
            assert await reader.read() == b""
            gone.set()

        async with fronted(tmp_path, behave) as (front, _, _):
            client = await front.connect()
            await client.send(post(chat(stream=True)))
            await client.head()
            client.close()
            await gone.wait()

    run(main())


def test_connections_are_kept_and_big_bodies_pass_or_are_refused_by_the_gateway(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronted(tmp_path, reply_json, Limits(body_bytes=3 << 20)) as (front, process, replica):
            client = await front.connect()
            big = chat(pad="x" * (2 << 20))
            for body in (chat(), big, chat()):
                await client.send(post(body))
                assert (await client.answer()).body == COMPLETION
            assert [asked.json for asked in replica.asked] == [chat(), big, chat()]
            assert replica.asked[0].headers["x-request-id"]
            client.close()
            answer = await front.ask(post(chat(pad="x" * (4 << 20))))
            assert (answer.status, answer.code) == (413, "body_too_large")
            log = (process.directory / "access.log").read_text()
            assert '"127.0.0.1"' in log  # the proxy: what it says of a client is not read

    run(main())


def test_a_refusal_keeps_its_retry_after(tmp_path: Path) -> None:
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(answer_bytes(b'{"error":{"code":"busy"}}', 429, "Retry-After: 7\r\n"))

    async def main() -> None:
        async with fronted(tmp_path, behave) as (front, _, _):
            answer = await front.ask(post(chat()))
            assert (answer.status, answer.headers["retry-after"], answer.code) == (429, "7", "busy")

    run(main())
