"""An engine learnt from its step log: coefficients are found again, a grid where a formula is not enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from neaptide.errors import ConfigError
from neaptide.simulate.learn import Learnt, Steps, engine, learn
from neaptide.simulate.steps import Grid, Linear

TRUE = Linear(
    base_s=1e-3, request_s=1e-4, token_s=2e-7, prefill_base_s=4e-3, prefill_token_s=3e-5, prefill_pair_s=1e-9
)  # fmt: skip
HEAD = {
    "event": "engine", "engine": "openvino", "model": "m", "context_tokens": 4096, "max_running": 32,
    "chunk_tokens": 512, "kv_tokens": 20_000, "kv_block_tokens": 32, "prefix_cache": True,
}  # fmt: skip


def steps(rows: int = 4000, seed: int = 0, noise: float = 0.03, step_s: Callable[..., float] = TRUE.step_s) -> Steps:
    """A busy engine's: half of them prefill."""
    random = np.random.default_rng(seed)
    batch = random.integers(0, 33, rows).astype(float)
    context = batch * random.integers(100, 1500, rows)
    prefill = np.where((batch == 0) | (random.random(rows) < 0.5), random.integers(1, 512, rows), 0).astype(float)
    pairs = prefill * (random.integers(0, 1000, rows) + (prefill + 1) / 2)
    exact = [step_s(int(b), int(c), int(p), float(x)) for b, c, p, x in zip(batch, context, prefill, pairs)]
    return Steps(batch, context, prefill, pairs, np.array(exact) * random.lognormal(0, noise, rows))


def written(path: Path, log: Steps, rotated: int = 0) -> Path:
    """As a replica writes it; the first `rotated` steps are in the predecessor."""
    rows = [
        {"event": "step", "batch": b, "context": c, "prefill": p, "pairs": x, "step_s": t / 2, "turn_s": t}
        for b, c, p, x, t in zip(*(column.tolist() for column in log))
    ]
    for part, its in ((Path(f"{path}.1"), rows[:rotated]), (path, rows[rotated:])):
        if its:
            part.write_bytes(b"\n".join(msgspec.json.encode(line) for line in [HEAD, *its]))
    return path


def test_a_formula_is_found_again_and_judged_on_steps_that_it_was_not_fitted_to() -> None:
    found = learn(steps())
    assert found.form == "linear"
    assert isinstance(found.traits.step, Linear)
    for name in ("base_s", "request_s", "token_s", "prefill_base_s", "prefill_token_s"):
        assert getattr(found.traits.step, name) == pytest.approx(getattr(TRUE, name), rel=0.05)
    assert found.linear.median == pytest.approx(0.02, abs=0.003)  # of a normal with 3 %
    assert abs(found.linear.total) < 0.003


def test_noisy_steps_are_not_taken_for_fast_ones() -> None:
    # What an engine needs in all must come out right; errors relative to what was measured would make it 12 % less.
    assert abs(learn(steps(noise=0.3)).linear.total) < 0.04


def kinked(batch: int, context: int, prefill: int = 0, pairs: float = 0.0) -> float:
    """Memory's speed up to eight requests, the processor's beyond."""
    return 1e-3 + 2e-4 * max(0, batch - 8) + 1e-7 * context + 3e-5 * prefill


def test_where_no_formula_fits_a_grid_is_chosen() -> None:
    found = learn(steps(step_s=kinked))
    assert found.form == "grid"
    assert found.grid.median < found.linear.median
    grid = found.traits.step
    assert isinstance(grid, Grid)
    for batch in (1, 4, 8, 16, 30):
        assert grid.step_s(batch, 800 * batch) == pytest.approx(kinked(batch, 800 * batch), rel=0.1)
    assert grid.prefill_token_s == pytest.approx(3e-5, rel=0.1)


def test_what_was_asked_for_is_chosen() -> None:
    assert learn(steps(500), "grid").form == "grid"
    assert learn(steps(500, step_s=kinked), "linear").form == "linear"


def test_steps_that_stalled_are_left_out_and_told() -> None:
    calm = steps()
    seconds = calm.seconds.copy()
    seconds[::400] = 2.0
    found = learn(calm._replace(seconds=seconds))
    assert (found.steps, found.stalls, found.stalled_s) == (4000, 10, 20.0)
    assert isinstance(found.traits.step, Linear)
    assert found.traits.step.base_s == pytest.approx(TRUE.base_s, rel=0.05)


def test_an_engine_is_read_from_its_own_logs_rotated_ones_too(tmp_path: Path) -> None:
    log = steps(600, noise=0.0)
    one = written(tmp_path / "m-0.steps.jsonl", log, rotated=200)
    other = written(tmp_path / "m-1.steps.jsonl", steps(300, seed=1, noise=0.0))
    traits, found = engine([one, other])
    assert isinstance(found, Learnt)
    assert found.steps == 900
    assert (traits.max_batch, traits.chunk_tokens, traits.kv_tokens, traits.kv_block_tokens) == (32, 512, 20_000, 32)
    assert traits.prefix_block_tokens == 512
    assert traits.admit == "answer"
    assert traits.step.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=1e-3)  # the turn, not the step alone


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path / "m-0.steps.jsonl", steps(100, noise=0.0))
    path.write_bytes(path.read_bytes()[:-20])
    _, found = engine([path])
    assert found is not None
    assert found.steps == 99


def test_anybodys_csv_is_a_log_or_a_grid(tmp_path: Path) -> None:
    log = tmp_path / "steps.csv"
    rows = [f"{b},{1000 * b},{p},{1e-3 + 1e-4 * b + 2e-5 * p}" for b in range(1, 20) for p in (0, 100)]
    log.write_text("batch,context,prefill,step_s\n" + "\n".join(rows))
    traits, found = engine([log])
    assert found is not None
    assert traits.step.prefill_token_s == pytest.approx(2e-5, rel=1e-3)
    grid = tmp_path / "grid.csv"
    grid.write_text("batch,context,step_s\n1,100,0.01\n1,1000,0.02\n8,100,0.03\n8,1000,0.04\n")
    traits, found = engine([grid])
    assert found is None
    assert isinstance(traits.step, Grid)


@pytest.mark.parametrize(("text", "code"), [("{}", "E120"), ("a,b\n1,2\n", "E120"), ("", "E120")])
def test_a_file_that_is_no_step_log_is_refused(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "some"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        engine([path])
    assert refused.value.code == code


def test_a_log_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-0.steps.jsonl"
    path.write_bytes(msgspec.json.encode(HEAD))
    with pytest.raises(ConfigError, match="no steps"):
        engine([path])
