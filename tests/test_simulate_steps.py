"""Step times: the formula, a grid, the straight pieces of both, and coefficients learnt from a log of steps."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.errors import ConfigError
from neaptide.simulate.engine import Traits
from neaptide.simulate.steps import Grid, Linear, fit, pairs_of, piece_at, read_grid

LINEAR = Linear(
    base_s=0.01, request_s=0.001, token_s=1e-6, prefill_base_s=0.003, prefill_token_s=2e-5, prefill_pair_s=1e-9
)  # fmt: skip
GRID = Grid(batches=(1, 4, 16), contexts=(100, 1000), seconds=((0.01, 0.02), (0.013, 0.04), (0.02, 0.1)))


def test_a_step_is_the_sum_of_its_parts() -> None:
    assert LINEAR.step_s(0, 0) == 0.01
    assert LINEAR.step_s(3, 5000, 100, pairs_of(100, 50)) == pytest.approx(0.01 + 0.003 + 0.005 + 0.005 + 10050e-9)


def test_what_a_prompt_costs_however_short_is_no_part_of_a_step_without_one() -> None:
    assert LINEAR.step_s(3, 5000, 1) - LINEAR.step_s(3, 5000) == pytest.approx(0.003 + 2e-5)
    grid = msgspec.structs.replace(GRID, prefill_base_s=0.003)
    assert grid.step_s(4, 900, 1) - grid.step_s(4, 900) == pytest.approx(0.003)


def test_prompt_tokens_attend_themselves_and_all_before_them_however_they_are_cut() -> None:
    assert pairs_of(3, 0) == 1 + 2 + 3
    assert pairs_of(3, 10) == 11 + 12 + 13
    assert pairs_of(700, 0) + pairs_of(324, 700) == pairs_of(1024, 0)


def test_a_grid_gives_back_its_points_and_lies_between_them() -> None:
    for row, batch in enumerate(GRID.batches):
        for column, context in enumerate(GRID.contexts):
            assert GRID.step_s(batch, batch * context) == pytest.approx(GRID.seconds[row][column])
    assert GRID.step_s(4, 4 * 550) == pytest.approx((0.013 + 0.04) / 2)
    assert GRID.step_s(10, 10 * 100) == pytest.approx((0.013 + 0.02) / 2)


def test_beyond_a_grid_the_first_point_holds_and_the_last_one_goes_straight_on() -> None:
    assert GRID.step_s(1, 10) == 0.01
    assert GRID.step_s(1, 1900) == pytest.approx(0.03)
    assert GRID.step_s(28, 28 * 100) == pytest.approx(0.027)
    assert GRID.step_s(0, 0, 100) == 0.01  # prefill alone


@given(st.integers(1, 40), st.integers(0, 100_000), st.sampled_from([LINEAR, GRID]))
def test_pieces_are_the_step_in_straight_lines(batch: int, context: int, step: Linear | Grid) -> None:
    pieces = step.pieces(batch)
    assert pieces[-1].until == math.inf
    piece = piece_at(pieces, context)
    assert piece.at_zero_s + piece.per_token_s * context == pytest.approx(step.step_s(batch, context))
    for left, right in pairwise(pieces):
        at = left.until
        assert left.at_zero_s + left.per_token_s * at == pytest.approx(right.at_zero_s + right.per_token_s * at)


def steps(rows: int, seed: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    batch = random.integers(0, 64, rows)
    return batch, batch * random.integers(50, 2000, rows), random.integers(0, 512, rows)


def test_coefficients_are_found_again_in_a_noisy_log() -> None:
    batch, context, prefill = steps(4000, 1)
    true = 0.01 + 1e-3 * batch + 1e-6 * context + 2e-5 * prefill
    found = fit(batch, context, prefill, true * np.random.default_rng(2).lognormal(0, 0.05, 4000))
    assert found.step.base_s == pytest.approx(0.01, rel=0.05)
    assert found.step.request_s == pytest.approx(1e-3, rel=0.05)
    assert found.step.token_s == pytest.approx(1e-6, rel=0.05)
    assert found.step.prefill_token_s == pytest.approx(2e-5, rel=0.1)
    assert found.median_error == pytest.approx(0.034, abs=0.005)  # of a normal with 5 %: 0.674 sigma
    assert found.p95_error > found.median_error
    assert found.rows == 4000


def test_what_would_come_out_negative_is_left_out() -> None:
    batch, context, prefill = steps(500, 3)
    found = fit(batch, context, prefill, 0.02 + 1e-3 * batch - 1e-6 * np.minimum(prefill, 100))
    assert found.step.prefill_token_s == 0.0
    assert found.step.request_s == pytest.approx(1e-3, rel=0.02)


def test_pairs_are_told_from_tokens_where_the_log_has_them() -> None:
    random = np.random.default_rng(4)
    prefill, before = random.integers(1, 2048, 300), random.integers(0, 30_000, 300)
    pairs = np.array([pairs_of(int(p), int(b)) for p, b in zip(prefill, before)])
    none = np.zeros(300)
    found = fit(none, none, prefill, 0.01 + 2e-5 * prefill + 1e-9 * pairs, pairs)
    assert found.step.prefill_pair_s == pytest.approx(1e-9)
    assert found.step.request_s == 0.0


def test_what_every_prompt_costs_is_found_and_where_each_step_has_one_it_is_the_base() -> None:
    batch, context, prefill = steps(2000, 5)
    prefill = np.where(prefill < 256, 0, prefill)
    took = 0.01 + 1e-3 * batch + 1e-6 * context + 2e-5 * prefill + 0.007 * (prefill > 0)
    assert fit(batch, context, prefill, took).step.prefill_base_s == pytest.approx(0.007)
    some = prefill > 0
    found = fit(batch[some], context[some], prefill[some], took[some]).step
    assert (found.base_s, found.prefill_base_s) == (pytest.approx(0.017), 0.0)


@pytest.mark.parametrize("seconds", [[0.01], [0.01, 0.0], [0.01, math.nan]])
def test_steps_that_teach_nothing_are_an_error(seconds: list[float]) -> None:
    some = np.ones(len(seconds))
    with pytest.raises(ConfigError, match="no step times"):
        fit(some, some, some, seconds)


def test_a_grid_is_read_from_csv(tmp_path: Path) -> None:
    file = tmp_path / "grid.csv"
    file.write_text("context,batch,step_s\n100,1,0.01\n1000,1,0.02\n100,8,0.03\n1000,8,0.04\n")
    grid = read_grid(file, prefill_token_s=1e-5)
    assert (grid.batches, grid.contexts, grid.seconds) == ((1, 8), (100, 1000), ((0.01, 0.02), (0.03, 0.04)))
    assert grid.prefill_token_s == 1e-5


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("batch,step_s\n1,2\n", "E120"),
        ("batch,context,step_s\n", "E121"),
        ("batch,context,step_s\n1,100,x\n", "E121"),
        ("batch,context,step_s\n1,100,.1\n1,200,.1\n2,100,.1\n", "E121"),
        ("batch,context,step_s\n1,100,.1\n1,100,.1\n", "E121"),
        ("batch,context,step_s\n1,100,-1\n", "E121"),
    ],
)
def test_a_file_that_is_no_grid_is_refused_with_a_code(tmp_path: Path, text: str, code: str) -> None:
    file = tmp_path / "grid.csv"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_grid(file)
    assert refused.value.code == code


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_grid(tmp_path / "none.csv")


@pytest.mark.parametrize("make", [lambda: Linear(base_s=0.0), lambda: Linear(base_s=1.0, token_s=-1.0)])
def test_steps_that_take_no_time_are_refused(make: type[Linear]) -> None:
    with pytest.raises(ValueError, match="base_s over 0"):
        make()


def test_either_kind_is_read_from_yaml_by_its_tag() -> None:
    read = msgspec.yaml.decode(b"step: {type: linear, base_s: 0.02}\nmax_batch: 4", type=Traits)
    assert read.step == Linear(base_s=0.02)
    read = msgspec.yaml.decode(b"step: {type: grid, batches: [1], contexts: [100], seconds: [[0.01]]}", type=Traits)
    assert read.step.step_s(3, 900) == 0.01


def test_steps_that_seem_to_have_no_constant_part_keep_a_little_of_one() -> None:
    batch = np.arange(1.0, 9.0)
    none = np.zeros(8)
    found = fit(batch, none, none, 0.01 * batch - 0.001)
    assert 0 < found.step.base_s < 0.001
    assert found.step.request_s == pytest.approx(0.01, rel=0.1)
