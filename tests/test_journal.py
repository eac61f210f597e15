"""The writer: order, one write a turn, segments, what a killed process leaves."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from neaptide.errors import StorageError
from neaptide.journal import MAX_RECORD, Journal, Located, scan, segments, writer_alive
from neaptide.types import Begin, Usage

SEGMENT = 16 * MAX_RECORD


def on_loop(body: Callable[[], Awaitable[None]], *, uv: bool = False) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uv else None) as runner:
        runner.run(body())


def everything(directory: Path) -> list[Located]:
    found: list[Located] = []
    for segment in segments(directory):
        offset, done = 0, False
        while not done:
            part = scan(directory, segment, offset, finished=True)
            assert part.gaps == []
            found += part.records
            offset, done = part.offset, part.done
    return found


@pytest.mark.parametrize("uv", [False, True])
def test_records_are_read_back_in_order_across_segments(tmp_path: Path, uv: bool) -> None:
    written: list[Begin | Usage] = []

    async def body() -> None:
        journal = Journal(tmp_path / "j", SEGMENT, asyncio.get_running_loop())
        for i in range(600):
            begin = Begin(request_id=f"r{i}", model="m" * (i % 50))
            end = Usage(request_id=f"r{i}", output_tokens=i, error="e" * (i * 7 % 300))
            journal.begin(begin)
            journal.end(end)
            written.extend([begin, end])
            if i % 9 == 0:
                await asyncio.sleep(0)
        await journal.close()

    on_loop(body, uv=uv)
    assert [r.value for r in everything(tmp_path / "j")] == written
    assert len(segments(tmp_path / "j")) > 2
    assert not list((tmp_path / "j").glob("spare*"))
    assert not writer_alive(tmp_path / "j")


def test_callbacks_run_in_order_after_their_records_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        over = asyncio.Event()

        def then(i: int) -> None:
            seen.append((i, len(scan(tmp_path, 1, 0, finished=False).records)))
            if i == 4:
                over.set()

        for i in range(5):
            journal.end(Usage(request_id=f"r{i}"), lambda i=i: then(i))
        assert seen == []
        await over.wait()
        await journal.close()

    on_loop(body)
    assert seen == [(i, 5) for i in range(5)]


def test_a_callback_that_raises_does_not_cost_the_others_theirs(tmp_path: Path) -> None:
    reported: list[str] = []
    ran: list[int] = []

    async def body() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        journal = Journal(tmp_path, SEGMENT, loop)
        journal.end(Usage(request_id="a"), lambda: 1 / 0)
        journal.end(Usage(request_id="b"), lambda: ran.append(1))
        await journal.close()

    on_loop(body)
    assert ran == [1]
    assert reported == ["division by zero"]


def test_a_callback_may_write_the_next_record(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        over = asyncio.Event()
        journal.end(Usage(request_id="a"), lambda: journal.end(Usage(request_id="b"), over.set))
        await over.wait()
        await journal.close()

    on_loop(body)
    assert [r.value.request_id for r in everything(tmp_path)] == ["a", "b"]


def test_a_burst_larger_than_a_segment_in_one_turn_is_written_whole(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        for i in range(200):
            journal.begin(Begin(request_id=f"r{i}"))
        for i in range(200):
            journal.end(Usage(request_id=f"r{i}", error="x" * 3000))
        await journal.close()

    on_loop(body)
    assert len(everything(tmp_path)) == 400


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        assert writer_alive(tmp_path)
        with pytest.raises(StorageError, match="another process writes"):
            Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        await journal.close()
        assert not writer_alive(tmp_path)
        with pytest.raises(StorageError, match="closed"):
            journal.end(Usage(request_id="late"))

    on_loop(body)


def test_a_journal_opened_again_goes_on_in_a_new_segment(tmp_path: Path) -> None:
    async def body() -> None:
        for i in range(3):
            journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
            journal.end(Usage(request_id=f"r{i}"))
            await journal.close()

    on_loop(body)
    assert [r.value.request_id for r in everything(tmp_path)] == ["r0", "r1", "r2"]
    assert segments(tmp_path) == [1, 2, 3]


KILLED = """
import asyncio, sys
from pathlib import Path
from neaptide.journal import Journal
from neaptide.types import Begin, Usage

async def main():
    journal = Journal(Path(sys.argv[1]), 1 << 16, asyncio.get_running_loop())
    i = 0
    while True:
        journal.begin(Begin(request_id=f"r{i}"))
        journal.end(Usage(request_id=f"r{i}", error="x" * (i % 200)), lambda i=i: print(i, flush=True))
        await asyncio.sleep(0)
        i += 1

asyncio.run(main())
"""


def test_what_a_client_was_told_is_in_the_journal_of_a_killed_gateway(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(700)]
    assert writer_alive(tmp_path)
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()
    ends = {r.value.request_id for r in everything(tmp_path) if isinstance(r.value, Usage)}
    assert {f"r{i}" for i in told} <= ends
    assert not writer_alive(tmp_path)
