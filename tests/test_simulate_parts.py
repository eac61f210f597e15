"""Where the policy's cost above the bound goes: control, forecast and cold start, found by running it again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neaptide.simulate.arrivals import Rates
from neaptide.simulate.compare import Comparison, Question, compare, counts_of
from neaptide.simulate.parts import Parts, needed, parts, tree
from neaptide.simulate.world import World
from tests.cli_run import cli

WORLD = World(tick_s=5, cold_start_s=120, replicas_at_peak=12)


def tide(rps: float = 8.0) -> Rates:
    """Four hours before midnight, which are tuned on, and two after it; a tide every two hours."""
    swing = 1 + 0.5 * np.sin(2 * np.pi * np.arange(36) / 12)
    return Rates(series="tide", window_s=600, start_s=20 * 3600.0, rates=rps * swing, dispersion=3.0)


def compared(*names: str) -> Comparison:
    asked = Question(policies=names, first_day=1, last_day=1, tune=(0, 0), seeds=(0, 1))
    return compare(WORLD, tide(), asked)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compared("neaptide", "static")


@pytest.fixture(scope="module")
def told(found: Comparison) -> Parts:
    told = parts(found)
    assert told is not None
    return told


def test_control_and_forecast_sum_to_the_cost_above_the_bound(found: Comparison, told: Parts) -> None:
    (own,) = [row for row in found.rows if row.name == "neaptide"]
    over = own.reported.replica_hours / [bound.replica_hours for bound in found.bounds] - 1
    assert told.control + told.forecast == pytest.approx(over)


def test_knowing_the_future_and_starting_at_once_both_save(told: Parts) -> None:
    assert ((told.control > 0) & (told.cold_start > 0) & (told.forecast > 0)).all()
    assert min(told.told_attainment, told.instant_attainment) > 0.98


def test_a_comparison_without_the_policy_has_no_parts() -> None:
    assert parts(compared("static")) is None


def test_the_future_is_the_most_of_what_a_launch_could_still_meet() -> None:
    counts = np.array([[0.0, 10.0, 10.0, 0.0, 0.0, 0.0]])
    world = World(tick_s=5, service_s=10, cold_start_s=10)
    assert needed(world, counts)[:, 0].tolist() == [2.0, 2.0, 2.0, 1.0, 0.0, 0.0]


def test_it_is_told_of_the_same_arrivals_that_the_bound_sees(found: Comparison) -> None:
    rows = counts_of(found.world, found.rates, found.question.seeds, found.span)
    assert needed(found.world, rows).shape == rows.T.shape
    assert rows.sum() == pytest.approx(float(found.points[0].days.arrivals.sum()))


def test_the_command_tells_them_in_words_and_in_json() -> None:
    args = ("simulate", "--arrivals", "synthetic:steady,mean_rps=4,days=0.05", "--tune", "0", "--policy", "neaptide")
    shown = cli(*args, "--parts")
    assert "are its control's" in shown.stdout
    assert set(json.loads(cli(*args, "--parts", "--json").stdout)["parts"]) >= {"control", "forecast", "cold_start"}


def test_single_requests_have_no_parts() -> None:
    refused = cli("simulate", "--arrivals", "synthetic:steady", "--parts", "--tier", "fast", "--json")
    assert json.loads(refused.stderr.splitlines()[-1])["error"]["code"] == "E110"


def test_json_has_each_seed(told: Parts) -> None:
    assert [set(seed) for seed in tree(told)["by_seed"]] == [{"control", "forecast", "cold_start"}] * 2  # type: ignore[attr-defined]
