"""Budgets with real processes: never over, whatever is killed, and the ledger agrees with what was paid."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sqlite3
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, started, stop
from tests.traffic import admin, chat, usage_rows, wait_for

# Output alone has a price, so a request costs exactly what it reserves: its max_tokens.
CONFIG = """
gateways: {gateways}
models:
  echo: {{engine: echo, options: {{max_running: 512, echo_tpot_ms: 0.05}}, max_waiting: 2000}}
  free: {{engine: echo}}
prices:
  echo: {{prompt: 0, output: 1000}}
"""
TOKENS = 4
COST = TOKENS / 1000  # of the currency


@pytest.fixture(scope="module", params=[1, 2], ids=["one gateway", "two gateways"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("budgets")
    running = started(root, CONFIG.format(gateways=request.param))
    yield running
    stop(running.state)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Service]:
    running = started(tmp_path, CONFIG.format(gateways=1))
    yield running
    stop(running.state)


def key_of(service: Service, tenant: str) -> str:
    made = json.loads(service.run("keys", "create", "--tenant", tenant, "--json").stdout)
    return str(made["key"])


def budget(service: Service, scope: str, *amount: str) -> dict[str, Any]:
    service.run("budgets", "set", scope, *amount)
    return listed(service, scope)


def listed(service: Service, scope: str) -> dict[str, Any]:
    row: dict[str, Any]
    (row,) = [r for r in admin(service, "api/v1/budgets")["rows"] if r["scope"] == scope]
    return row


def known_everywhere(service: Service) -> bool:
    """Every gateway has the table that control would send it now."""
    status = admin(service, "api/v1/status")
    return all((g.get("fast", 0), g.get("slow", 0)) == (status["fast"], status["slow"]) for g in status["gateways"])


def ask(service: Service, key: str, model: str = "echo", **more: Any) -> tuple[int, str, str]:
    """(status, slug, message) of one request."""
    asker = Service(service.config, service.state, {**service.info, "key": key})
    answer = chat(asker, "hi", model, **{"max_tokens": TOKENS, **more}).join()
    return answer.status, answer.error, answer.message


async def flood(service: Service, key: str, n: int) -> list[int]:
    """The statuses of `n` requests, each on a connection of its own, all written before the first is read."""
    url = urllib.parse.urlsplit(service.api)
    body = json.dumps(
        {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS, "ignore_eos": True}
    )
    head = (
        f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    )
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    streams = [await asyncio.open_connection(url.hostname, url.port) for _ in range(n)]
    for _, writer in streams:
        writer.write(request)
    answers = await asyncio.gather(*(reader.read() for reader, _ in streams))
    for _, writer in streams:
        writer.close()
    return [int(answer.split(b" ", 2)[1]) for answer in answers]


def test_500_requests_at_once_against_a_budget_for_100_are_exactly_100(service: Service) -> None:
    key = key_of(service, "acme")
    row = budget(service, "tenant:acme", "--money", str(100 * COST))
    wait_for(lambda: known_everywhere(service), "every gateway knows the budget")

    async def main() -> list[int]:
        async with asyncio.timeout(60):
            return await flood(service, key, 500)

    statuses = asyncio.run(main())
    assert (statuses.count(200), statuses.count(429)) == (100, 400)
    cost = round(COST * 10**9)
    wait_for(lambda: listed(service, "tenant:acme")["spent"] == 100 * cost, "the ledger has taken all")
    assert listed(service, "tenant:acme")["left"] == 0
    rows = [u for u in usage_rows(service) if u.get("tenant") == "acme"]
    paid = [u["paid"] for u in rows if u.get("outcome", "ok") == "ok"]
    assert paid == [[[row["name"], cost, cost]]] * 100
    assert not [u for u in rows if u.get("outcome") == "refused" and u.get("paid")]
    (total,) = admin(service, "api/v1/usage/totals?by=tenant&tenant=acme")["rows"]
    assert total["amount_nanos"] == 100 * cost


def test_the_refusal_names_the_budget_and_when_it_renews_and_what_is_free_goes_on(service: Service) -> None:
    key = key_of(service, "poor")
    row = budget(service, "tenant:poor", "--money", "0", "--period", "day")
    wait_for(lambda: known_everywhere(service), "every gateway knows the budget")
    status, slug, message = ask(service, key)
    assert (status, slug) == (429, "budget_exceeded")
    assert row["name"] in message
    assert "it renews at" in message
    assert ask(service, key, "free")[0] == 200


def test_a_budget_of_tokens_counts_what_prompts_and_answers_had_and_is_gone_when_removed(service: Service) -> None:
    key = key_of(service, "counted")
    budget(service, "tenant:counted", "--tokens", "400", "--period", "total")
    wait_for(lambda: known_everywhere(service), "every gateway knows the budget")
    assert ask(service, key, "free")[0] == 200
    (usage,) = [u for u in usage_rows(service) if u.get("tenant") == "counted"]
    spent = usage["prompt_tokens"] + usage["output_tokens"]
    assert spent
    wait_for(lambda: listed(service, "tenant:counted")["spent"] == spent, "the ledger has taken it")
    assert ask(service, key, "free", max_tokens=500)[:2] == (429, "budget_exceeded")
    service.run("budgets", "remove", "tenant:counted:tokens:total")
    wait_for(lambda: known_everywhere(service), "every gateway knows")
    assert ask(service, key, "free", max_tokens=500)[0] == 200


def test_what_is_no_budget_is_refused_with_what_to_write(service: Service) -> None:
    for wrong, said in (
        (("team:a", "--money", "1"), "tenant:NAME"),
        (("all", "--money", "-1"), "nine decimals"),
        (("key:nobody", "--money", "1"), "neaptide keys list"),
        (("all",), "--money"),
    ):
        done = service.run("budgets", "set", *wrong, check=False)
        assert done.returncode != 0
        assert said in done.stderr
    assert "error[E601]" in service.run("budgets", "remove", "all:money:day", check=False).stderr


def leases(service: Service) -> dict[str, int]:
    """What the ledger says that each gateway's run has had and not given back."""
    with closing(sqlite3.connect(f"file:{service.state}/ledger.db?mode=ro", uri=True)) as db:
        query = "SELECT gateway, sum(granted - returned) FROM leases WHERE gateway <> '' GROUP BY gateway"
        return dict(db.execute(query).fetchall())


