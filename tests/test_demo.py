"""The demo: its script and its bill as pure functions, its page, and the short day as a real process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide import config
from neaptide.demo import story as script
from neaptide.demo.bill import bill, quantile, replica_seconds
from neaptide.demo.page import page
from neaptide.demo.records import Decided, Killed, Played, Row, Sample, Seen, Visit
from neaptide.demo.story import TTFT_GOAL_S, story
from neaptide.demo.texts import catalogue
from neaptide.types import PolicyName
from tests.cli_run import cli, environment
from tests.traffic import wait_for

# ------------------------------------------------------------------------------------------------ the script


def test_a_seed_is_a_day_and_another_seed_is_another_day() -> None:
    assert story(seed=3) == story(seed=3)
    assert story(seed=3).guests != story(seed=4).guests


@given(st.integers(0, 10_000), st.booleans())
def test_guests_come_in_order_within_the_day_and_nobody_before_the_wakers(seed: int, short: bool) -> None:
    told = story(seed=seed, short=short)
    times = [g.at_s for g in told.guests]
    assert times == sorted(times)
    assert times[-1] < told.day_s < told.end_s
    wakers = [h / script.DAY_H * told.day_s for h in script.WAKERS_H]
    assert times[: len(wakers)] == wakers
    assert times[len(wakers)] > 4.5 / script.DAY_H * told.day_s


def test_the_tide_has_a_night_a_morning_a_burst_and_an_evening_above_them() -> None:
    assert script.rate(2.0) == script.rate(23.9) == 0.0
    assert script.rate(9.0) > 2 * script.rate(6.0)
    assert script.rate(14.0) == script.BURST_RPS > 3 * script.rate(13.4)
    assert script.rate(20.0) > script.rate(9.0)
    assert max(script.rate(h / 10) for h in range(240)) < script.MOST * script.SLOTS


@given(st.floats(0, 200, allow_nan=False))
def test_the_clock_of_the_day_never_passes_midnight(at_s: float) -> None:
    hours, minutes = map(int, story().hour(at_s).split(":"))
    assert 0 <= hours * 60 + minutes <= 24 * 60


@pytest.mark.parametrize("policy", get_args(PolicyName))
@pytest.mark.parametrize("short", [False, True])
def test_its_service_is_a_configuration_that_starts_at_zero_in_yuan(policy: str, short: bool, tmp_path: Path) -> None:
    settings = config.parse(script.configuration(story(short=short, policy=policy)), "demo", tmp_path)
    scale = settings.models[script.MODEL].scale
    assert (scale.min, scale.max, scale.policy, settings.currency) == (0, script.MOST, policy, "CNY")
    assert bool(scale.rules) == (policy == "thresholds")


def test_a_whole_day_ends_within_three_minutes_and_a_short_one_within_forty_seconds() -> None:
    assert story().end_s < 150
    assert story(short=True).end_s < 30


# ------------------------------------------------------------------------------------------------ the bill


def sample(at_s: float, ready: int, starting: int = 0, leaving: int = 0) -> Sample:
    return Sample(at_s=at_s, ready=ready, starting=starting, leaving=leaving, wanted=ready, in_flight=0,
                  capacity_rps=4.0)  # fmt: skip


def guest(id: str, at_s: float, ttft_s: float | None = 0.2, error: str = "") -> Visit:
    first_s = None if ttft_s is None else at_s + ttft_s
    return Visit(at_s=at_s, first_s=first_s, end_s=at_s + 1.2, tokens=11, request_id=id, error=error)


def row(id: str, queued_s: float = 0.0, *replicas: str) -> Row:
    return Row(request_id=id, outcome="ok", queued_s=queued_s, replicas=replicas or ("tide-0",))


def decided(at_s: float, before: int, after: int) -> Decided:
    return Decided(at_s=at_s, before=before, after=after, numbers={}, change_per_hour=12.0 * (after - before),
                   said={"en": f"tide: {before} to {after} <b>", "zh": f"tide：{before} → {after}"})  # fmt: skip


def played(**changed: Any) -> Played:
    """A good day of six requests: from zero, up to three, tide-1 killed at 50 s with b on it, and back to zero."""
    seen = Seen(
        samples=[sample(0, 0), sample(10, 0, 1), sample(20, 1), sample(40, 3), sample(60, 2, 1), sample(80, 1, 0, 2),
                 sample(100, 0)],
        decided=[decided(9, 0, 1), decided(38, 1, 3), decided(79, 3, 1), decided(99, 1, 0)],
        killed=Killed(at_s=50.0, replica="tide-1", pid=1, running=1, back_s=61.0),
        ended_s=120.0,
    )  # fmt: skip
    visits = [guest("z", 9.0, 4.0), guest("a", 30.0), guest("b", 49.5, 0.3, "replica_lost"), guest("c", 49.6, 1.0),
              guest("d", 70.0), guest("e", 90.0)]  # fmt: skip
    rows = [row("z", 3.8), row("a"), row("b", 0.0, "tide-1"), row("c", 0.0, "tide-1", "tide-0"), row("d"), row("e")]
    shadow = {"policy": "hpa", "real": False, "replica_hours": 0.1, "cost": 1.2, "arrivals": 6.0, "attainment": None}
    day = {"story": story(), "ready_s": 1.0, "visits": visits, "seen": seen, "rows": rows, "shadows": [shadow],
           "played_s": 120.0}  # fmt: skip
    return Played(**{**day, **changed})


def broken_promises(day: Played) -> set[str]:
    return {p.name for p in bill(day).promises if not p.kept}


def test_a_replica_is_paid_from_its_launch_until_it_has_left() -> None:
    # 0 x 10 s, 1 x 10 s starting, 1 x 20 s, 3 x 20 s, 3 x 20 s, 1 + 2 leaving x 20 s, 0 x 20 s
    assert replica_seconds(played().seen.samples, 120.0) == 10 + 20 + 60 + 60 + 60
    assert replica_seconds([], 120.0) == 0.0


def test_the_fixed_fleet_is_the_most_that_ran_all_the_time() -> None:
    made = bill(played())
    assert (made.peak, made.fixed_s, made.replica_s) == (3, 360.0, 210.0)
    assert made.saved == pytest.approx(150 / 360)
    assert made.cost == pytest.approx(210 / 3600 * 12)
    assert made.a_day(made.fixed_cost) == pytest.approx(3 * 24 * 12)


def test_requests_are_counted_as_answered_held_moved_and_failed() -> None:
    made = bill(played())
    assert (made.sent, made.answered, made.held, made.moved, made.failed, made.broken) == (6, 5, 1, 1, 1, 1)
    assert made.from_zero_s == pytest.approx(4.0)
    assert made.attainment == pytest.approx(4 / 6)  # z came late, b broke
    assert TTFT_GOAL_S < 4.0


def test_a_request_that_waited_while_replicas_were_ready_was_not_held_at_zero() -> None:
    assert bill(played(rows=[*played().rows[:-1], row("e", 2.0)])).held == 1


def test_a_good_day_keeps_all_its_promises() -> None:
    assert broken_promises(played()) == set()
    assert bill(played()).kept


def test_a_failure_away_from_the_killed_replica_breaks_a_promise() -> None:
    visits = [*played().visits[:-1], guest("e", 90.0, None, "E404: broke")]
    assert broken_promises(played(visits=visits)) == {"lost"}


def test_a_failure_on_the_killed_replicas_name_at_another_time_is_no_excuse() -> None:
    visits = [*played().visits[:-1], guest("e", 90.0, 0.2, "broke")]
    rows = [*played().rows[:-1], row("e", 0.0, "tide-1")]
    assert broken_promises(played(visits=visits, rows=rows)) == {"lost"}


def test_a_request_without_a_row_breaks_a_promise() -> None:
    assert broken_promises(played(rows=played().rows[:-1])) == {"rows"}


def test_a_day_without_a_start_from_zero_a_kill_or_growth_says_so() -> None:
    seen = Seen(samples=[sample(0, 1), sample(119, 1)], ended_s=120.0)
    visits = [guest("a", 30.0)]
    day = played(seen=seen, visits=visits, rows=[row("a")])
    assert broken_promises(day) == {"zero", "grew", "ebb", "kill"}


def test_a_killed_replica_that_never_came_back_breaks_a_promise() -> None:
    seen = played().seen
    seen.killed = Killed(at_s=50.0, replica="tide-1", pid=1, running=1)
    assert broken_promises(played(seen=seen)) == {"kill"}


def test_only_a_whole_day_by_rules_promises_to_shrink() -> None:
    def names(**how: Any) -> set[str]:
        return {p.name for p in bill(played(story=story(**how))).promises}

    assert "ebb" in names()
    assert "ebb" not in names(short=True) | names(policy="slo")


def test_shadows_stand_in_the_bill_of_a_day_that_is_long_enough() -> None:
    assert len(bill(played()).shadows) == 1
    assert bill(played(story=story(short=True))).shadows == ()


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([], 0.5) is None
    assert (quantile([1.0, 2.0, 3.0], 0.5), quantile([1.0, 2.0], 0.5), quantile([7.0], 0.95)) == (2.0, 1.0, 7.0)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_asks_the_network_for_nothing_and_holds_every_decision() -> None:
    day = played()
    html = page(day, bill(day))
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", html)
    assert "default-src 'none'" in html
    for of in day.seen.decided:
        assert f'<span lang="en">tide: {of.before} to {of.after} &lt;b&gt;</span>' in html
        assert f'<span lang="zh-CN">{of.said["zh"]}</span>' in html
    assert "¥0.70" in html  # 210 replica-seconds at 12 an hour
    assert "hpa" in html


def test_the_page_speaks_both_languages_and_shows_the_one_asked_for() -> None:
    day = played()
    assert '<html lang="zh-CN">' in page(day, bill(day), "zh")
    english = page(day, bill(day))
    assert '<html lang="en">' in english
    assert "Every scaling decision" in english
    assert "每个伸缩决策" in english


def test_the_page_marks_a_promise_that_was_not_kept() -> None:
    day = played(rows=played().rows[:-1])
    assert page(day, bill(day)).count('<li class="no">') == 1
    assert '<li class="no">' not in page(played(), bill(played()))


def test_a_day_of_which_little_is_known_still_has_a_page() -> None:
    day = played(seen=Seen(ended_s=120.0), visits=[], rows=[], shadows=[])
    assert "</html>" in page(day, bill(day))


def test_the_pages_texts_exist_in_both_languages_with_the_same_placeholders() -> None:
    for key, texts in catalogue().items():
        assert set(texts) == {"en", "zh"}, key
        assert len({frozenset(re.findall(r"{(\w+)}", text)) for text in texts.values()}) == 1, key


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.timeout(240)
def test_the_short_day_keeps_its_promises_and_leaves_a_page_and_nothing_else(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "day.html"
    scratch.mkdir()
    command = [sys.executable, "-m", "neaptide.cli", "demo", "--short", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(TMPDIR=str(scratch)))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["kept"]
    assert {p["name"] for p in told["promises"]} == {"zero", "grew", "kill", "lost", "rows"}
    assert told["sent"] == len(story(short=True).guests) == told["answered"] + told["failed"]
    assert told["failed"] == told["broken"]
    assert told["killed"]["running"] > 0
    assert 0 < told["replica_s"] < told["fixed_s"]
    assert told["held"] >= len(script.WAKERS_H)
    assert "kill -9" in done.stderr
    assert "1 request waiting and no replica there or starting" in done.stderr
    assert told["decided"][0]["after"] == 1
    assert told["page"] == str(out)
    assert "</html>" in out.read_text(encoding="utf-8")
    assert list(scratch.iterdir()) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_day_stops_its_service(end: signal.Signals, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "day.html"
    scratch.mkdir()
    said = tmp_path / "said"
    command = [sys.executable, "-m", "neaptide.cli", "demo", "--out", str(out)]
    with open(said, "w") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=stdout, env=environment(TMPDIR=str(scratch)))
    try:
        api = wait_for(lambda: re.search(r"http://\S+/v1", said.read_text()), "the service is ready", 90.0)
        wait_for(lambda: "Three requests" in said.read_text(), "the first scene", 60.0)
        process.send_signal(end)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    url = urllib.parse.urlsplit(api[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((url.hostname or "", url.port or 0), timeout=5).close()
    assert list(scratch.iterdir()) == []
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_day_that_does_not_show_what_it_promises_exits_1_and_says_what(tmp_path: Path) -> None:
    # Given a policy that never grows, when the day is played, then growth and a kill amid others are missing.
    command = [sys.executable, "-m", "neaptide.cli", "demo", "--short", "--policy", "fixed", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "day.html")], capture_output=True, text=True,
                          timeout=280, env=environment())  # fmt: skip
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert {p["name"] for p in told["promises"] if not p["kept"]} >= {"grew", "kill"}


def test_a_page_that_cannot_be_written_is_told_before_the_day_begins(tmp_path: Path) -> None:
    done = cli("demo", "--short", "--out", str(tmp_path / "nowhere" / "day.html"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error[E110]" in done.stderr
