"""What gateways of a host count together: turns, seats that outlive nobody, rows; and two real ones under one limit."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from neaptide.errors import ProcessError, RequestError
from neaptide.gateway import counters as shared
from neaptide.gateway.call import Call
from neaptide.gateway.counters import HEADER, LOOKS, ROWS, USED, Counters
from neaptide.gateway.follow import save_table
from neaptide.gateway.quota import FLIGHT, ROW, SEATS, Permit
from neaptide.gateway.throttle import Throttle
from neaptide.table import Quota, Table
from tests.gateway_kit import FakeReplica, chat, key_row, post, reply_by_body, run, table, until
from tests.test_gateway_process import Process, begun, endless


@pytest.fixture
def fd() -> Iterator[int]:
    made = shared.create()
    yield made
    os.close(made)


def row(counters: Counters, name: str, now: float = 1000.0) -> int | None:
    with counters:
        return counters.row(counters.id_of(name), now)


# --- turns


HAMMER = """
import os, sys
from neaptide.gateway.counters import Counters
from neaptide.gateway.quota import Bounds, Bucket, Permit, admit
from neaptide.table import Quota
counters = Counters(int(sys.argv[1]))
print("sits", flush=True)
sys.stdin.readline()
id, admitted = counters.id_of("key:k"), 0
for _ in range(1500):
    with counters as cells:
        at = counters.row(id, 1000.0)
        bounds = Bounds((Bucket(Quota("key", 2000, 10**9, 10**9), id, at),))
        admitted += isinstance(admit(cells, bounds, counters.seat, counters.seats, 3, 1000.0), Permit)
