"""Replicas by https: whom the gateway believes, what it shows of itself, and what is said when it comes to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from neaptide.gateway.route import Target
from neaptide.gateway.upstream_http import HttpPool
from neaptide.table import ReplicaRow
from neaptide.tls.settings import ReplicaTls
from neaptide.tls.trust import Trust, towards, why_untrusted
from tests.gateway_kit import FakeReplica, Running, chat, gateway, post, reply_by_body, run, table
from tests.tls_kit import House, environment


def server(house: House, name: str = "replica", ask_clients: bool = False, **wish: Any) -> ssl.SSLContext:
    """Of a replica that somebody else runs."""
    made = house.issue(name, **wish)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=house.ca)
    context.load_cert_chain(made.cert, made.key)
    context.verify_mode = ssl.CERT_REQUIRED if ask_clients else ssl.CERT_NONE
    return context


@contextlib.asynccontextmanager
async def before(
    context: ssl.SSLContext | None, tls: ReplicaTls | None, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Running, FakeReplica]]:
    """A gateway before one replica by https."""
    replica = await FakeReplica(reply_by_body).start(context)
    try:
        async with gateway(table([f"https://{host}:{replica.port}/v1"], replica={"tls": tls})) as running:
            yield running, replica
    finally:
        await replica.stop()


def asked(context: ssl.SSLContext | None, tls: ReplicaTls | None, host: str = "127.0.0.1") -> tuple[int, str, str]:
    """(status, code, message) of one request."""
    out: list[tuple[int, str, str]] = []

    async def main() -> None:
        async with before(context, tls, host) as (running, _):
            answer = await running.ask(post(chat()))
            error = answer.json.get("error") or {}
            out.append((answer.status, error.get("code", ""), error.get("message", "")))

    run(main())
    return out[0]


def test_an_answer_and_a_stream_come_over_connections_that_are_kept(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def main() -> None:
        async with before(server(house), ReplicaTls(ca=house.ca)) as (running, replica):
            client = await running.connect()
            for body in (chat(), chat(stream=True), chat()):
                await client.send(post(body))
                answer = await client.answer()
                assert answer.status == 200
                assert answer.body
            assert replica.connections == 1

    run(main())


def test_the_systems_store_counts_where_nothing_is_said(tmp_path: Path) -> None:
    house = House(tmp_path)
    with environment(SSL_CERT_FILE=house.ca):
        assert asked(server(house), None)[0] == 200
    with environment(SSL_CERT_FILE=House(tmp_path / "other").ca):
        status, code, message = asked(server(house, "again"), None)
    assert (status, code) == (502, "replica_tls")
    assert "nobody we trust" in message


def test_another_name_is_refused_and_a_name_that_is_given_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(tmp_path)
    context = server(house, dns=("vllm.internal",), server=True)
    _, code, message = asked(context, ReplicaTls(ca=house.ca))
    assert code == "replica_tls"
    assert "another name" in message
    assert "server_name" in caplog.text  # what to do is the operator's to read
    assert str(house.folder) not in message
    assert asked(context, ReplicaTls(ca=house.ca, server_name="vllm.internal"))[0] == 200
    assert asked(context, ReplicaTls(verify=False))[0] == 200


def test_the_name_goes_along_with_the_handshake(tmp_path: Path) -> None:
    house = House(tmp_path)
    context = server(house)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    assert asked(context, ReplicaTls(ca=house.ca), "localhost")[0] == 200
    asked(context, ReplicaTls(ca=house.ca, server_name="other.internal"))
    assert names[0] == "localhost"
    assert set(names[1:]) == {"other.internal"}


def test_an_expired_certificate_is_called_so(tmp_path: Path) -> None:
    house = House(tmp_path, days_ago=200)
    made = house.issue("old", days_ago=100)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.cert, made.key)
    _, code, message = asked(context, ReplicaTls(ca=house.ca))
    assert (code, "expired" in message) == ("replica_tls", True)


def test_a_replica_without_tls_behind_https_is_called_so() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As web servers answer what is no request."""
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        plain = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = plain.sockets[0].getsockname()[1]
        async with plain, gateway(table([f"https://127.0.0.1:{port}/v1"])) as running:
            answer = await running.ask(post(chat()))
            assert answer.code == "replica_tls"
            assert "does not speak TLS" in answer.json["error"]["message"]

    run(main())


def test_a_replica_that_asks_for_a_certificate_gets_ours(tmp_path: Path) -> None:
    house = House(tmp_path)
    mine = house.issue("gateway", client=True)
    context = server(house, ask_clients=True)
    assert asked(context, ReplicaTls(ca=house.ca, cert=mine.cert, key=mine.key))[0] == 200
    status, code, _ = asked(context, ReplicaTls(ca=house.ca))
    assert status == 502
    assert code in ("replica_tls", "replica_reset", "replica_unreachable")  # by who is faster: the alert or the end


def test_files_of_ours_that_are_no_good_fail_the_request_and_not_the_gateway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(tmp_path)
    context = server(house)
    status, code, message = asked(context, ReplicaTls(ca=str(tmp_path / "none")))
    assert (status, code) == (502, "replica_tls")
    assert str(tmp_path) not in message
    assert str(tmp_path / "none") in caplog.text


def test_other_settings_of_tls_are_another_upstream(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def main() -> None:
        async with before(server(house), ReplicaTls(verify=False)) as (running, replica):
            assert (await running.ask(post(chat()))).status == 200
            endpoint = f"https://127.0.0.1:{replica.port}/v1"
            running.install(table([endpoint], replica={"tls": ReplicaTls(ca=house.ca)}))
            assert (await running.ask(post(chat()))).status == 200
            assert replica.connections == 2

    run(main())


def test_files_that_change_are_taken_up_and_bad_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = House(tmp_path)
    mine = house.issue("me", client=True)
    tls = ReplicaTls(ca=house.ca, cert=mine.cert, key=mine.key)
    good = Path(mine.cert).read_text()
    trust = Trust()
    first = trust.context(tls)
    assert trust.context(ReplicaTls(ca=house.ca, cert=mine.cert, key=mine.key)) is first
    Path(mine.cert).write_text("rubbish")
    trust.poll()
    trust.poll()
    assert trust.context(tls) is first
    assert "stays in force" in caplog.text
    Path(mine.cert).write_text(good)
    trust.poll()
    trust.poll()
    assert trust.context(tls) is not first


def test_verification_is_on_unless_it_is_switched_off() -> None:
    checked = towards(ReplicaTls())
    assert (checked.verify_mode, checked.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert towards(ReplicaTls(verify=False)).verify_mode == ssl.CERT_NONE


def test_a_pool_by_http_makes_no_context() -> None:
    async def main() -> None:
        row = ReplicaRow(id="r", model="m", endpoint="http://h/v1")
        pool = HttpPool(row, Target(row), asyncio.get_running_loop())
        assert pool._tls is None

    run(main())


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "client certificate"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "client certificate"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "in common"),
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        (None, "broke TLS"),
    ],
)
def test_each_failure_has_its_words(reason: str | None, said: str) -> None:
    error = ssl.SSLError(1, "x")
    error.reason = reason  # type: ignore[assignment]
    why = why_untrusted(error)
    assert said in why.reason
    assert why.fix
