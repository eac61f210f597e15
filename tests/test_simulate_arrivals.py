"""Where a simulation's arrivals come from: files of many formats, shapes without a file, and counts drawn from them."""

from __future__ import annotations

import functools
import gzip
import json
import os
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neaptide.clock import VirtualClock
from neaptide.control.port import UsagePage, UsageRow
from neaptide.cost.ledger import open_ledger
from neaptide.errors import ConfigError
from neaptide.journal import Located
from neaptide.simulate import logs
from neaptide.simulate.arrivals import Rates, Requests, capacity, join
from neaptide.simulate.columns import MOST_NAMES, Format, Tally, gather
from neaptide.simulate.counts import counts
from neaptide.simulate.formats import read
from neaptide.simulate.synthetic import Kind, synthetic
from neaptide.types import Usage

TRACES = Path(__file__).parent.parent / "examples" / "data"
SERVEGEN = TRACES / "servegen_client_rates.parquet"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return file


def requests(path: Path, series: str | None = None) -> Requests:
    found = read(path, series)
    assert isinstance(found, Requests)
    return found


def rates(path: Path, series: str | None = None) -> Rates:
    found = read(path, series)
    assert isinstance(found, Rates)
    return found


def error(path: Path, series: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(path, series)
    assert caught.value.fix
    return caught.value


# --------------------------------------------------------------------------------------------------- ServeGen


@pytest.fixture(scope="module")
def raw() -> dict[str, dict[int, float]]:
    """Sums of the file's rows, added up one by one: {series: {t_s: requests/s}}."""
    pq = pytest.importorskip("pyarrow.parquet", reason="the extra `simulate` is not installed")
    table = pq.read_table(SERVEGEN, columns=["model", "t_s", "rate_rps"]).to_pydict()
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for model, t_s, rps in zip(table["model"], table["t_s"], table["rate_rps"], strict=True):
        sums[model][t_s] += rps
    return sums


@pytest.mark.parametrize(("series", "windows", "holes"), [("m-large", 1296, 0), ("deepseek-r1", 144, 0)])
def test_a_series_of_servegen_is_the_sum_of_its_clients(
    raw: dict[str, dict[int, float]], series: str, windows: int, holes: int
) -> None:
    found = rates(SERVEGEN, series)
    assert (found.series, found.window_s, len(found.rates), found.filled) == (series, 600.0, windows, holes)
    assert found.rates == pytest.approx([raw[series][t] for t in range(0, windows * 600, 600)])


@pytest.mark.parametrize(("series", "holes"), [("m-mid", 42), ("m-small", 1)])
def test_windows_that_were_not_collected_are_filled_linearly(
    raw: dict[str, dict[int, float]], series: str, holes: int
) -> None:
    # Given a series with windows far under its usual rate, when read, then each lies between its neighbours.
    found = rates(SERVEGEN, series)
    sums = np.array([raw[series].get(t, 0.0) for t in range(0, 1296 * 600, 600)])
    hole = sums < 0.02 * np.median(sums)
    assert (int(hole.sum()), found.filled) == (holes, holes)
    assert found.rates[~hole] == pytest.approx(sums[~hole])
    inner = np.flatnonzero(hole)
    assert found.rates[inner] * 2 == pytest.approx(found.rates[inner - 1] + found.rates[inner + 1])
    assert found.clients is not None
    assert found.clients.sum(axis=0) == pytest.approx(found.rates)
    assert len(found.client_names) == len(found.clients)


def test_overdispersion_is_the_rate_weighted_square_of_the_clients_variation(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("t_s,client,rate_rps,cv\n0,a,3,1\n0,b,1,20\n600,a,4,2\n")
    found = rates(path)
    assert found.dispersion == pytest.approx((3 * 1 + 1 * 100 + 4 * 4) / 8)
    assert list(found.rates) == [4.0, 4.0]
    assert found.clients is not None
    assert found.clients.tolist() == [[3.0, 4.0], [1.0, 0.0]]  # a missing window is 0


def test_every_series_of_servegen_is_more_than_poisson() -> None:
    pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    assert all(rates(SERVEGEN, s).dispersion > 5 for s in ("m-large", "m-mid", "m-small", "deepseek-r1"))


def test_which_series_is_asked_where_there_are_several() -> None:
    pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    several, none = error(SERVEGEN), error(SERVEGEN, "m-medium")
    assert (several.code, none.code) == ("E122", "E122")
    for told in (several, none):
        assert all(name in told.why for name in ("m-large", "m-mid", "m-small", "deepseek-r1"))
    assert "'m-medium'" in none.what


def test_a_quiet_window_of_your_own_rates_is_no_hole(write: Write) -> None:
    path = write("r.csv", "t_s,rate_rps\n0,100\n60,0.1\n180,100\n")
    found = rates(path)
    assert list(found.rates) == [100.0, 0.1, 0.0, 100.0]
    assert (found.window_s, found.filled, found.dispersion) == (60.0, 0, 1.0)


def test_token_quantiles_beside_client_rates_are_joined(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    base = {"model": ["a"], "client": [7], "t_s": [0]}
    extra = {"rate_rps": [1.0], "cv": [1.0], "dist": ["Gamma"], "p1": [0.0], "p2": [0.0]}
    pq.write_table(pa.table(base | extra), tmp_path / "my_client_rates.parquet")
    levels = ("q05", "q10", "q25", "q50", "q75", "q90", "q95", "q99", "max")
    rows: dict[str, Any] = {"model": ["a", "a", "a", "b"], "client": [7, 7, 8, 7], "t_s": [0] * 4}
    rows["field"] = ["output_tokens", "input_tokens", "input_tokens", "input_tokens"]
    rows |= {level: [i * 10.0, i * 1.0, 0.0, 0.0] for i, level in enumerate(levels)}
    pq.write_table(pa.table(rows), tmp_path / "my_token_quantiles.parquet")
    tokens = rates(tmp_path / "my_client_rates.parquet").tokens
    assert tokens is not None
    assert (tokens.client.tolist(), tokens.t_s.tolist(), tokens.levels[-1]) == ([7], [0.0], 1.0)
    assert (tokens.input.tolist(), tokens.output.tolist()) == ([[*range(9)]], [[*range(0, 90, 10)]])


# --------------------------------------------------------------------------------------------------- other Parquet


def test_the_azure_trace_is_read_request_by_request() -> None:
    pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    found = requests(TRACES / "azure_llm_2023_conv.parquet")
    assert found.in_tokens is not None
    assert found.out_tokens is not None
    assert (len(found.t_s), found.origin_s) == (19366, None)
    assert (float(found.t_s[0]), int(found.in_tokens[0]), int(found.out_tokens[0])) == (946.6806, 374, 44)
    assert (np.diff(found.t_s) >= 0).all()
    binned = found.rates()
    assert binned.window_s == 60.0
    assert binned.rates.sum() * 60 == pytest.approx(19366)


def test_a_mooncake_trace_keeps_each_request_s_prefix_blocks(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = {"t_ms": [3000, 1500], "in_tok": [1024, 512], "out_tok": [7, 9], "hash_ids": [[0, 5], [0]]}
    pq.write_table(pa.table(rows), tmp_path / "m.parquet")
    found = requests(tmp_path / "m.parquet")
    assert found.t_s.tolist() == [1.5, 3.0]
    assert found.prefixes is not None
    assert (found.prefixes.values.tolist(), found.prefixes.starts.tolist()) == ([0, 0, 5], [0, 1, 3])


def test_nulls_in_parquet_are_bad_rows_or_names_that_are_empty(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = {"t_s": [None, *range(199)], "model": [None] * 200, "in_tok": [5] * 200}
    kinds = pa.schema([("t_s", pa.int32()), ("model", pa.string()), ("in_tok", pa.int8())])
    pq.write_table(pa.table(rows, schema=kinds), tmp_path / "n.parquet")
    found = requests(tmp_path / "n.parquet")
    assert found.model is not None
    assert (len(found.t_s), found.source.bad, found.model.names) == (199, 1, ("",))
    pq.write_table(pa.table({"t_ms": [1], "hash_ids": [[1, None]]}), tmp_path / "l.parquet")
    assert error(tmp_path / "l.parquet").code == "E121"


def test_parquet_without_pyarrow_names_what_to_install(write: Write) -> None:
    path = write("x.parquet", "PAR1 and more")
    program = "import sys; sys.modules['pyarrow'] = None\nfrom neaptide.simulate.formats import read\nread(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert "error[E123]" in done.stderr
    assert "pip install 'neaptide[simulate]'" in done.stderr


def test_pyarrow_is_imported_in_one_place() -> None:
    sources = (Path(__file__).parent.parent / "neaptide").rglob("*.py")
    assert [p.name for p in sources if "import pyarrow" in p.read_text(encoding="utf-8")] == ["parquet.py"]


def test_a_damaged_parquet_file_is_told(write: Write) -> None:
    pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    assert error(write("x.parquet", "PAR1 and more")).code == "E120"


def test_parquet_of_something_else_is_told_by_its_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `simulate` is not installed")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"speed": [1.0]}), tmp_path / "x.parquet")
    assert "speed" in error(tmp_path / "x.parquet").why


# --------------------------------------------------------------------------------------------------- CSV, JSON lines


def test_a_csv_needs_only_times(write: Write) -> None:
    found = requests(write("a.csv", "t_s\n2\n1.5\n86400\n"))
    assert (found.t_s.tolist(), found.in_tokens, found.model) == ([1.5, 2.0, 86400.0], None, None)


def test_a_csv_s_columns_are_found_by_name_and_sorted_together(write: Write) -> None:
    text = 't_s,note,out_tok,in_tok,model,tenant\n9,"a, b",1,10,small,x\n3,c,2,20,big,y\n'
    found = requests(write("a.csv", "\ufeff" + text))
    assert found.in_tokens is not None
    assert found.out_tokens is not None
    assert found.model is not None
    assert found.tenant is not None
    assert (found.in_tokens.tolist(), found.out_tokens.tolist()) == ([20, 10], [2, 1])
    assert [found.model.names[c] for c in found.model.codes] == ["big", "small"]
    assert [found.tenant.names[c] for c in found.tenant.codes] == ["y", "x"]


def test_json_lines_have_the_same_columns(write: Write) -> None:
    path = write(
        "a.jsonl", '{"t_s": 5, "in_tok": 3, "model": "m", "else": [1]}\n\n{"model": "n", "in_tok": 4, "t_s": 6}\n'
    )
    found = requests(path)
    assert found.in_tokens is not None
    assert (found.t_s.tolist(), found.in_tokens.tolist(), found.out_tokens) == ([5.0, 6.0], [3, 4], None)


def test_a_series_of_single_requests_is_their_model(write: Write) -> None:
    path = write("a.jsonl", '{"t_s": 5, "model": "m"}\n{"t_s": 6, "model": "n"}\n{"t_s": 7, "model": "m"}\n')
    assert requests(path).t_s.tolist() == [5.0, 6.0, 7.0]
    assert requests(path, "m").t_s.tolist() == [5.0, 7.0]
    assert (error(path, "o").code, error(path, "o").why) == ("E122", "it holds m, n")
    assert error(write("b.csv", "t_s\n1\n"), "m").code == "E122"


def test_what_is_packed_with_gzip_is_read_as_if_it_were_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "a.csv.gz", tmp_path / "b.csv.gz"
    whole.write_bytes(gzip.compress(b"t_s\n1\n2\n"))
    broken.write_bytes(whole.read_bytes()[:-9])
    assert requests(whole).t_s.tolist() == [1.0, 2.0]
    assert error(broken).code == "E120"


# --------------------------------------------------------------------------------------------------- Neaptide's own

MIDNIGHT = 1_777_593_600.0  # 2026-05-01 00:00 UTC


def used(number: int, at_s: float, model: str = "guide", tenant: str = "default") -> Usage:
    return Usage(
        request_id=f"r{number}", model=model, tenant=tenant, prompt_tokens=10 * number, output_tokens=number,
        started_wall_s=at_s,
    )  # fmt: skip


ROWS = [used(3, MIDNIGHT + 90000), used(2, MIDNIGHT + 60, "small", "acme"), used(0, MIDNIGHT + 30)]


def check_own(found: Requests) -> None:
    assert found.t_s.tolist() == [30.0, 60.0, 90000.0]  # from 00:00 UTC of the first day
    assert found.origin_s == MIDNIGHT
    assert found.in_tokens is not None
    assert found.out_tokens is not None
    assert found.model is not None
    assert (found.in_tokens.tolist(), found.out_tokens.tolist()) == ([0, 20, 30], [0, 2, 3])
    assert [found.model.names[c] for c in found.model.codes] == ["guide", "small", "guide"]


@pytest.mark.parametrize("indent", [0, 2])
def test_the_usage_export_is_read_as_the_command_prints_it(tmp_path: Path, indent: int) -> None:
    page = UsagePage(rows=tuple(UsageRow(usage=u, amount_nanos=5) for u in ROWS), next=None, currency="USD")
    path = tmp_path / "usage.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(page), indent=indent))
    check_own(requests(path))
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(page, next="more")))
    assert "--limit" in str(requests(path).source)


def test_usage_records_line_by_line_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(b"\n".join(map(msgspec.json.encode, ROWS)))
    check_own(requests(path))


def test_the_ledger_is_read_while_it_is_open_and_left_as_it_is(tmp_path: Path) -> None:
    # Given a ledger that control writes, when it is read as arrivals, then its rows are there and writing goes on.
    state = tmp_path / "a #state?"
    state.mkdir()
    with closing(open_ledger("", state, VirtualClock(wall_s=MIDNIGHT))) as ledger:
        ledger.take("gateway-1", 0, [Located(i, i + 1, u) for i, u in enumerate(ROWS)], len(ROWS))
        check_own(requests(state / "ledger.db"))
        assert ledger.take("gateway-1", 0, [Located(5, 6, used(9, MIDNIGHT))], 6).rows == 1


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        database.execute("CREATE TABLE t (a)")
    assert (error(tmp_path / "x.db").code, "usage" in error(tmp_path / "x.db").why) == ("E120", True)


# --------------------------------------------------------------------------------------------------- others' logs

ACCESS = """\
10.0.0.1 - - [01/May/2026:02:00:10 +0200] "POST /v1/chat/completions?a=b HTTP/1.1" 200 512 "-" "OpenAI/Python 1.60"
::1 - some body [01/May/2026:00:00:09 +0000] "GET /v1/models HTTP/1.1" 200 17 "-" "a \\x22quoted\\x22 \\" [agent]"
10.0.0.2 - - [30/Apr/2026:19:00:20 -0500] "\\x16\\x03\\x01" 400 - "-" "-"
"""


def test_an_access_log_of_nginx_gives_times_and_paths(write: Write) -> None:
    found = requests(write("access.log", ACCESS))
    assert found.model is not None
    assert (found.t_s.tolist(), found.origin_s) == ([9.0, 10.0, 20.0], MIDNIGHT)
    assert [found.model.names[c] for c in found.model.codes] == ["/v1/models", "/v1/chat/completions", ""]
    assert found.in_tokens is None
    assert requests(write("access.log", ACCESS), "/v1/chat/completions").t_s.tolist() == [10.0]


@pytest.mark.parametrize("tail", ["2.500", "rt=2.500 uct=0.001", '"2.500"', "request_time=2.500"])
def test_the_request_time_is_taken_off_because_nginx_writes_at_the_end(write: Write, tail: str) -> None:
    first = ACCESS.splitlines()[0]
    assert requests(write("access.log", f"{first} {tail}\n")).t_s.tolist() == [7.5]


LITELLM: list[dict[str, Any]] = [
    {"id": "c-1", "call_type": "acompletion", "startTime": MIDNIGHT + 5.5, "endTime": MIDNIGHT + 9, "model": "gpt-4o",
     "prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34, "metadata": {"usage": 1}, "cache_hit": None},
    {"request_id": "c-2", "startTime": "2026-05-01T00:00:07.250Z", "endTime": "2026-05-01T00:00:08Z", "model": "llama",
     "usage": {"prompt_tokens": 8, "completion_tokens": 2}},
    {"startTime": "2026-05-01 02:00:09+02:00", "model": None, "prompt_tokens": None, "status": "failure"},
]  # fmt: skip


@pytest.mark.parametrize("whole", [False, True], ids=["lines", "list"])
def test_a_request_log_of_litellm_is_read_in_its_shapes(write: Write, whole: bool) -> None:
    text = json.dumps(LITELLM, indent=1) if whole else "\n".join(map(json.dumps, LITELLM))
    found = requests(write("litellm.json", text))
    assert found.in_tokens is not None
    assert found.out_tokens is not None
    assert found.model is not None
    assert (found.t_s.tolist(), found.origin_s) == ([5.5, 7.25, 9.0], MIDNIGHT)
    assert (found.in_tokens.tolist(), found.out_tokens.tolist()) == ([30, 8, 0], [4, 2, 0])
    assert [found.model.names[c] for c in found.model.codes] == ["gpt-4o", "llama", ""]


def test_a_time_without_an_offset_is_utc_wherever_it_is_read(write: Write) -> None:
    path = write("litellm.jsonl", '{"startTime": "2026-05-01 00:00:09.5", "model": "m"}\n')
    program = (
        "import sys\nfrom neaptide.simulate.formats import read\nr = read(sys.argv[1])\nprint(r.origin_s, r.t_s[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], env={**os.environ, "TZ": "JST-9"}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(MIDNIGHT), "9.5"]


# --------------------------------------------------------------------------------------------------- bad files


def test_a_few_bad_lines_are_left_out_and_told(write: Write) -> None:
    lines = ACCESS.splitlines()[:1] * 199 + ["what is this"]
    found = requests(write("access.log", "\n".join(lines)))
    assert (len(found.t_s), found.source.rows, found.source.bad) == (199, 200, 1)
    assert "1 bad ones left out (first: row 200: not nginx's combined format)" in str(found.source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("t_s,in_tok\n" + "1,2\n" * 97 + "x,2\n" * 2, "2 of 99 rows cannot be read; row 98: could not convert"),
        ("t_s\n" + "1\n" * 50 + "nan\n", "1 of 51 rows cannot be read; row 51"),
        ("t_s\n-1\n", "1 of 1 rows"),
        ("t_s\n1_0\n", "'1_0' is not a number"),
        ("t_s\n1777593600000\n", "out of range"),
        ("t_s,in_tok\n1,2.5\n", "out of range"),
        ("t_s,in_tok\n1\n", "1 fields, 2 in the first line"),
        ("t_s\n", "holds no requests"),
        ("t_s\n0\n86400000\n", "1,000 days apart"),
        ("t_s,rate_rps\n0,1\n70,1\n600,1\n", "not in steps of 70 s"),
        ("t_s,rate_rps\n0,1\n0,2\n", "two rows for one window"),
        ("t_s,rate_rps\n0,1\n0.000001,1\n86400,1\n", "windows of"),
        ('{"t_s": 1, "in_tok": 2}\n{"t_s": 2}\n', "no in_tok"),
        ('{"t_s": 1, "in_tok": -2}\n', "1 of 1 rows"),
        ('[{"startTime": 1777593600000}]', "out of range"),
    ],
)
def test_a_file_that_is_not_sound_is_told_with_its_place(write: Write, text: str, said: str) -> None:
    told = error(write("a.txt", text))
    assert (told.code, said in told.what) == ("E121", True), told


NOTHING_KNOWN = (
    "",
    "\n\n",
    "hello\n",
    "a,b\n1,2\n",
    "t_s,t_s\n1,2\n",
    "[]",
    "[1, 2]",
    "{",
    '{"rows": []}',
    '{"rows": 3}',
)


@pytest.mark.parametrize("text", [*NOTHING_KNOWN, '{"a": 1}\n', "\x00\x01"])
def test_a_file_of_no_known_format_is_told_which_there_are(write: Write, text: str) -> None:
    told = error(write("a.txt", text))
    assert (told.code, "nginx" in told.fix, "a.txt" in told.what) == ("E120", True, True)


def test_a_file_that_is_not_there_or_is_a_directory_is_told(tmp_path: Path) -> None:
    assert (error(tmp_path / "none").code, error(tmp_path).code) == ("E120", "E120")


def test_names_without_end_do_not_fill_the_memory() -> None:
    form = Format("names", ("t_s", "model"), lambda n: (float(n), f"/{n}"))
    models = gather(range(MOST_NAMES + 500), form, Path("x"), Tally())["model"]
    assert len(models[0]) == MOST_NAMES + 1
    assert models[0][-1] == "(other)"


PIECES = (
    *ACCESS.splitlines(),
    *map(json.dumps, LITELLM),
    *("t_s,in_tok", "t_s,rate_rps,cv", "1,2", "3.5,4", '"1",2', "nan,1", '{"t_s": 1}', '{"t_s": 1e400}', "PAR1"),
    *("[", "]", "{", "}", '"rows":', '{"usage": {', ",", "[" * 3000, "\\", '"', "\ufeff", "\x1f\x8b"),
    '{"startTime": "9999-12-31T23:59:59-23:59"}',
    '{"startTime": "0001-01-01T00:00+23:00"}',
    '1 - - [31/Feb/2026:00:00:00 +0000] "GET / HTTP/1.1" 200 1',
    '1 - - [01/Jan/0001:00:00:00 +9999] "GET / " 200 1',
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=40)), max_size=12)


def outcome(path: Path) -> Rates | Requests | ConfigError:
    try:
        return read(path)
    except ConfigError as e:
        return e


def check_any(found: Rates | Requests | ConfigError) -> None:
    if isinstance(found, ConfigError):
        assert found.code in ("E120", "E121", "E122", "E123")
    else:
        assert np.isfinite(found.t_s if isinstance(found, Requests) else found.rates).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.sampled_from(["\n", "\r\n", ""]))
def test_whatever_a_text_holds_it_is_read_or_refused_with_an_error_of_ours(
    tmp_path: Path, pieces: list[str], between: str
) -> None:
    path = tmp_path / "any"
    path.write_bytes(between.join(pieces).encode("utf-8", "surrogatepass"))
    check_any(outcome(path))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), st.sampled_from(PIECES))
