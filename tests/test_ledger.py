"""The ledger's contract, the same on SQLite and PostgreSQL: each request once, whatever is read twice."""

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neaptide.clock import VirtualClock
from neaptide.cost import schema
from neaptide.cost.ledger import Ledger, Position, UsageFilter, open_ledger
from neaptide.cost.prices import Rate
from neaptide.errors import RequestError, StorageError
from neaptide.journal import Located, decode, encode
from neaptide.types import Attempt, Begin, Usage

POSTGRES = os.environ.get("NEAPTIDE_TEST_POSTGRES_URL", "")
MEMORY = Path("/dev/shm")
NOW_S = 1_790_000_000.0  # 2026-09-21 14:13:20 UTC
HOUR_S = 3600
Make = Callable[[], Ledger]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Empties the ledger and opens it anew: hypothesis asks for hundreds."""
    space = f"test_{secrets.token_hex(6)}"
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name, contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres_schema(space)) if request.param == "postgresql" else ""
        opened = open_ledger(url, Path(name), VirtualClock(wall_s=NOW_S))
        stack.callback(opened.close)

        def make() -> Ledger:
            with opened.database.write() as connection:
                for table in reversed(schema.metadata.sorted_tables):
                    if table.name not in ("organisations", "teams", "projects"):
                        connection.execute(table.delete())
            return Ledger(opened.database, VirtualClock(wall_s=NOW_S))

        yield make


@contextlib.contextmanager
def postgres_schema(name: str) -> Iterator[str]:
    """The URL of a schema of its own in a real PostgreSQL."""
    if not POSTGRES:
        pytest.skip("POSTGRESQL NOT TESTED: set NEAPTIDE_TEST_POSTGRES_URL=postgresql://user@host/database")
    engine = sa.create_engine(sa.make_url(POSTGRES).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(name))
    yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}options=-csearch_path%3D{name}%20-csynchronous_commit%3Doff"
    with engine.begin() as connection:
        connection.execute(sa.schema.DropSchema(name, cascade=True))
    engine.dispose()


@pytest.fixture
def ledger(make: Make) -> Ledger:
    return make()


def located(*records: Begin | Usage, start: int = 0) -> list[Located]:
    """As a journal's reader would find them."""
    out: list[Located] = []
    for record in records:
        line = encode(record)
        out.append(Located(start, start + len(line), decode(line)))
        start += len(line)
    return out


def take(ledger: Ledger, *records: Begin | Usage, journal: str = "gateway-0-1", segment: int = 1) -> int:
    at = ledger.position(journal)
    batch = located(*records, start=at.offset if at.segment == segment else 0)
    return ledger.take(journal, segment, batch, batch[-1].end).rows


def tables(ledger: Ledger) -> dict[str, Any]:
    """Everything in the ledger but the times at which it was written."""
    out = {}
    with ledger.database.read() as connection:
        for table in (schema.usage, schema.charges, schema.hourly, schema.open_begins, schema.journal_offsets):
            columns = [c for c in table.columns if c.name != "updated_s"]
            rows = connection.execute(sa.select(*columns))
            out[table.name] = sorted(tuple(map(str, row)) for row in rows)
    return out


# -- exactly once


@st.composite
def journals(draw: st.DrawFn) -> list[list[Located]]:
    """Segments of a journal: begins, their ends somewhere later, ends without begin, and begins that stay open."""
    ids = draw(st.lists(st.integers(0, 99), unique=True, max_size=12))
    events: list[tuple[float, Begin | Usage]] = []
    for i in ids:
        kind = draw(st.sampled_from(["both", "both", "open", "refused"]))
        at = draw(st.floats(0, 1))
        tenant = draw(st.sampled_from(["a", "b"]))
        if kind != "refused":
            events.append((at, Begin(request_id=f"r{i:02}", tenant=tenant, model="m")))
        if kind != "open":
            outcome = "refused" if kind == "refused" else draw(st.sampled_from(["ok", "error", "aborted"]))
            tokens = draw(st.integers(0, 5000))
            usage = Usage(
                request_id=f"r{i:02}",
                tenant=tenant,
                model="m",
                outcome=outcome,
                output_tokens=tokens,
                started_wall_s=NOW_S + at * 2 * HOUR_S,
            )
            events.append((at + draw(st.floats(0.001, 1)), usage))
    records = [record for _, record in sorted(events, key=lambda e: e[0])]
    cut = draw(st.integers(0, len(records)))
    return [located(*records[:cut]), located(*records[cut:])]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=journals(), data=st.data())