print(admitted, cells[at + 2], flush=True)
os._exit(0)
"""


def test_processes_that_ask_at_once_get_exactly_what_the_limit_has(fd: int) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "sits\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in running]
    assert sum(int(admitted) for admitted, _ in told) == max(int(counted) for _, counted in told) == 2000


def test_a_gateway_that_is_stopped_in_its_turn_stops_no_other(fd: int) -> None:
    stopped, mine = Counters(fd), Counters(fd)
    stopped.__enter__()
    assert row(mine, "key:a") is not None
    stopped.__exit__()
    with mine, pytest.raises(BlockingIOError):  # and its turn is its own again
        fcntl.flock(stopped._fd or 0, fcntl.LOCK_EX | fcntl.LOCK_NB)
    stopped.close()
    mine.close()


# --- seats


def test_gateways_sit_apart_and_who_leaves_takes_what_it_had_in_flight(fd: int) -> None:
    first, second = Counters(fd), Counters(fd)
    assert (first.seat, second.seat, first.seats) == (0, 1, 2)
    at = row(second, "key:a")
    assert at is not None
    second.cells[at + FLIGHT + second.seat] = 7
    assert first.cells[at + FLIGHT + 1] == 7
    assert first.free_dead() == 0  # it lives
    assert first.cells[at + FLIGHT + 1] == 7
    second.close()
    assert first.cells[at + FLIGHT + 1] == 0
    third = Counters(fd)
    assert (third.seat, third.seats) == (1, 2)
    third.close()
    first.close()


def test_a_gateway_beyond_the_last_seat_is_refused_by_name(fd: int) -> None:
    sitting = [Counters(fd) for _ in range(SEATS)]
    with pytest.raises(ProcessError, match=f"{SEATS} gateways count in the same limits already"):
        Counters(fd)
    for counters in sitting:
        counters.close()


def test_alone_there_is_nobody_to_look_after() -> None:
    alone = Counters()
    assert (alone.seat, alone.seats, alone.free_dead()) == (0, 1, 0)
    assert row(alone, "key:a") == HEADER
    alone.close()


# --- rows


def test_a_name_has_one_row_whoever_asks(fd: int) -> None:
    first, second = Counters(fd), Counters(fd)
    names = [f"key:{i}" for i in range(20)]
    mine = [row(first, name) for name in names[:15]]
    theirs = [row(second, name) for name in reversed(names)][::-1]
    assert theirs[:15] == mine
    assert [row(first, name) for name in names] == theirs
    assert len(set(theirs)) == 20
    first.close()
    second.close()


def test_where_all_rows_are_used_an_idle_one_is_taken_over_and_all_notice(fd: int) -> None:
    first, second = Counters(fd), Counters(fd)
    was = row(first, "key:old")
    assert row(second, "key:old") == was == HEADER
    first.cells[USED] = ROWS
    first.cells[shared.NEXT] = ROWS - 1  # the next one looked at is that of the old key
    assert row(first, "key:new") == was
    assert row(second, "key:new") == was
    again = row(second, "key:old")
    assert again == HEADER + ROW
    assert row(first, "key:old") == again
    first.close()
    second.close()


def test_where_no_row_is_idle_a_request_is_refused_and_not_let_in_uncounted() -> None:
    alone = Counters()
    alone.cells[USED] = ROWS
    for number in range(1, LOOKS + 1):
        alone.cells[HEADER + number * ROW + FLIGHT + SEATS - 1] = 1
    with pytest.raises(RequestError, match=f"More than {ROWS} keys") as caught:
        Throttle(alone).admit(key_row(quotas=(Quota("key", 1),)), Call(1000.0), 1000.0)
    assert (caught.value.status, caught.value.slug) == (429, "rate_limit_exceeded")


def test_a_row_that_was_taken_over_is_found_anew() -> None:
    alone, call = Counters(), Call(1000.0)
    throttle, key = Throttle(alone), key_row(quotas=(Quota("key", 5),))
    permit = throttle.admit(key, call, 1000.0)
    ((id, at),) = permit.bounds.rows
    alone.cells[at] = 12345  # somebody else's, long after
    found = throttle.admit(key, call, 1100.0)
    assert isinstance(found, Permit)
    ((found_id, found_at),) = found.bounds.rows
    assert found_at != at
    assert alone.cells[found_at] == found_id == id


# --- two gateways


@asynccontextmanager
async def pair(held: Table, fd: int, tmp_path: Path) -> AsyncIterator[tuple[Process, Process]]:
    processes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_table(tmp_path / name / "table.json", held)
        processes.append(Process(tmp_path / name, counters_fd=fd))
    try:
        for process in processes:
            await process.ready()
        yield processes[0], processes[1]
    finally:
        logs = [process.stop() for process in processes]
        assert not any("Traceback" in log for log in logs), logs


def test_two_gateways_let_in_together_what_one_may(fd: int, tmp_path: Path) -> None:
    async def main() -> None:
        replica = await FakeReplica(reply_by_body).start()
        keys = [key_row(quotas=(Quota("key", 7),))]
        async with pair(table([f"http://127.0.0.1:{replica.port}/v1"], keys=keys), fd, tmp_path) as both:
            answers = await asyncio.gather(*(both[i % 2].ask(post(chat())) for i in range(20)))
            assert sorted(a.status for a in answers) == [200] * 7 + [429] * 13
            assert len(replica.asked) == 7
            remaining = {int(a.headers["x-ratelimit-remaining-requests"]) for a in answers if a.status == 200}
            assert remaining == set(range(7))
        await replica.stop()

    run(main(), uv=False)


def test_what_a_killed_gateway_had_in_flight_is_free_and_what_it_counted_stays(fd: int, tmp_path: Path) -> None:
    async def main() -> None:
        replica = await FakeReplica(endless).start()
        keys = [key_row(quotas=(Quota("key", 4, None, 2),))]
        async with pair(table([f"http://127.0.0.1:{replica.port}/v1"], keys=keys), fd, tmp_path) as (doomed, other):
            streams = [await begun(doomed) for _ in range(2)]
            full = await other.ask(post(chat(stream=True)))
            assert (full.status, full.code) == (429, "rate_limit_exceeded")
            assert "2 requests at once (concurrency)" in full.json["error"]["message"]
            watch = Counters(fd)  # before its seat is free
            at = row(watch, "key:" + keys[0].id)
            assert at is not None
            assert sum(watch.cells[at + FLIGHT : at + FLIGHT + SEATS]) == 2
            doomed.popen.send_signal(signal.SIGKILL)
            await doomed.wait()
            await until(lambda: not any(watch.cells[at + FLIGHT : at + FLIGHT + SEATS]))
            streams += [await begun(other) for _ in range(2)]
            over = await other.ask(post(chat(stream=True)))
            assert "4 requests a minute (rpm)" in over.json["error"]["message"]
            for client in streams:
                client.close()
            watch.close()
        await replica.stop()

    run(main(), uv=False)
