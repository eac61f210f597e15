"""`neaptide simulate`: policies beside each other, tuned on some days and reported on others, in a fluid world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neaptide.control.peers import GRID, PEERS
from neaptide.errors import ConfigError
from neaptide.simulate import policies, sources
from neaptide.simulate.arrivals import DAY_S, Rates, Requests
from neaptide.simulate.compare import Comparison, Question, best, compare
from neaptide.simulate.outcome import Price, by_cost, outcome
from neaptide.simulate.replay import Tier
from neaptide.simulate.singly import singly
from neaptide.simulate.world import World, changed, read_world
from tests.cli_run import cli

HOURS = 3600.0
WORLD = World(tick_s=10, service_s=10, replicas_at_peak=12)
CHEAP = ("hpa", "hpa-tuned", "keda-tuned", "static", "static-tuned")


def short(first_hour: float, hours: float, rps: float = 6.0) -> Rates:
    """A log that begins and ends within days: `first_hour` is on its clock."""
    windows = round(hours * 6)
    rates = rps * (1 + 0.4 * np.sin(np.arange(windows) / 3))
    return Rates(series="short", window_s=600, start_s=first_hour * HOURS, rates=rates)


# Four hours at the end of day 0, which are tuned on, and two at the beginning of day 1, which are reported.
EVENING = short(20, 6)


def compared(rates: Rates = EVENING, *names: str, world: World = WORLD, **given: Any) -> Comparison:
    asked = Question(policies=names or CHEAP, **{"first_day": 1, "last_day": 1, "tune": (0, 0)} | given)
    return compare(world, rates, asked)


# --------------------------------------------------------------------------------------------- days and tuning


def test_a_tuned_policy_is_the_cheapest_target_that_kept_the_goal_on_the_tuning_days() -> None:
    found = compared()
    (tuned,) = [row for row in found.rows if row.name == "hpa-tuned"]
    tried = [(p, found.tuning(p)) for p in found.points if p.policy == "hpa"]
    good = [(m.hours, p.target) for p, m in tried if m.attainment >= WORLD.slo]
    assert good
    assert tuned.point.target == min(good)[1]
    assert {p.target for p, _ in tried} == set(GRID)


def test_where_no_target_kept_the_goal_the_nearest_one_stands() -> None:
    found = compared(EVENING, "static-tuned")
    few = [p for p in found.points if p.target < 8]
    attainments = [found.tuning(p).attainment for p in few]
    assert max(attainments) < WORLD.slo
    assert found.tuning(best(few, (0, 0), WORLD.slo)).attainment == max(attainments)


def test_tuning_never_looks_at_the_reported_days() -> None:
    """The reported day's second window and all after it are changed; half a window around midnight is shared, since a
    rate is linear between the windows' centres."""
    later = EVENING.rates.copy()
    later[-11:] *= 3.0
    one, other = compared(EVENING), compared(replace(EVENING, rates=later))
    assert [row.point.target for row in one.rows] == [row.point.target for row in other.rows]
    assert one.capacity_rps == other.capacity_rps
    for left, right in zip(one.points, other.points, strict=True):
        assert one.tuning(left).late.tolist() == other.tuning(right).late.tolist()
        assert one.tuning(left).replica_hours.tolist() == other.tuning(right).replica_hours.tolist()
    assert [row.reported.hours for row in one.rows] != [row.reported.hours for row in other.rows]


def test_the_bound_looks_at_the_reported_days_only() -> None:
    earlier = EVENING.rates.copy()
    earlier[:6] *= 0.5
    one, other = (compared(rates, "hpa", capacity_rps=0.7) for rates in (EVENING, replace(EVENING, rates=earlier)))
    assert one.tuning(one.points[0]).requests.tolist() != other.tuning(other.points[0]).requests.tolist()
    assert one.rows[0].reported.requests.tolist() == other.rows[0].reported.requests.tolist()
    assert one.bounds == other.bounds


