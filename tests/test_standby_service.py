"""The warm pool with real processes: what is let go lives on, is given nothing, and serves again without a start."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.conftest import Service, alive
from tests.traffic import admin, chat, stream, usage_rows, wait_for

POOL = "standby: {max: 2, rent: 0.001}"  # a thousand starts long: no standby of these tests is let go
BY_HAND = f"""
models:
  echo:
    engine: echo
    options: {{max_running: 2, echo_tpot_ms: 20}}
    scale: {{min: 1, max: 3, policy: fixed, price_per_hour: 2.0, {POOL}}}
"""
TO_ZERO = f"models:\n  echo: {{engine: echo, scale: {{min: 0, max: 2, policy: fixed, {POOL}}}}}\n"
Serve = Callable[..., Service]


def row(service: Service) -> dict[str, Any]:
    return json.loads(service.run("scale", "show", "echo", "--json").stdout)["rows"][0]


def states(service: Service) -> dict[str, str]:
    return {r["id"]: r["state"] for r in admin(service, "api/v1/status")["replicas"]}


def pids(service: Service) -> dict[str, int]:
    return {r["id"]: r["pid"] for r in admin(service, "api/v1/status")["replicas"]}


def counts(service: Service, ready: int, standby: int) -> Callable[[], bool]:
    want = sorted(["ready"] * ready + ["standby"] * standby)

    def there() -> bool:
        try:
            return sorted(states(service).values()) == want
        except OSError:  # control is away
            return False

    return there


def three_of_which_two_stand_by(serve: Serve) -> Service:
    service = serve(BY_HAND)
    service.run("scale", "set", "echo", "3")
    wait_for(counts(service, 3, 0), "three replicas", 60.0)
    service.run("scale", "set", "echo", "1")
    wait_for(counts(service, 1, 2), "two that stand by")
    return service


def test_what_is_let_go_stands_by_is_priced_as_such_given_nothing_and_told_everywhere(serve: Serve) -> None:
    service = three_of_which_two_stand_by(serve)
    told = row(service)
    assert (told["ready"], told["standby"], told["cost_per_hour"]) == (1, 2, 2.004)
    assert "2 stand by for at most" in told["sentence"]
    assert admin(service, "api/v1/status")["deployments"][0]["standby"] == 2
    assert "1 (2 standby)" in service.run("status").stdout

    for answer in [chat(service, f"request {i}", max_tokens=5) for i in range(8)]:  # four times what one runs at once
        assert answer.join().status == 200
    (serving,) = [id for id, state in states(service).items() if state == "ready"]
    rows = wait_for(lambda: len(rows := usage_rows(service)) == 8 and rows, "eight usage rows")
    assert {a["replica"] for r in rows for a in r["attempts"]} == {serving}


def test_a_standby_wakes_without_a_start_and_a_control_that_dies_leaves_it_standing_by(serve: Serve) -> None:
    service = three_of_which_two_stand_by(serve)
    before = pids(service)
    os.kill(service.pids["control"][0], signal.SIGKILL)
    wait_for(counts(service, 1, 2), "control is back and two stand by", 60.0)
    assert pids(service) == before
    starts = row(service)["starts"]
    service.run("scale", "set", "echo", "2")
    wait_for(counts(service, 2, 1), "one of them serves again")
    assert (pids(service), row(service)["starts"]) == (before, starts)


def test_a_standby_that_is_killed_is_noticed_and_not_replaced_and_an_ended_pool_lets_the_others_go(
    serve: Serve,
) -> None:
    service = three_of_which_two_stand_by(serve)
    before, (first, second) = pids(service), [id for id, state in states(service).items() if state == "standby"]
    os.kill(before[first], signal.SIGKILL)
    wait_for(counts(service, 1, 1), "its death is noticed")
    service.config.write_text(BY_HAND.replace(", " + POOL, ""), encoding="utf-8")
    service.run("apply", "-f", str(service.config))
    wait_for(counts(service, 1, 0), "nothing stands by")
    assert not alive(before[second])


def test_a_busy_replica_that_is_parked_finishes_what_it_has(serve: Serve) -> None:
    service = serve(BY_HAND)
    service.run("scale", "set", "echo", "2")
    wait_for(counts(service, 2, 0), "two replicas", 60.0)
    streams = [stream(service, f"run {i}", max_tokens=150) for i in range(4)]
    assert all(s.first.wait(20) for s in streams)
    service.run("scale", "set", "echo", "1")
    wait_for(counts(service, 1, 1), "one stands by")
    for s in streams:
        assert (s.join(60).done, s.finish) == (True, "length"), s.error


def test_a_model_at_zero_answers_from_its_standby_instead_of_a_cold_start(serve: Serve) -> None:
    service = serve(TO_ZERO)
    assert chat(service, "cold", max_tokens=2).join(60).status == 200
    wait_for(counts(service, 0, 1), "it stands by", 60.0)
    before, starts = pids(service), row(service)["starts"]
    assert chat(service, "warm", max_tokens=2).join().status == 200
    assert (pids(service), row(service)["starts"]) == (before, starts)
    woken = [d["wakes"] for d in admin(service, "api/v1/decisions?limit=100")["rows"] if d["wakes"]]
    assert woken == [["echo-0"]]