def test_whatever_a_line_holds_it_is_a_row_or_a_bad_one(piece: bytes, good: str) -> None:
    # Given each parser of logs, when lines are cut and mixed, then each is a row or a bad one: never an exception.
    lines = [piece, good.encode(), good.encode()[: len(piece)] + piece, piece + good.encode()]
    for form in (
        Format("nginx", ("t_s", "model"), logs.access),
        Format("LiteLLM", ("t_s", "in_tok", "out_tok", "model"), logs.litellm),
        Format("JSON lines", ("t_s", "in_tok"), functools.partial(logs.plain, ("t_s", "in_tok"))),
        logs.table(["t_s", "model"]),
    ):
        tally = Tally()
        columns = gather(lines, form, Path("any"), tally)
        assert len(columns["t_s"]) + tally.bad == tally.rows == len(lines)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([b"PAR1", b"SQLite format 3\0", b"\x1f\x8b\x08", b"t_s\n"]), st.binary(max_size=60))
def test_whatever_bytes_a_file_holds_it_is_read_or_refused_with_an_error_of_ours(
    tmp_path: Path, magic: bytes, rest: bytes
) -> None:
    path = tmp_path / "any"
    path.write_bytes(magic + rest)
    check_any(outcome(path))


# --------------------------------------------------------------------------------------------------- counts