def test_days_are_the_clocks_even_where_a_log_begins_in_the_evening() -> None:
    found = compared(short(22, 6), "static")
    daily = {d["day"]: d for d in outcome(compared(short(22, 6), "static", first_day=0))["policies"][0]["daily"]}
    assert set(daily) == {0, 1}
    assert daily[1]["replica_hours"] == pytest.approx(4 * found.rows[0].point.target)
    assert found.rows[0].reported.hours == daily[1]["replica_hours"]


def test_policies_are_warm_when_the_reported_days_begin() -> None:
    """What ran on the day before counts: without it, the first minutes are another story."""
    warm = compared(EVENING, "dynamo", capacity_rps=0.7)
    cold = compared(cut(EVENING, 24), "dynamo", capacity_rps=0.7, tune=(1, 1))
    assert warm.rows[0].reported.requests == pytest.approx(cold.rows[0].reported.requests, rel=0.01)
    assert warm.rows[0].reported.scale_events.tolist() != cold.rows[0].reported.scale_events.tolist()


def cut(rates: Rates, from_hour: float) -> Rates:
    at = round((from_hour * HOURS - rates.start_s) / rates.window_s)
    return replace(rates, start_s=from_hour * HOURS, rates=rates.rates[at:].copy())


def test_history_in_a_file_of_its_own_is_the_same_as_in_one_file() -> None:
    split = sources.rates(cut(EVENING, 24), replace(EVENING, rates=EVENING.rates[:24].copy()))
    one, other = compared(EVENING), compared(split)
    assert [row.reported.hours for row in one.rows] == [row.reported.hours for row in other.rows]
    assert one.capacity_rps == other.capacity_rps


def test_single_requests_get_the_windows_of_the_history_beside_them() -> None:
    later = Requests(t_s=DAY_S + np.arange(0.0, 7200.0, 0.5))
    joined = sources.rates(later, cut(EVENING, 20.0))
    assert (joined.window_s, joined.start_s) == (600, 20 * HOURS)
    assert joined.end_s == 26 * HOURS


# --------------------------------------------------------------------------------------------- what is found


def test_a_static_count_costs_its_count_at_all_times() -> None:
    found = compared(EVENING, "static")
    assert found.rows[0].reported.hours == pytest.approx(2 * found.rows[0].point.target)
    assert found.rows[0].point.target == WORLD.replicas_at_peak
    assert found.rows[0].reported.scale_events.sum() == 0
    assert found.ratio(found.rows[0].reported) == pytest.approx(found.rows[0].reported.hours / found.bound_hours)


def test_a_given_capacity_replaces_the_worlds_and_static_counts_follow_the_peak() -> None:
    found = compared(EVENING, "static", "static-tuned", capacity_rps=2.0)
    assert found.capacity_rps == 2.0
    assert found.rows[0].point.target == np.ceil(found.peak)
    assert max(p.target for p in found.points) == round(2 * found.peak)


def test_an_slo_beside_others_costs_what_it_costs_alone() -> None:
    beside = compared(EVENING, policies.OWN, slos=(0.9, 0.99, 0.999))
    assert [p.target for p in beside.slo_points] == [0.9, 0.99, 0.999]
    for point in beside.slo_points:
        world = changed(WORLD, slo=point.target)
        alone = compared(EVENING, policies.OWN, world=world)
        assert beside.reported(point).hours == alone.rows[0].reported.hours
        assert beside.reported(point).late.tolist() == alone.rows[0].reported.late.tolist()


def test_several_seeds_are_means_of_each_alone() -> None:
    both = compared(EVENING, "hpa", seeds=(3, 4))
    alone = [compared(EVENING, "hpa", seeds=(seed,)) for seed in (3, 4)]
    by_seed = outcome(both)["policies"][0]["by_seed"]
    assert [row["replica_hours"] for row in by_seed] == [c.rows[0].reported.hours for c in alone]
    assert [row["cost_ratio"] for row in by_seed] == pytest.approx([c.ratio(c.rows[0].reported) for c in alone])
    assert both.rows[0].reported.hours == pytest.approx(np.mean([c.rows[0].reported.hours for c in alone]))


