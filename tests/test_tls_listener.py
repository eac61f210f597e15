"""The inference listener in TLS: who gets in, what others are told, and that renewing a certificate breaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neaptide.clock import wall_s
from neaptide.gateway.access import AccessLog
from neaptide.gateway.secure import Secure
from neaptide.table import Limits
from neaptide.tls.context import pinned
from neaptide.tls.listen import TlsListener
from neaptide.tls.served import Served
from neaptide.tls.settings import ListenTls
from tests.gateway_kit import (
    EVENT_HEAD,
    Asked,
    Client,
    FakeReplica,
    Running,
    chat,
    chunk,
    event,
    post,
    reply_by_body,
    run,
    serving,
    until,
)
from tests.tls_kit import House

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def listening(house: House, **limits: Any) -> AsyncIterator[tuple[TlsListener, int]]:
    """A listener before a server that says nothing."""
    sock = socket.create_server(("127.0.0.1", 0))
    served = Served(house.listen(), "listen")
    listener = TlsListener(asyncio.get_running_loop(), sock, asyncio.Protocol, lambda: served.context, **limits)
    try:
        yield listener, sock.getsockname()[1]
    finally:
        listener.close()
        await asyncio.sleep(0)


async def refused(running: Running, tls: ssl.SSLContext) -> bool:
    """Whether no answer comes by `tls`: in TLS 1.3 a client hears that it is not wanted after its own handshake."""
    try:
        await running.ask(GET, tls)
    except (OSError, asyncio.IncompleteReadError):
        return True
    return False


def failed(running: Running) -> Counter[str]:
    """Handshakes that came to nothing, by reason."""
    secure: Secure = running.server.gate.secure  # type: ignore[attr-defined]
    rows = secure.gauges(wall_s())
    return Counter({labels[8:-1]: int(n) for name, _, labels, n in rows if name.endswith("_failed")})


def test_an_answer_by_tls_is_the_one_without(tmp_path: Path) -> None:
    house = House(tmp_path)
    bodies: list[list[bytes]] = []

    async def ask(secure: Secure | None, tls: ssl.SSLContext | None) -> None:
        async with serving(reply_by_body, secure=secure) as (running, _):
            whole = await running.ask(post(chat()), tls)
            streamed = await running.ask(post(chat(stream=True)), tls)
            long = await running.ask(post(chat(messages=[{"role": "user", "content": "x" * 300_000}])), tls)
            bodies.append([whole.body, streamed.body, long.body])
            assert running.row.outcome == "ok"

    run(ask(None, None))
    run(ask(Secure(house.listen()), house.client()))
    assert bodies[0] == bodies[1]


def test_a_connection_is_kept_resumed_and_speaks_http_1_1_in_a_new_version_of_tls(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(house.listen())) as (running, _):
            tls = house.client()
            tls.set_alpn_protocols(["h2", "http/1.1"])
            client = await running.connect(tls)
            for _ in range(2):
                await client.send(post(chat()))
                assert (await client.answer()).status == 200
            spoken = client.writer.get_extra_info("ssl_object")
            assert (spoken.version(), spoken.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
            old = house.client()
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            client = await running.connect(old)
            assert "ECDHE" in client.writer.get_extra_info("cipher")[0]
            await client.send(GET)
            assert (await client.answer()).status == 200

    run(main())


def test_tickets_resume_a_session(tmp_path: Path) -> None:
    """Blocking sockets in threads: asyncio offers a client no session to give again."""
    house = House(tmp_path)
    tls = house.client()

    def ask(port: int, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            with tls.wrap_socket(raw, server_hostname="localhost", session=session) as spoken:
                spoken.sendall(GET)
                spoken.recv(1 << 16)  # tickets come with the first answer
                return bool(spoken.session_reused), spoken.session

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(house.listen())) as (running, _):
            reused, session = await asyncio.to_thread(ask, running.port, None)
            assert not reused
            reused, _ = await asyncio.to_thread(ask, running.port, session)
            assert reused

    run(main())


def test_a_body_that_is_refused_while_it_comes_does_not_take_the_answer_along(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def main() -> None:
        limits = Limits(body_bytes=1000)
        async with serving(reply_by_body, secure=Secure(house.listen()), limits=limits) as (running, _):
            large = chat(messages=[{"role": "user", "content": "x" * 2_000_000}])
            answer = await running.ask(post(large), house.client())
            assert (answer.status, answer.code) == (413, "body_too_large")

    run(main())


def test_a_client_that_does_not_know_the_authority_or_the_name_stays_away(tmp_path: Path) -> None:
    house, foreign = House(tmp_path / "a"), House(tmp_path / "b")

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(house.listen())) as (running, _):
            with pytest.raises(ssl.SSLCertVerificationError):
                await running.connect(foreign.client())
            with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
                await asyncio.open_connection(
                    "127.0.0.1", running.port, ssl=house.client(), server_hostname="api.example.com"
                )
            await until(lambda: sum(failed(running).values()) == 2)  # by alert or by leaving: clients differ

    run(main())


def test_a_server_whose_certificate_has_expired_is_not_trusted(tmp_path: Path) -> None:
    house = House(tmp_path, days_ago=200)
    old = house.issue("gateway", days_ago=100)
    pair = ListenTls(cert=old.cert, key=old.key)

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(pair)) as (running, _):
            with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
                await running.connect(house.client())

    run(main())


def test_plain_http_on_a_tls_port_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(House(tmp_path).listen())) as (running, _):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (400, "plain_http")
            assert "https://" in answer.json["error"]["message"]
            client = await running.connect()
            await client.send(b"\x00\x01 neither\r\n\r\n")
            assert await client.closed()
            assert failed(running)["plain_http"] == 1
            assert not running.server.connections

    run(main())


def test_where_a_client_certificate_is_required_nobody_comes_without_a_good_one(tmp_path: Path) -> None:
    house, foreign = House(tmp_path / "a"), House(tmp_path / "b")
    alice = house.issue("alice", client=True)
    mallory = foreign.issue("alice", client=True)
    old = house.issue("old", days_ago=30, client=True, days=1)
    log = AccessLog(str(tmp_path / "access.jsonl"))

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(house.mutual())) as (running, _):
            running.door.access = log
            assert await refused(running, house.client())
            assert await refused(running, house.client(mallory))
            assert await refused(running, house.client(old))
            assert await refused(running, house.client(house.issue("server")))
            await until(lambda: sum(failed(running).values()) >= 4)
            assert failed(running)["client_certificate_absent"] == 1
            assert (await running.ask(post(chat()), house.client(alice))).status == 200
            assert (await running.ask(GET, house.client(alice))).status == 200
            await until(lambda: not running.server.connections)

    run(main())
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert [line["client"] for line in lines] == ["CN=alice", "CN=alice"]


def test_where_it_is_optional_it_is_looked_at_but_not_missed(tmp_path: Path) -> None:
    house, foreign = House(tmp_path / "a"), House(tmp_path / "b")
    mallory = foreign.issue("alice", client=True)

    async def main() -> None:
        async with serving(reply_by_body, secure=Secure(house.mutual("optional"))) as (running, _):
            assert not await refused(running, house.client())
            assert await refused(running, house.client(mallory))

    run(main())


class Slow:
    """Streams a token a step; a test takes the steps."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[bool] = asyncio.Queue()

    async def __call__(
        self, replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
    ) -> None:
        writer.write(EVENT_HEAD)
        while await self.steps.get():
            writer.write(chunk(event("a")))
        writer.write(chunk(event(None, "stop")) + chunk(DONE) + b"0\r\n\r\n")