def test_any_split_into_batches_with_any_replays_leaves_the_same_tables(
    make: Make, segments: list[list[Located]], data: st.DataObject
) -> None:
    ledger = make()
    ledger.set_prices({"m": Rate(0, 0, 7_000_000)}, "CNY")
    for number, records in enumerate(segments, 1):
        if records:
            ledger.take("j", number, records, records[-1].end)
    expected = tables(ledger)

    ledger = make()
    ledger.set_prices({"m": Rate(0, 0, 7_000_000)}, "CNY")
    for number, records in enumerate(segments, 1):
        done = 0
        while done < len(records):
            first = data.draw(st.integers(0, done), label="from, at most where we are")
            done = data.draw(st.integers(done + 1, len(records)), label="to")
            part = records[first:done]
            ledger.take("j", number, part, part[-1].end)
            if data.draw(st.booleans(), label="all up to here again"):
                for earlier in range(1, number + 1):
                    again = segments[earlier - 1][:done] if earlier == number else segments[earlier - 1]
                    if again:
                        assert ledger.take("j", earlier, again, again[-1].end) == (0, 0)
    assert tables(ledger) == expected


def test_the_same_request_in_two_journals_is_one_row(ledger: Ledger) -> None:
    assert take(ledger, Usage(request_id="r1", output_tokens=5), journal="a-1") == 1
    assert take(ledger, Usage(request_id="r1", output_tokens=9), journal="b-1") == 0
    assert take(ledger, Usage(request_id="r2"), Usage(request_id="r2", output_tokens=9), journal="c-1") == 1
    assert [r.usage.output_tokens for r in ledger.usage().receipts] == [0, 5]
    assert ledger.count() == 2


def test_a_row_comes_back_as_it_went_in(ledger: Ledger) -> None:
    usage = Usage(
        request_id="r1",
        client_id="Ünïcode ☃ 𝄞",
        tenant="t",
        project="p",
        key="k",
        model="m",
        revision="m@1",
        priority="high",
        route="chat.completions",
        stream=True,
        prompt_bytes=2**40,
        max_tokens=2**63 - 1,
        prompt_tokens=7,
        cached_tokens=3,
        reasoning_tokens=2,
        output_tokens=11,
        started_wall_s=1_790_000_000.123456,
        arrived_mono_s=12345.678901234,
        queued_s=0.001,
        ttft_s=0.1,
        tpot_s=0.01,
        itl_max_s=0.2,
        engine_s=1.5,
        kv_token_s=99.5,
        duration_s=2.5,
        outcome="aborted",
        status=200,
        finish="abort",
        error="client_left",
        degraded="shorter",
        cache="stale",
        price_millis=250,
        attempts=(Attempt("m-0", 4), Attempt("m-1", 7)),
    )
    take(ledger, usage)
    assert ledger.usage().receipts[0].usage == usage


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters() | st.just("\0"), max_size=20), min_size=8, max_size=8),
    counts=st.lists(st.integers(-(2**70), 2**70), min_size=7, max_size=7),
    started=st.floats(),
    outcome=st.sampled_from(["ok", "refused", "error", "aborted", "timeout", "lost"]),
)
def test_no_record_is_refused_by_the_database(
    ledger: Ledger, texts: list[str], counts: list[int], started: float, outcome: Any
) -> None:
    """One that were would hold up its journal for ever."""
    ledger.set_prices({"m": Rate(10**15, 10**15, 10**15)}, "CNY")
    name = secrets.token_hex(8)
    usage = Usage(
        request_id=name + texts[0][:6],  # ids are ours, of 26 characters
        client_id=texts[1],
        tenant=texts[2],
        key=texts[3],
        error=texts[4],
        finish=texts[5],
        attempts=(Attempt(texts[6], 1),),
        project=texts[7],
        model="m",
        outcome=outcome,
        prompt_tokens=counts[0],
        cached_tokens=counts[1],
        output_tokens=counts[2],
        prompt_bytes=counts[3],
        max_tokens=counts[4],
        status=counts[5],
        reasoning_tokens=counts[6],
        started_wall_s=started,
    )
    assert take(ledger, Begin(request_id=name + texts[0][:6], tenant=texts[2]), usage, journal=f"j{name}") == 1
    assert take(ledger, Begin(request_id=f"open{name}" + texts[0][:6], tenant=texts[2]), journal=f"j{name}") == 0
    assert len(ledger.open_begins(f"j{name}")) == 1