def test_a_target_shared_by_a_name_and_its_tuned_form_runs_once() -> None:
    found = compared(EVENING, "keda", "keda-tuned")
    assert sorted(p.target for p in found.points) == list(GRID)
    (shipped, tuned) = found.rows
    assert (shipped.point.target, shipped.tuned, tuned.tuned) == (0.8, False, True)


def test_what_does_not_move_arrivals_does_not_move_the_bound() -> None:
    assert compared(EVENING, "hpa").bounds == compared(EVENING, "static").bounds


def test_reported_days_without_a_request_are_refused() -> None:
    empty = EVENING.rates.copy()
    empty[23:] = 0.0
    with pytest.raises(ConfigError, match="no request in days 1 to 1") as refused:
        compared(replace(EVENING, rates=empty), "hpa")
    assert refused.value.code == "E124"


def test_progress_rises_to_its_end() -> None:
    told: list[float] = []
    asked = Question(policies=("hpa",), first_day=1, last_day=1, tune=(0, 0), seeds=(0, 1))
    compare(WORLD, EVENING, asked, told.append)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)


# --------------------------------------------------------------------------------------------- request by request

FEW = short(23, 2, rps=0.3)  # a thousand requests either side of midnight


def singled(tier: Tier = "fast", recorded: Requests | None = None, **given: Any) -> Comparison:
    names = ("hpa", "hpa-tuned", "static")
    return singly(compared(FEW, *names, capacity_rps=0.2, **given), tier, recorded)


def test_request_by_request_the_targets_are_tuned_and_reported_in_that_tier() -> None:
    fluid, single = compared(FEW, "hpa", "hpa-tuned", "static", capacity_rps=0.2), singled()
    assert (single.tier, len(single.points)) == ("fast", len(fluid.points))
    (tuned,) = [row for row in single.rows if row.name == "hpa-tuned"]
    tried = [(single.tuning(p), p.target) for p in single.points if p.policy == "hpa"]
    good = [(m.hours, target) for m, target in tried if single.reached(m)]
    assert tuned.point.target == (min(good)[1] if good else max((m.attainment, u) for m, u in tried)[1])
    assert all(row.p99_ttft_s is not None for row in single.rows)
    assert all(row.p99_ttft_s is None for row in fluid.rows)


def test_the_tiers_agree_on_what_does_not_depend_on_batching() -> None:
    fluid, single = compared(FEW, "hpa", "hpa-tuned", "static", capacity_rps=0.2), singled()
    for one, other in zip(fluid.points, single.points, strict=True):
        assert single.reported(other).requests == pytest.approx(fluid.reported(one).requests)
        if one.policy == "static":
            assert single.reported(other).hours == pytest.approx(fluid.reported(one).hours, rel=0.01)
    assert single.bound_hours == pytest.approx(fluid.bound_hours)


def test_a_files_own_requests_are_replayed_as_they_are() -> None:
    t_s = np.sort(np.random.default_rng(1).uniform(23 * HOURS, 25 * HOURS, 1000))
    recorded = Requests(t_s=t_s)
    found = compare(
        WORLD, recorded.rates(600.0),
        Question(policies=("static",), first_day=1, last_day=1, tune=(0, 0), capacity_rps=0.2),
    )  # fmt: skip
    single = singly(found, "fast", recorded)
    assert single.rows[0].reported.requests.tolist() == [float((t_s >= DAY_S).sum())]


def test_history_joins_recorded_requests_on_the_earlier_clock() -> None:
    history = Requests(t_s=np.array([10.0, 20.0, 90000.0]), origin_s=0.0)
    later = Requests(t_s=np.array([50.0, 60.0]), origin_s=86400.0)
    joined = sources.recorded(later, history)
    assert joined is not None
    assert joined.t_s.tolist() == [10.0, 20.0, 86450.0, 86460.0]  # what both have is the arrivals'
    assert joined.origin_s == 0.0
    assert sources.recorded(EVENING) is None
    assert sources.recorded(later, EVENING) is None


# --------------------------------------------------------------------------------------------- names


def test_all_is_every_policy_and_each_peer_tuned() -> None:
    names = policies.chosen(["all"])
    assert set(names) == {policies.OWN, *(name + suffix for name in PEERS for suffix in ("", "-tuned"))}
    assert policies.chosen(["hpa", "ray", "hpa"]) == ("hpa", "ray")
    assert set(policies.chosen(["hpa", "all"])) == set(names)


