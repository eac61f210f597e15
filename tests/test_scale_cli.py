"""`neaptide scale` as real processes against the real admin app."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from neaptide.cli.scale import seconds
from neaptide.control.port import NewOverride
from neaptide.control.reasons import reason
from neaptide.errors import ConfigError
from tests.admin_fake import FakeControl, admin_server
from tests.cli_run import cli


@pytest.fixture
def control(tmp_path: Path) -> Iterator[FakeControl]:
    fake = FakeControl(tmp_path / "state")
    with admin_server(fake):
        yield fake


def ask(control: FakeControl, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return cli("scale", *args, "--state", str(control.state), **env)


def test_show_tells_counts_bounds_policy_traffic_capacity_money_and_why(control: FakeControl) -> None:
    lines = ask(control, "show").stdout.splitlines()
    row = next(line for line in lines if line.startswith("guide ")).split()
    assert row == ["guide", "1", "1", "2", "0-4", "slo", "3.8/s", "3.1/s", "5", "4.0/s", "¥6.40/h"]
    assert "guide: 1 to 2 replicas: slo wants 2" in lines
    assert "guide: a start takes 12.0 s (3 measured: load 9.00 s)" in lines
    assert next(line for line in lines if line.startswith("mock ")).split()[:2] == ["mock", "1"]


def test_show_of_one_model_and_of_none(control: FakeControl) -> None:
    assert "guide" not in ask(control, "show", "mock").stdout
    done = ask(control, "show", "nobody")
    assert (done.returncode, "error[E601]" in done.stderr) == (1, True)


def test_show_as_json_is_the_answer_of_the_admin_api(control: FakeControl) -> None:
    told = json.loads(ask(control, "show", "guide", "--json").stdout)
    assert (told["currency"], told["rows"][0]["wanted"], told["rows"][0]["cost_per_hour"]) == ("CNY", 2, 6.4)


def test_why_lists_sentences_with_their_time_and_a_mark(control: FakeControl) -> None:
    lines = ask(control, "why", "guide", "--limit", "3").stdout.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        "= guide: reason 5",
        "+ guide: reason 4",
        "= guide: reason 3",
    ]
    assert control.asked == [("why", "guide", 3)]
    assert json.loads(ask(control, "why", "--json").stdout)["rows"][0]["choice"]["sentence"] == "guide: reason 5"
    assert ask(control, "why", "nobody").returncode == 1


def test_set_holds_for_a_while_and_clear_ends_it(control: FakeControl) -> None:
    done = ask(control, "set", "guide", "3", "--for", "1h30m")
    (new,) = control.asked
    assert isinstance(new, NewOverride)
    assert (new.model, new.replicas, new.for_s) == ("guide", 3, 5400.0)
    assert "guide: 3 replicas by hand until" in done.stdout
    assert "by hand" in ask(control, "show").stdout
    assert ask(control, "clear", "guide").stdout == "guide: slo decides again\n"
    assert control.override is None


def test_shadows_are_set_against_what_ran(control: FakeControl) -> None:
    lines = ask(control, "show", "--shadows", "--days", "7").stdout.splitlines()
    assert "slo (real)" in lines[1]
    assert lines[1].rstrip().endswith("¥32.00  0.5%")
    assert lines[2].rstrip().endswith("¥73.00  3.0%  ¥41.00 more")
    assert control.asked == [("shadows", "", 7)]


def test_it_speaks_chinese_too(control: FakeControl) -> None:
    control.why = (reason("waits", n=3), reason("clamp.max", n=1))
    said = "guide：1 个副本不变：有 3 个请求在等待，而没有副本就绪或在启动，但 max 是 1；每小时 ¥3.20"
    shown = ask(control, "show", NEAPTIDE_LANG="zh").stdout
    assert "应有" in shown
    assert said in shown.splitlines()
    assert ask(control, "why", "--limit", "1", "--lang", "zh").stdout.splitlines()[0].endswith(f"  = {said}")
    control.why = ()
    assert "guide: reason 5" in ask(control, "why", NEAPTIDE_LANG="zh").stdout  # decided by an older release


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("0.5h", 1800)]
)
def test_times_are_read_as_people_write_them(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "2 h", "-1h", "0s", "2w", "1e3s"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="E110"):
        seconds(text)


@pytest.mark.parametrize(
    "args", [("set", "guide"), ("set", "guide", "-1"), ("set", "guide", "two"), ("clear",), ("x",)]
)
def test_a_mistyped_command_exits_2(args: tuple[str, ...]) -> None:
    assert cli("scale", *args).returncode == 2