@contextmanager
def no_control(service: Service) -> Iterator[None]:
    """Control is killed, and no other one becomes it."""
    with open(service.state / "control.lock", "rb+") as lock:

        def ours() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = (service.state / "control.lock").read_text().strip()
                if holder:  # one that has just taken it writes its id next
                    with suppress(ProcessLookupError):
                        os.kill(int(holder), signal.SIGKILL)
                return False
            return True

        wait_for(ours, "the lock of control")
        yield


def test_with_control_killed_the_lease_is_spent_and_then_nobody_knows(one: Service) -> None:
    key = key_of(one, "acme")
    budget(one, "tenant:acme", "--money", str(200 * COST))
    wait_for(lambda: known_everywhere(one), "the gateway knows the budget")
    cost = round(COST * 10**9)
    assert ask(one, key)[0] == 200
    with no_control(one):
        (held,) = leases(one).values()
        more = held // cost - 1
        answers = [ask(one, key) for _ in range(more + 1)]
        assert [status for status, _, _ in answers] == [200] * more + [503]
        assert answers[-1][1] == "budget_unknown"
        assert "tenant:acme:money:" in answers[-1][2]
        assert ask(one, key, "free")[0] == 200
    wait_for(lambda: ask(one, key)[0] == 200, "the next control lends again")
    served = [u for u in usage_rows(one) if u.get("tenant") == "acme" and u.get("paid")]
    wait_for(lambda: listed(one, "tenant:acme")["spent"] == len(served) * cost, "the books agree")


def test_what_a_killed_gateway_did_not_spend_is_there_again(one: Service) -> None:
    key = key_of(one, "acme")
    budget(one, "tenant:acme", "--money", str(300 * COST))
    wait_for(lambda: known_everywhere(one), "the gateway knows the budget")
    assert ask(one, key)[0] == 200
    (before,) = leases(one)
    os.kill(one.pids["gateway"][0], signal.SIGKILL)
    wait_for(lambda: before not in leases(one), "the dead gateway's lease is over")
    cost = round(COST * 10**9)
    row = listed(one, "tenant:acme")
    assert (row["spent"], row["lent"]) == (cost, 0)

    wait_for(lambda: ask(one, key)[0] == 200, "the next gateway serves")
    wait_for(lambda: listed(one, "tenant:acme")["spent"] == 2 * cost, "the ledger has taken both")