@pytest.mark.parametrize("name", ["hpaa", "neaptide-tuned", "", "all-tuned"])
def test_a_policy_that_there_is_none_of_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match="called") as refused:
        policies.chosen([name])
    assert refused.value.code == "E125"
    assert "skyserve-tuned" in refused.value.fix


def test_every_name_can_be_run() -> None:
    found = compare(
        WORLD, short(23, 2), Question(policies=policies.chosen(["all"]), first_day=1, last_day=1, tune=(0, 0))
    )
    assert [row.name for row in found.rows] == list(policies.names())
    assert all(row.reported.requests.sum() > 0 for row in found.rows)


# --------------------------------------------------------------------------------------------- JSON


def test_the_json_has_the_contracts_fields_and_the_grid() -> None:
    found = compared()
    told = json.loads(json.dumps(outcome(found, Price(12.0))))
    assert {"world", "tier", "seed", "bound", "policies", "grid", "seeds", "days", "slo_price"} <= set(told)
    assert set(told["bound"]) >= {"definition", "replica_hours", "replica_hours_no_budget"}
    assert told["world"]["cold_start_s"] == 180
    assert (told["tier"], told["seed"]) == ("fluid", 0)
    for policy in told["policies"]:
        assert set(policy) >= {"name", "cost_ratio", "attainment", "replica_hours", "scale_events", "p99_ttft_s"}
        assert policy["cost_ratio"] == pytest.approx(policy["replica_hours"] / told["bound"]["replica_hours"])
        assert (policy["tuned"] is None) == (not policy["name"].endswith("-tuned"))
    assert {(p["policy"], p["target"]) for p in told["grid"]} >= {("hpa", u) for u in GRID}
    assert [p["cost_ratio"] for p in told["policies"]] == sorted(p["cost_ratio"] for p in told["policies"])
    hours = {row.name: row.reported.hours for row in by_cost(found)}
    assert told["price"]["per_day"]["static"] == pytest.approx(hours["static"] * 12.0 * 12)  # two hours of a day


def test_money_is_told_with_its_sign_and_no_more_digits_than_help() -> None:
    price = Price(2.0, "CNY")
    assert [price.text(a) for a in (1234.5, 3.456, -41.0)] == ["¥1,234", "¥3.46", "-¥41"]
    assert Price(2.0, "SEK").text(30.0) == "SEK 30"