def test_two_that_take_the_same_journal_at_once_take_it_once(ledger: Ledger) -> None:
    """Two controls for a moment, as in a restart; beside somebody who writes something else."""
    records = located(*(Usage(request_id=f"r{i:03}", output_tokens=1) for i in range(400)))
    other = Ledger(ledger.database, VirtualClock(wall_s=NOW_S))
    start = threading.Barrier(3)

    def take_all(mine: Ledger) -> int:
        start.wait()
        batches = [records[i : i + 20] for i in range(0, 400, 20)]
        return sum(mine.take("j", 1, batch, batch[-1].end).rows for batch in batches)

    def set_prices() -> int:
        start.wait()
        return max(ledger.set_prices({"m": Rate(i, i, i)}, "CNY") for i in range(1, 11))

    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(take_all, ledger), pool.submit(take_all, other)]
        assert pool.submit(set_prices).result(60) == 10
        assert sum(future.result(60) for future in taken) == 400
    assert ledger.count() == 400
    assert sum(t.output_tokens for t in ledger.totals("tenant")) == 400


# -- what stays open


def test_begins_without_end_are_kept_and_closed_once(ledger: Ledger) -> None:
    begins = [Begin(request_id=f"r{i}", replica="m-0") for i in range(3)]
    take(ledger, *begins)
    take(ledger, Usage(request_id="r1"))
    assert [b.request_id for b in ledger.open_begins("gateway-0-1")] == ["r0", "r2"]
    assert ledger.open_begins("another-1") == ()
    ended = [Usage(request_id=f"r{i}", outcome="lost") for i in range(3)]
    assert ledger.close_begins("gateway-0-1", ended) == 2
    assert ledger.close_begins("gateway-0-1", ended) == 0
    assert ledger.open_begins("gateway-0-1") == ()
    outcomes = {r.usage.request_id: r.usage.outcome for r in ledger.usage().receipts}
    assert outcomes == {"r0": "lost", "r1": "ok", "r2": "lost"}


def test_the_position_only_moves_forward(ledger: Ledger) -> None:
    records = located(Usage(request_id="a"), Usage(request_id="b"))
    assert ledger.position("j") == Position(0, 0)
    ledger.take("j", 2, records, records[-1].end)
    ledger.take("j", 1, located(Usage(request_id="c")), 10**6)
    ledger.take("j", 2, records[:1], records[0].end)
    assert ledger.position("j") == Position(2, records[-1].end)
    assert ledger.count() == 2


# -- prices


def test_a_changed_price_is_a_new_version_for_what_starts_then(ledger: Ledger) -> None:
    clock = ledger._clock
    assert isinstance(clock, VirtualClock)
    rate = Rate(prompt_nanos=1_000_000_000, cached_nanos=100_000_000, output_nanos=3_000_000_000)
    assert ledger.set_prices({"m": rate}, "CNY") == 1
    assert ledger.set_prices({"m": rate}, "CNY") == 1
    clock.advance(100)
    assert ledger.set_prices({"m": Rate(0, 0, 6_000_000_000)}, "CNY") == 2
    counts = {"model": "m", "prompt_tokens": 100, "cached_tokens": 40, "output_tokens": 10}
    take(
        ledger,
        Usage(request_id="r1", started_wall_s=NOW_S - 10**6, **counts),
        Usage(request_id="r2", started_wall_s=NOW_S + 99.9, **counts),
        Usage(request_id="r3", started_wall_s=NOW_S + 100, **counts),
        Usage(request_id="r4", started_wall_s=NOW_S + 100, outcome="error", **counts),
        Usage(request_id="r5", started_wall_s=NOW_S + 100, **{**counts, "model": "free"}),
    )
    found = {r.usage.request_id: (r.usage.price_version, r.amount_nanos) for r in ledger.usage().receipts}
    old = 60 * 1000 + 40 * 100 + 10 * 3000
    assert found == {"r1": (1, old), "r2": (1, old), "r3": (2, 60_000), "r4": (2, None), "r5": (2, None)}
    assert sum(t.amount_nanos for t in ledger.totals("model")) == 2 * old + 60_000


