"""Streams whose replicas are killed under them, real processes: no stream broken, no token lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.conftest import Service
from tests.traffic import Answer, admin, rows_when, stream, wait_for

STREAMS, TOKENS = 64, 400
THREE = """
models:
  echo: {engine: echo, options: {echo_tpot_ms: 25, max_running: 32}, scale: {min: 3, max: 3}}
"""


def asked(service: Service) -> list[Answer]:
    usage = {"stream_options": {"include_usage": True}}
    return [stream(service, f"stream {i} says é and 船 ", max_tokens=TOKENS, **usage) for i in range(STREAMS)]


def ready(service: Service) -> dict[int, int]:
    """Requests that run, by the replica's process."""
    rows = admin(service, "api/v1/status")["replicas"]
    return {row["pid"]: row["running"] for row in rows if row["state"] == "ready"}


def test_64_streams_go_on_while_replica_after_replica_is_killed(serve: Callable[..., Service]) -> None:
    service = serve(THREE)
    wait_for(lambda: len(ready(service)) == 3, "three replicas")
    whole = [answer.join(60).text for answer in asked(service)]
    cut = asked(service)
    assert all(answer.first.wait(30) for answer in cut)
    for _ in range(3):
        busy = wait_for(lambda: ready(service), "a replica")
        killed = max(busy, key=lambda pid: busy[pid])
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda gone=killed: len(ready(service)) == 3 and gone not in ready(service), "three again", 30)
    for answer in cut:
        answer.join(60)
        assert (answer.error, answer.broken, answer.done, answer.finish) == ("", "", True, "length")
        assert answer.tokens == TOKENS
    assert [answer.text for answer in cut] == whole
    rows = rows_when(service, 2 * STREAMS)
    assert {row["output_tokens"] for row in rows} == {TOKENS}
    assert {sum(attempt.get("tokens", 0) for attempt in row["attempts"]) for row in rows} == {TOKENS}
    moved = [len(row["attempts"]) - 1 for row in rows]
    assert sum(count > 0 for count in moved) >= STREAMS // 4
    assert max(moved) >= 2