# --------------------------------------------------------------------------------------------- worlds


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("slo: 0.9\nslo: 0.99", "E102", "'slo' stands twice"),
        ("slo: [", "E102", "line 1"),
        ("slo: 1.0", "E105", "slo"),
        ("slo: high", "E105", "slo"),
        ("tick_s: 0", "E105", "tick_s"),
        ("slow: 1", "E105", "slow"),
        ("- slo", "E105", "object"),
        ("cold_start_s: .inf", "E105", "cold_start_s"),
        ("cold_start_s: 7", "E105", "no multiple"),
    ],
)
def test_a_world_is_read_as_strictly_as_the_configuration(text: str, code: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "world.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as refused:
        read_world(file)
    assert refused.value.code == code
    assert str(file) in refused.value.what


def test_an_empty_world_is_the_goals_and_an_absent_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert read_world(tmp_path / "empty.yaml") == read_world()
    with pytest.raises(ConfigError, match=r"none\.yaml") as refused:
        read_world(tmp_path / "none.yaml")
    assert refused.value.code == "E101"


def test_a_cold_start_and_an_slo_replace_the_worlds() -> None:
    assert changed(read_world(), cold_start_s=60, slo=0.999) == World(cold_start_s=60, slo=0.999)
    assert changed(read_world()) == read_world()
    for wrong in ({"cold_start_s": 61.0}, {"cold_start_s": 0.0}, {"slo": 1.0}, {"slo": 99.0}):
        with pytest.raises(ConfigError):
            changed(read_world(), **wrong)


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evening, as a CSV of rates."""
    file = tmp_path_factory.mktemp("log") / "evening.csv"
    times = EVENING.start_s + np.arange(len(EVENING.rates)) * EVENING.window_s
    rows = [f"{t:.0f},{rate!r}" for t, rate in zip(times.tolist(), EVENING.rates.tolist(), strict=True)]
    file.write_text("t_s,rate_rps\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return file


def simulate(log: Path, *more: str) -> Any:
    tier = () if "--tier" in more else ("--tier", "fluid")
    return cli("simulate", "--arrivals", str(log), "--tune", "0", *tier, *more)


def test_the_command_prints_json_on_stdout_and_what_it_read_on_stderr(log: Path) -> None:
    done = simulate(log, "--from", "1", "--to", "1", "--policy", "hpa,static-tuned", "--json", "--seed", "3")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["seed"], told["days"]["from"], told["days"]["tune"]) == (3, 1, [0, 0])
    assert {p["name"] for p in told["policies"]} == {"hpa", "static-tuned"}
    assert "36 rows" in done.stderr


def test_few_requests_are_replayed_by_default_and_have_a_p99(log: Path) -> None:
    made = "synthetic:steady,days=0.05,mean_rps=0.2,window_s=60"
    done = cli("simulate", "--arrivals", made, "--policy", "static", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tier"] == "fast"
    assert told["policies"][0]["p99_ttft_s"] > 0
    table = cli("simulate", "--arrivals", made, "--policy", "static")
    assert "p99 TTFT" in table.stdout


def test_the_table_is_sorted_by_cost_marks_what_misses_and_tells_the_bounds_definition(log: Path) -> None:
    done = simulate(log, "--policy", "static-tuned,dynamo,hpa", "--price-per-hour", "12")
    assert done.returncode == 0, done.stderr
    title, header, *rows, bound = done.stdout.splitlines()
    assert "days 1 to 1" in title
    assert header.split()[:3] == ["policy", "target", "cost"]
    costs = [float(row.split()[2]) for row in rows]
    assert costs == sorted(costs)
    (dynamo,) = [row for row in rows if row.startswith("dynamo ")]
    assert "misses 0.99" in dynamo
    assert "¥" in dynamo
    assert "clairvoyant" in bound


def test_days_default_to_those_after_the_tuning_days_and_overlap_is_told(log: Path) -> None:
    assert "days 1 to 1" in simulate(log, "--policy", "static").stdout
    both = simulate(log, "--policy", "static", "--from", "0")
    assert "days 0 to 1" in both.stdout
    assert "in sample" in both.stdout


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--policy", "hpaa"), "E125"),
        (("--policy", ","), "E125"),
        (("--policy", "hpa", "--to", "9"), "E124"),
        (("--policy", "hpa", "--from", "1", "--to", "0"), "E124"),
        (("--policy", "hpa", "--tune", "6-0"), "E110"),
        (("--policy", "hpa", "--tune", "5-6"), "E124"),
        (("--policy", "hpa", "--slo", "99"), "E105"),
        (("--policy", "hpa", "--cold-start-s", "61"), "E105"),
        (("--policy", "hpa", "--world", "none.yaml"), "E101"),
        (("--policy", "hpa", "--tier", "gas"), "E110"),
        (("--policy", "hpa", "--capacity", "0"), "E110"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_code_and_a_remedy(log: Path, more: tuple[str, ...], code: str) -> None:
    done = simulate(log, *more, "--json")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == code
    assert error["fix"]


@pytest.mark.parametrize("made", ["synthetic:tidal", "synthetic:steady,mean=3", "synthetic:steady,days=nan"])
def test_traffic_that_cannot_be_made_is_refused(made: str) -> None:
    with pytest.raises(ConfigError) as refused:
        sources.arrivals(made)
    assert refused.value.code == "E110"


def test_traffic_can_be_made_instead_of_read() -> None:
    made = sources.arrivals("synthetic:steady,mean_rps=3,days=0.5,noise=0")
    assert isinstance(made, Rates)
    assert made.rates == pytest.approx(3.0)
    assert made.end_s == DAY_S / 2