def test_prices_survive_reopening_and_their_removal_is_a_version_too(make: Make, tmp_path: Path) -> None:
    ledger = make()
    assert ledger.set_prices({}, "CNY") == 0
    ledger.set_prices({"m": Rate(1, 1, 1)}, "CNY")
    again = Ledger(ledger.database, VirtualClock(wall_s=NOW_S))
    assert again.set_prices({"m": Rate(1, 1, 1)}, "CNY") == 1
    assert again.set_prices({}, "CNY") == 2
    assert again.set_prices({}, "EUR") == 3


# -- reports


def fill(ledger: Ledger) -> list[Usage]:
    rows = [
        Usage(
            request_id=f"{i:04}",
            tenant=f"t{i % 2}",
            project="p",
            key=f"k{i % 3}",
            model="m" if i % 5 else "n",
            outcome=("ok", "error", "aborted", "timeout", "lost")[i % 5],
            prompt_tokens=i,
            output_tokens=2 * i,
            started_wall_s=NOW_S + i * 600,
        )
        for i in range(300)
    ]
    ledger.set_prices({"m": Rate(10**9, 10**9, 10**9)}, "CNY")
    take(ledger, *rows)
    return rows


def test_pages_show_every_row_once_newest_first(ledger: Ledger) -> None:
    rows = fill(ledger)
    seen, cursor, pages = [], None, 0
    while True:
        page = ledger.usage(cursor=cursor, limit=70)
        seen += [r.usage.request_id for r in page.receipts]
        pages += 1
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [r.request_id for r in reversed(rows)]
    assert pages == 5


@pytest.mark.parametrize("cursor", ["x", "nan~a", "~", "inf~", "\0~\0"])
def test_a_cursor_of_somebody_elses_is_refused(ledger: Ledger, cursor: str) -> None:
    with pytest.raises(RequestError, match="not a cursor of ours") as caught:
        ledger.usage(cursor=cursor)
    assert caught.value.status == 400


def test_requests_that_started_together_are_paged_once_each(ledger: Ledger) -> None:
    take(ledger, *(Usage(request_id=f"r{i}", started_wall_s=NOW_S + 0.1) for i in range(7)))
    seen, cursor = [], ""
    for _ in range(4):
        page = ledger.usage(cursor=cursor, limit=2)
        seen += [r.usage.request_id for r in page.receipts]
        cursor = page.cursor or ""
    assert seen == [f"r{i}" for i in reversed(range(7))]


@pytest.mark.parametrize(
    "where",
    [
        {"tenant": "t1"},
        {"key": "k2", "model": "n"},
        {"outcome": "lost"},
        {"since_s": NOW_S + 1000, "until_s": NOW_S + 50_000.5},
        {"project": "p", "since_s": NOW_S + 60_000},
        {"tenant": "nobody"},
    ],
)
def test_pages_and_totals_agree_with_a_fold_over_the_rows(ledger: Ledger, where: dict[str, Any]) -> None:
    rows = [
        r
        for r in fill(ledger)
        if all(getattr(r, n) == v for n, v in where.items() if not n.endswith("_s"))
        and where.get("since_s", 0) <= r.started_wall_s < where.get("until_s", 1e18)
    ]
    found = ledger.usage(UsageFilter(**where), limit=1000).receipts
    assert [r.usage.request_id for r in found] == [r.request_id for r in reversed(rows)]
    for by in ("tenant", "project", "key", "model", "outcome"):
        totals = ledger.totals(by, UsageFilter(**where))  # type: ignore[arg-type]
        names = sorted({getattr(r, by) for r in rows})
        assert [t.name for t in totals] == names
        for total in totals:
            mine = [r for r in rows if getattr(r, by) == total.name]
            assert total.requests == len(mine)
            assert total.output_tokens == sum(r.output_tokens for r in mine)
            assert total.failed == sum(r.outcome in ("error", "timeout", "lost") for r in mine)
        assert sum(t.amount_nanos for t in totals) == sum(r.amount_nanos or 0 for r in found)