def shown(client: Client) -> bytes:
    der: bytes = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return der


def test_a_stream_runs_on_over_renewals_and_new_connections_get_the_new_certificate(tmp_path: Path) -> None:
    house, slow = House(tmp_path), Slow()
    secure = Secure(house.listen())

    def look() -> None:
        secure.served.poll(wall_s())
        secure.served.poll(wall_s())

    async def main() -> None:
        async with serving(slow, secure=secure) as (running, _):
            client = await running.connect(house.client())
            await client.send(post(chat(stream=True)))
            slow.steps.put_nowait(True)
            assert (await client.head())[0] == 200
            assert b'"a"' in await client.chunk()
            house.issue("gateway", renew=True)
            look()
            fresh = await running.connect(house.client())
            assert shown(fresh) != shown(client)
            Path(house.folder / "gateway.crt").write_text("rubbish")
            look()
            assert secure.served.refused
            assert shown(await running.connect(house.client())) == shown(fresh)
            slow.steps.put_nowait(True)
            assert b'"a"' in await client.chunk()
            slow.steps.put_nowait(False)
            assert DONE in await client.answer_rest()
            assert running.row.outcome == "ok"

    run(main())


def test_an_authority_of_clients_that_is_replaced_ends_their_sessions_too(tmp_path: Path) -> None:
    """A ticket of before the change must not let in whom the change keeps out."""
    house, others = House(tmp_path / "a"), House(tmp_path / "b")
    alice = house.issue("alice", client=True)
    bundle = tmp_path / "clients.pem"
    bundle.write_text(Path(house.ca).read_text())
    secure = Secure(house.listen(client_ca=str(bundle), client_auth="required"))
    tls = house.client(alice)
    kept: list[ssl.SSLSession | None] = [None]

    def ask(port: int) -> bytes:
        """b"" when the connection ends instead."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as raw:
            with tls.wrap_socket(raw, server_hostname="localhost", session=kept[0]) as spoken:
                spoken.sendall(GET)
                said = spoken.recv(1 << 16)
                kept[0] = spoken.session
                return said
        return b""

    async def main() -> None:
        async with serving(reply_by_body, secure=secure) as (running, _):
            assert b"200 OK" in await asyncio.to_thread(ask, running.port)
            bundle.write_text(Path(others.ca).read_text())
            secure.served.poll(wall_s())
            secure.served.poll(wall_s())
            assert await asyncio.to_thread(ask, running.port) == b""
            await until(lambda: failed(running)["client_certificate_invalid"] == 1)

    run(main())


@pytest.mark.parametrize("uv", [True, False], ids=["uvloop", "asyncio"])
def test_a_handshake_that_does_not_go_on_ends(tmp_path: Path, uv: bool) -> None:
    async def main() -> None:
        async with listening(House(tmp_path), handshake_s=0.05) as (listener, port):
            silent = Client(*await asyncio.open_connection("127.0.0.1", port))
            begun = Client(*await asyncio.open_connection("127.0.0.1", port))
            await begun.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello, and no more
            assert await silent.closed()
            assert await begun.closed()
            await until(lambda: listener.half_open == 0)
            assert listener.failed["timeout"] == 2
            silent.close()
            begun.close()

    run(main(), uv)


def full(listener: TlsListener, half_open: int, crowded_out: int) -> bool:
    return (listener.half_open, listener.failed["crowded_out"]) == (half_open, crowded_out)


@pytest.mark.parametrize("uv", [True, False], ids=["uvloop", "asyncio"])
def test_handshakes_at_once_are_bounded_and_the_oldest_gives_way(tmp_path: Path, uv: bool) -> None:
    house = House(tmp_path)

    async def main() -> None:
        async with listening(house, half_open=3) as (listener, port):
            silent = []
            for n in range(5):
                client = Client(*await asyncio.open_connection("127.0.0.1", port))
                silent.append(client)
                if n % 2:
                    await client.send(b"\x16\x03\x01\x02\x00\x01")
                await until(partial(full, listener, min(n + 1, 3), max(0, n - 2)))
            assert await silent[0].closed()
            assert await silent[1].closed()
            honest = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=house.client()))
            assert listener.failed["crowded_out"] == 3
            for client in (*silent, honest):
                client.close()
            await until(lambda: listener.half_open == 0)

    run(main(), uv)


def test_our_own_verbs_trust_the_certificate_in_force_and_no_other(tmp_path: Path) -> None:
    house = House(tmp_path)
    secure = Secure(house.listen(), str(tmp_path / "told.crt"))
    other = Served(House(tmp_path / "other").listen(), "listen")

    async def main() -> None:
        async with serving(reply_by_body, secure=secure) as (running, _):
            told = (tmp_path / "told.crt").read_text()
            assert (await running.ask(GET, pinned(told))).status == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await running.connect(pinned(other.leaf.pem))

    run(main())
