"""`neaptide fit` and `simulate --setup`: an engine that was measured, and policies on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Traits
from neaptide.simulate.measured import Measured, Question, measured, outcome, untuned
from neaptide.simulate.policies import chosen
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup, read_setup
from neaptide.simulate.steps import Linear
from neaptide.simulate.world import World
from tests.cli_run import cli
from tests.test_simulate_learn import steps, written

ENGINE = Traits(step=Linear(base_s=0.01, request_s=0.001, prefill_token_s=1e-5), max_batch=8, kv_tokens=None)
SETUP = Setup(engine=ENGINE, replicas=3, slo_ttft_s=1.0)


def asked(minutes: float = 10.0, rps: float = 20.0, seed: int = 0) -> Requests:
    random = np.random.default_rng(seed)
    t_s = np.sort(random.uniform(0, 60 * minutes, int(60 * minutes * rps)))
    tokens = random.integers(10, 60, (2, len(t_s)))
    return Requests(t_s=t_s, in_tokens=tokens[0], out_tokens=tokens[1])


def on(setup: Setup, *names: str, requests: Requests | None = None) -> Measured:
    requests = requests or asked()
    question = Question(policies=names, first_day=0, last_day=0, tune=(0, 0), tier="fast")
    return measured(requests.rates(), requests, setup, World(), question)


def test_the_setups_own_count_runs_beside_the_policies_on_the_same_requests() -> None:
    found = on(SETUP, "hpa", "static")
    names = {run.name: run for run in found.runs}
    assert set(names) == {"fixed", "hpa", "static"}
    assert {len(run.served.t_s) for run in found.runs} == {12_000}
    alone = replay(asked(), SETUP, from_s=0.0, to_s=600.0)
    assert names["fixed"].served.quantile("ttft_s", 0.99) == alone.quantile("ttft_s", 0.99)
    assert names["fixed"].target is None
    assert [run.served.replica_hours for run in found.runs] == sorted(run.served.replica_hours for run in found.runs)


def test_lengths_batches_and_steps_decide_what_a_replica_serves() -> None:
    quick = on(SETUP).capacity_rps
    slow = on(Setup(engine=Traits(step=Linear(base_s=0.02, request_s=0.002), max_batch=8), replicas=3)).capacity_rps
    assert slow == pytest.approx(quick / 2, rel=0.05)


def test_without_a_count_only_policies_run_and_rates_are_drawn_from() -> None:
    rates = asked().rates()
    question = Question(policies=("static",), first_day=0, last_day=0, tune=(0, 0))
    found = measured(rates, None, Setup(engine=ENGINE, in_tokens=35, out_tokens=35), World(), question)
    (run,) = found.runs
    assert run.name == "static"
    assert len(run.served.t_s) == pytest.approx(12_000, rel=0.05)


def test_an_outcome_is_json_and_says_that_there_is_no_bound() -> None:
    told = json.loads(json.dumps(outcome(on(SETUP)), allow_nan=False))
    assert told["bound"] is None
    assert told["setup"]["engine"]["step"]["type"] == "linear"
    assert told["policies"][0]["p99_tpot_s"] > 0


def test_tuned_forms_are_left_out_of_all_and_refused_by_name() -> None:
    assert "hpa" in untuned(chosen(["all"]))
    assert not [name for name in untuned(chosen(["all"])) if name.endswith("-tuned")]
    with pytest.raises(ConfigError, match="own targets"):
        untuned(("hpa-tuned",))


# ------------------------------------------------------------------------------------------------- command line


def test_a_step_log_becomes_a_setup_that_is_simulated(tmp_path: Path) -> None:
    log = written(tmp_path / "m-0.steps.jsonl", steps(800))
    out = tmp_path / "setup.yaml"
    fitted = cli("fit", str(log), "-o", str(out))
    assert fitted.returncode == 0
    assert "half of the steps" in fitted.stderr
    setup = read_setup(out)
    assert (setup.engine.max_batch, setup.engine.chunk_tokens) == (32, 512)
    out.write_text(yaml.safe_dump(yaml.safe_load(out.read_text()) | {"replicas": 1}))
    arrivals = tmp_path / "arrivals.csv"
    rows = [f"{i / 10},100,20" for i in range(3000)]
    arrivals.write_text("t_s,in_tok,out_tok\n" + "\n".join(rows))
    told = cli("simulate", "--arrivals", str(arrivals), "--setup", str(out), "--policy", "hpa", "--tune", "0", "--json")
    assert told.returncode == 0, told.stderr
    (fixed, hpa) = sorted(json.loads(told.stdout)["policies"], key=lambda p: str(p["name"]))
    assert (fixed["name"], hpa["name"]) == ("fixed", "hpa")
    assert fixed["requests"] == 3000
    shown = cli("simulate", "--arrivals", str(arrivals), "--setup", str(out), "--policy", "hpa", "--tune", "0")
    assert "p99 TPOT" in shown.stdout


def test_a_setup_is_told_without_a_file_and_in_json(tmp_path: Path) -> None:
    log = written(tmp_path / "m-0.steps.jsonl", steps(400))
    printed = cli("fit", str(log), "--form", "grid")
    assert yaml.safe_load(printed.stdout)["engine"]["step"]["type"] == "grid"
    told = json.loads(cli("fit", str(log), "--json").stdout)
    assert told["fit"]["steps"] == 400
    assert told["setup"]["engine"]["kv_tokens"] == 20_000


@pytest.mark.parametrize("more", [["--tail"], ["--tier", "fluid"], ["--capacity", "3"], ["--policy", "hpa-tuned"]])
def test_what_a_setup_does_not_go_with_is_refused(tmp_path: Path, more: list[str]) -> None:
    setup = tmp_path / "setup.yaml"
    setup.write_text("replicas: 1\n")
    made = "synthetic:steady,mean_rps=1,days=0.05"
    refused = cli("simulate", "--arrivals", made, "--setup", str(setup), "--tune", "0", *more)
    assert refused.returncode == 2
    assert "E110" in refused.stderr