def test_totals_by_day_are_of_utc_days(ledger: Ledger) -> None:
    midnight = 1_790_035_200.0  # 2026-09-22
    times = (midnight - 1, midnight, midnight + 86_399, midnight + 86_400)
    take(ledger, *(Usage(request_id=f"r{i}", started_wall_s=s) for i, s in enumerate(times)))
    assert [(t.name, t.requests) for t in ledger.totals("day")] == [
        ("2026-09-21", 1),
        ("2026-09-22", 2),
        ("2026-09-23", 1),
    ]
    within = UsageFilter(since_s=midnight - 0.5, until_s=midnight + 86_400.5)
    assert [(t.name, t.requests) for t in ledger.totals("day", within)] == [("2026-09-22", 2), ("2026-09-23", 1)]


def test_names_that_clients_invent_do_not_become_totals(ledger: Ledger) -> None:
    take(
        ledger,
        *(Usage(request_id=f"r{i}", model=f"guess-{i}", outcome="refused", status=404) for i in range(5)),
        Usage(request_id="busy", model="m", outcome="refused", status=429),
    )
    assert [(t.name, t.refused) for t in ledger.totals("model")] == [("", 5), ("m", 1)]
    some = UsageFilter(since_s=-0.5, until_s=0.5)
    assert [(t.name, t.refused) for t in ledger.totals("model", some)] == [("", 5), ("m", 1)]
    assert len(ledger.usage(UsageFilter(model="guess-3")).receipts) == 1  # the row itself says what was asked for


def test_forgotten_rows_leave_their_sums(ledger: Ledger) -> None:
    rows = fill(ledger)
    before = ledger.totals("model")
    gone = ledger.forget(NOW_S + 100 * 600)
    assert gone == 100
    assert ledger.totals("model") == before
    assert len(ledger.usage(limit=1000).receipts) == len(rows) - 100
    with ledger.database.read() as connection:
        left = connection.scalar(sa.select(sa.func.count()).select_from(schema.charges))
    assert left == sum(r.amount_nanos is not None for r in ledger.usage(limit=1000).receipts)


# -- what a driver keeps


def test_batches_of_every_size_are_the_same_statements(ledger: Ledger) -> None:
    take(ledger, Usage(request_id="first"))
    said = []
    for size in (1, 2, 30):
        with heard(ledger) as statements:
            open_close_and_forget(ledger, size)
        said.append(statements)
    assert said[0] == said[1] == said[2]


@contextlib.contextmanager
def heard(ledger: Ledger) -> Iterator[set[str]]:
    """The statements of the block, as the driver gets them: it may keep each prepared."""
    statements: set[str] = set()

    def hear(*args: Any) -> None:
        statements.add(args[2])

    sa.event.listen(ledger.database.engine, "before_cursor_execute", hear)
    yield statements
    sa.event.remove(ledger.database.engine, "before_cursor_execute", hear)


def open_close_and_forget(ledger: Ledger, size: int) -> None:
    ids = [f"of{size}-{i}" for i in range(size)]
    take(ledger, *(Begin(request_id=i) for i in ids))
    assert take(ledger, *(Usage(request_id=i, started_wall_s=NOW_S - HOUR_S) for i in ids)) == size
    assert ledger.open_begins("gateway-0-1") == ()
    assert ledger.forget(NOW_S - 1) >= size


# -- failing


def test_a_database_that_fails_is_a_storage_error_and_leaves_nothing_half_done(ledger: Ledger) -> None:
    with ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE hourly RENAME TO hidden"))
    with pytest.raises(StorageError):
        take(ledger, Usage(request_id="r1"))
    with ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE hidden RENAME TO hourly"))
    assert ledger.position("gateway-0-1") == Position(0, 0)
    assert ledger.usage().receipts == ()
    assert take(ledger, Usage(request_id="r1")) == 1