def flat(rps: float, days: int = 1, dispersion: float = 1.0) -> Rates:
    return Rates(series="flat", window_s=600.0, start_s=0.0, rates=np.full(144 * days, rps), dispersion=dispersion)


def test_rates_are_linear_between_window_centres() -> None:
    here = Rates(series="x", window_s=600.0, start_s=1200.0, rates=np.array([2.0, 4.0]))
    assert here.at(np.array([0.0, 1500.0, 1800.0, 2100.0, 9000.0])).tolist() == [2.0, 2.0, 3.0, 4.0, 4.0]


def test_the_same_seed_gives_a_tick_the_same_count_whatever_is_asked() -> None:
    here = synthetic("diurnal", days=3, dispersion=12.0, seed=4)
    whole = counts(here, 5.0, seed=7)
    assert len(whole) == 3 * 17280
    for from_s, to_s in [(0, 5), (86400, 2 * 86400), (86000, 87000), (100_000, 200_005), (172_795, 172_805)]:
        assert (counts(here, 5.0, 7, from_s, to_s) == whole[from_s // 5 : to_s // 5]).all()
    assert (counts(here, 5.0, seed=8) != whole).any()


def test_another_day_s_rates_do_not_change_a_day_s_counts() -> None:
    one, other = flat(50.0, 4, 9.0), flat(50.0, 4, 9.0)
    other = replace(other, rates=np.where(np.arange(4 * 144) < 100, 500.0, other.rates))
    assert (counts(one, 5.0, 1, 2 * 86400) == counts(other, 5.0, 1, 2 * 86400)).all()


@pytest.mark.parametrize("dispersion", [0.5, 1.0, 3.0, 1000.0])
@pytest.mark.parametrize("rps", [0.2, 40.0])
def test_counts_have_the_rate_s_mean_and_the_trace_s_dispersion(rps: float, dispersion: float) -> None:
    # Given m and D, when many days are drawn, then mean and variance are the formula's, within five standard errors:
    # neighbouring ticks hang together, about 25 count as one.
    mean = rps * 5.0
    spread = min(0.25, np.sqrt(max(dispersion - 1.0, 0.0) * mean) / mean)
    variance = mean + mean**2 * (np.exp(spread**2) - 1.0)
    drawn = counts(flat(rps, 20, dispersion), 5.0, seed=3).astype(float)
    independent = len(drawn) / 25
    assert drawn.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / independent))
    assert drawn.var() == pytest.approx(variance, rel=5 * np.sqrt(3 / independent))


