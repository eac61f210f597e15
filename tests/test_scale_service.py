"""Scaling with real processes: to zero and back, up under load, by hand, and through the death of control."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.conftest import Service
from tests.traffic import admin, chat, stream, wait_for

ZERO = """
models:
  echo:
    engine: echo
    options: {max_running: 2, echo_tpot_ms: 40}
    scale: {min: 0, max: 3, policy: hpa, price_per_hour: 3.2}
"""
FIXED = "models:\n  echo: {engine: echo, scale: {min: 1, max: 3, policy: fixed}}\n"
Serve = Callable[..., Service]


def row(service: Service) -> dict[str, Any]:
    return json.loads(service.run("scale", "show", "echo", "--json").stdout)["rows"][0]


def ready(service: Service) -> int:
    return row(service)["ready"]


def sentences(service: Service) -> list[str]:
    rows = json.loads(service.run("scale", "why", "echo", "--limit", "200", "--json").stdout)["rows"]
    return [r["choice"]["sentence"] for r in rows]


def replica_pids(service: Service) -> dict[str, int]:
    return {r["id"]: r["pid"] for r in admin(service, "api/v1/status")["replicas"]}


def back(service: Service) -> bool:
    """Control answers again."""
    try:
        return bool(admin(service, "api/v1/status")["ready"])
    except OSError:
        return False


def test_a_model_at_zero_holds_a_request_grows_under_load_and_is_back_at_zero_when_idle(serve: Serve) -> None:
    service = serve(ZERO)
    assert service.pids["replica"] == []
    assert ready(service) == 0

    first = chat(service, "wake up", max_tokens=3).join(60)
    assert (first.status, first.finish) == (200, "length")
    assert any("1 request waiting and no replica there" in s and "+¥3.20/h" in s for s in sentences(service))

    streams = [stream(service, f"run {i}", max_tokens=1200) for i in range(6)]
    wait_for(lambda: ready(service) == 3, "three replicas", 60.0)
    told = row(service)
    assert told["in_flight"] == 6
    assert told["traits"]["slots"] <= 2
    assert told["cost_per_hour"] == 9.6
    assert told["starts"] >= 1
    for answer in streams:
        answer.leave()

    wait_for(lambda: row(service)["ready"] + row(service)["starting"] == 0, "zero replicas", 60.0)
    assert any("to 0 replicas: nothing came for" in s for s in sentences(service))
    shadows = json.loads(service.run("scale", "show", "--shadows", "--json").stdout)["rows"]
    assert {r["policy"] for r in shadows} >= {"knative", "ray"}
    assert any(r["real"] and r["replica_hours"] > 0 for r in shadows)
    assert chat(service, "again", max_tokens=2).join(60).status == 200


def test_a_count_set_by_hand_survives_the_death_of_control_and_ends_when_it_is_cleared(serve: Serve) -> None:
    service = serve(FIXED)
    service.run("scale", "set", "echo", "3", "--for", "2h")
    wait_for(lambda: ready(service) == 3, "three replicas")
    before = replica_pids(service)
    os.kill(service.pids["control"][0], signal.SIGKILL)
    wait_for(lambda: back(service) and ready(service) == 3, "control is back")
    assert row(service)["override"]["count"] == 3
    assert replica_pids(service) == before
    service.run("scale", "clear", "echo")
    wait_for(lambda: len(replica_pids(service)) == 1, "one replica")
    assert set(replica_pids(service).items()) <= set(before.items())


def test_a_count_outside_the_bounds_is_refused_with_what_to_change(serve: Serve) -> None:
    service = serve(FIXED)
    done = service.run("scale", "set", "echo", "4", check=False)
    assert done.returncode == 4
    assert "error[E609]: echo: 4 replicas are outside 1 to 3" in done.stderr
    assert "models.echo.scale" in done.stderr


def test_when_control_dies_after_it_decided_the_next_one_decides_the_same_and_doubles_nothing(serve: Serve) -> None:
    service = serve(FIXED)
    service.config.write_text(FIXED.replace("min: 1", "min: 3"), encoding="utf-8")
    service.run("apply", "-f", str(service.config))
    os.kill(service.pids["control"][0], signal.SIGKILL)
    wait_for(lambda: back(service) and ready(service) == 3, "three replicas")
    assert sorted(replica_pids(service)) == ["echo-0", "echo-1", "echo-2"]


def test_a_second_control_waits_for_the_first_and_requests_are_served_meanwhile(serve: Serve) -> None:
    service = serve(FIXED)
    dead = service.pids["control"][0]
    with open(service.state / "control.lock", "rb+") as lock:
        os.kill(dead, signal.SIGKILL)

        def taken() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        # Whoever comes first has it; where that is the successor, the next death gives another chance.
        def ours() -> bool:
            if taken():
                return True
            holder = int((service.state / "control.lock").read_text() or 0)
            if holder != dead and back(service):
                os.kill(holder, signal.SIGKILL)
            return False

        wait_for(ours, "the lock", 60.0)
        log = service.state / "log" / "control.log"
        wait_for(lambda: "another control" in log.read_text(), "the second control says that it waits")
        assert chat(service, "meanwhile", max_tokens=2).join().status == 200
        fcntl.flock(lock, fcntl.LOCK_UN)
    wait_for(lambda: back(service), "the second control acts")
    assert sorted(replica_pids(service)) == ["echo-0"]


def test_what_control_learnt_is_kept_at_a_clean_end_and_read_at_the_next_start(serve: Serve) -> None:
    service = serve(FIXED)

    def measured() -> bool:  # what a gateway counted before control first heard of it is left out
        assert chat(service, "learn", max_tokens=2).join().status == 200
        return row(service)["traits"].get("learnt") == "measured"

    wait_for(measured, "a measured service time")
    starts = row(service)["starts"]
    service.run("down")
    kept = service.state / "scaling.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    again = serve(FIXED)
    assert row(again)["traits"]["learnt"] == "measured"
    wait_for(lambda: row(again)["starts"] == starts + 1, "the second start is measured too")