def test_ticks_hang_together_for_a_minute_also_over_midnight() -> None:
    # Given so high a rate that Poisson noise is small, then e^(-5/60) of the wandering stays from tick to tick.
    drawn = counts(flat(1e7, 60, 1e9), 5.0, seed=5)
    level = np.log(drawn / drawn.mean())
    assert np.corrcoef(level[:-1], level[1:])[0, 1] == pytest.approx(np.exp(-5 / 60), abs=0.01)
    assert np.corrcoef(level[:-12], level[12:])[0, 1] == pytest.approx(np.exp(-1), abs=0.03)
    before, after = level[17279:-1:17280], level[17280::17280]
    assert np.corrcoef(before, after)[0, 1] == pytest.approx(np.exp(-5 / 60), abs=0.1)


def test_seeds_are_independent() -> None:
    here = flat(1000.0, 2, 1e6)
    one, other = (np.log(counts(here, 5.0, seed)) for seed in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 * np.sqrt(24 / len(one))


def test_nothing_comes_where_the_rate_is_nothing() -> None:
    assert not counts(flat(0.0, 1, 20.0), 5.0, seed=1).any()


def test_counts_of_days_that_the_trace_lacks_are_an_error() -> None:
    for from_s, to_s in [(0.0, 2 * 86400.0), (-5.0, 5.0), (10.0, 10.0)]:
        with pytest.raises(ConfigError, match="E124") as caught:
            counts(flat(1.0), 5.0, 1, from_s, to_s)
        assert "days 0 to 0" in caught.value.why
    with pytest.raises(ValueError, match="tick"):
        counts(flat(1.0), 5.0, 1, 1.0, 10.0)


def test_single_requests_in_windows_have_the_dispersion_they_were_drawn_with() -> None:
    # Given an AR(1) of 60 s, then 18 % of its variance lies between windows of 600 s, so in the rates; D has the rest.
    drawn = counts(flat(20.0, 2, 4.0), 5.0, seed=6)
    times = np.repeat(np.arange(len(drawn)) * 5.0, drawn) + 1.0
    again = Requests(t_s=times).rates()
    assert (again.window_s, len(again.rates)) == (600.0, 288)
    assert again.rates.sum() * 600 == pytest.approx(len(times))
    assert again.dispersion == pytest.approx(1 + 3 * 0.82, rel=0.1)
    assert Requests(t_s=np.arange(0.0, 7200.0, 0.05)).rates().dispersion < 0.1  # evenly: less than Poisson


# --------------------------------------------------------------------------------------------------- capacity, history


def test_a_replica_s_capacity_is_a_fortieth_of_the_tuning_days_peak() -> None:
    values = np.concatenate([np.arange(144.0), np.full(144, 1e6)])
    here = Rates(series="x", window_s=600.0, start_s=0.0, rates=values)
    assert capacity(here, range(1)) == pytest.approx((0.999 * 143) / 40)
    assert capacity(here, range(2), quantile=1.0, replicas=10) == pytest.approx(1e5)
    with pytest.raises(ConfigError, match="E124"):
        capacity(here, range(2, 9))


def test_a_file_cut_in_two_is_one_again_with_its_history(raw: dict[str, dict[int, float]], tmp_path: Path) -> None:
    whole, header = rates(SERVEGEN, "m-large"), "t_s,rate_rps\n"
    lines = [f"{t},{rps!r}\n" for t, rps in sorted(raw["m-large"].items())]
    (tmp_path / "old.csv").write_text(header + "".join(lines[: 7 * 144]))
    (tmp_path / "new.csv").write_text(header + "".join(lines[7 * 144 :]))
    new = rates(tmp_path / "new.csv")
    assert (new.start_s, new.days) == (7 * 86400.0, range(7, 9))
    both = join(rates(tmp_path / "old.csv"), new)
    assert (both.start_s, both.days) == (0.0, range(9))
    assert both.rates == pytest.approx(whole.rates)
    assert capacity(both, range(7)) == pytest.approx(capacity(whole, range(7)))


def test_logs_are_joined_by_their_wall_times() -> None:
    old = Requests(t_s=np.arange(0.0, 86400.0, 10.0), origin_s=MIDNIGHT).rates(600.0)
    new = Requests(t_s=np.arange(0.0, 86400.0, 5.0), origin_s=MIDNIGHT + 86400).rates(600.0)
    both = join(old, new)
    assert (both.origin_s, both.start_s, both.days) == (MIDNIGHT, 0.0, range(2))
    assert (both.rates[0], both.rates[-1]) == (0.1, 0.2)


def test_histories_that_do_not_fit_are_refused() -> None:
    here = flat(1.0)
    far = replace(flat(1.0), start_s=5 * 86400.0)
    minutes, wall = replace(flat(1.0), window_s=60.0), replace(flat(1.0), origin_s=MIDNIGHT)
    for history in (far, minutes, wall):
        with pytest.raises(ConfigError, match="E121"):
            join(history, here)


def test_a_short_gap_between_history_and_arrivals_is_filled_and_counted() -> None:
    both = join(flat(1.0), replace(flat(3.0), start_s=86400.0 + 600))
    assert (both.filled, both.rates[143:146].tolist()) == (1, [1.0, 2.0, 3.0])


def test_days_are_cut_to_what_a_trace_covers() -> None:
    here = Rates(series="x", window_s=60.0, start_s=900.0, rates=np.ones(60))
    assert here.span(0, 3) == (900.0, 4500.0)
    with pytest.raises(ConfigError, match="E124"):
        here.span(1, 3)


# --------------------------------------------------------------------------------------------------- without a file


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_synthetic_shape_has_its_mean_and_comes_again_with_its_seed(kind: str) -> None:
    one, same, other = (synthetic(kind, mean_rps=7.0, days=2, seed=s) for s in (1, 1, 2))
    assert one.rates.mean() == pytest.approx(7.0)
    assert (one.rates >= 0).all()
    assert (one.rates == same.rates).all()
    assert (one.rates != other.rates).any()
    assert (one.series, one.days) == (kind, range(2))


def test_synthetic_shapes_look_as_their_names_say() -> None:
    def shape(kind: str, days: float = 7) -> Any:
        return synthetic(kind, days=days, noise=0.0, mean_rps=1.0, seed=11).rates

    assert np.ptp(shape("steady")) == pytest.approx(0.0)
    diurnal = shape("diurnal").reshape(7, 1440)
    assert set(diurnal.argmax(axis=1)) <= {899, 900}  # 15:00
    assert diurnal[5].sum() == pytest.approx(0.6 * diurnal[4].sum())
    assert (np.diff(shape("ramp")) > 0).all()
    assert 0.3 < (shape("on-off", 30) == 0).mean() < 0.7
    crowd = shape("flash-crowd", 1)
    assert crowd.max() / crowd[0] == pytest.approx(10.0, rel=0.05)
    burst = shape("burst")
    assert burst.max() / burst.min() == pytest.approx(4.0)
    assert 0.02 < (burst > burst.min()).mean() < 0.3


def test_a_shape_there_is_none_of_is_told() -> None:
    with pytest.raises(ConfigError, match="flash-crowd"):
        synthetic("sawtooth")


def test_what_was_read_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        flat(1.0).rates[0] = 2.0
