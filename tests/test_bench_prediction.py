"""The truth experiment: what is kept of a run, what the simulator says of it, and where its error comes from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench import truth
from bench.diagnosis import Witness
from bench.kit import BenchError
from bench.prediction import calibrated, compared, judged, told
from bench.recorded import About, Folder, Run, answered, cut
from neaptide.simulate import learn
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Traits
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup
from neaptide.simulate.steps import Linear
from tests.engine_runs import chat, requests

STEP = Linear(base_s=2e-3, request_s=1e-4, token_s=1e-6, prefill_base_s=5e-3, prefill_token_s=8e-5, prefill_pair_s=5e-8)
REAL = Traits(
    step=STEP, max_batch=16, chunk_tokens=256, kv_tokens=64_000, kv_block_tokens=32, headroom=0.0, admit="answer",
    prefix_block_tokens=0,
)  # fmt: skip
HEAD = {"event": "engine", "max_running": 16, "chunk_tokens": 256, "kv_tokens": 64_000, "kv_block_tokens": 32}
OVERHEAD_S = 0.004
ABOUT = About(minutes=1.0, replicas=1, in_tokens=300.0, out_tokens=60.0)


def row(number: int, sent_s: float, ttft_s: float, tokens: int, tpot_s: float, error: str = "") -> list[Any]:
    return [number, sent_s, sent_s + ttft_s, sent_s + ttft_s + tpot_s * (tokens - 1), 10, tokens, error]


def line(t_s: float, step: tuple[float, ...] = (1, 9, 0, 0.0, 0.01)) -> bytes:
    names = ("batch", "context", "prefill", "pairs", "turn_s")
    return msgspec.json.encode({"t": t_s, "event": "step", **dict(zip(names, step, strict=True))})


def kept(folder: Folder, logs: Path, asked: Requests, engine: Traits, **about: Any) -> Run:
    """As if a service whose engine is that one had answered."""
    witness = Witness(engine.step)
    setup = Setup(engine=msgspec.structs.replace(engine, step=witness), replicas=1)
    served = replay(asked, setup, tier="exact")
    first_s, end_s = (served.t_s + served.ttft_s + OVERHEAD_S, served.finish_s + OVERHEAD_S)
    columns = (served.t_s, first_s, end_s, served.in_tokens, served.out_tokens)
    rows = [[number, *values, ""] for number, values in enumerate(zip(*(column.tolist() for column in columns)))]
    lines = [line(1.0, step) for step in zip(*(column.tolist() for column in witness.steps()))]
    logs.mkdir(exist_ok=True)
    (logs / "guide-0.steps.jsonl").write_bytes(b"\n".join([msgspec.json.encode(HEAD), *lines]))
    run = Run(told={"rows": rows, "wall_s": float(end_s[-1])}, **about)
    folder.keep(run, logs, 0.0)
    return run


def experiment(tmp_path: Path, engine: Traits) -> Folder:
    """Calibrated on REAL; the run is answered by `engine`."""
    folder, logs = Folder.begin(tmp_path / "kept", ABOUT), tmp_path / "log"
    alone = requests([(30.0 * i, 40 * i + 1, 20) for i in range(25)])
    kept(folder, logs, alone, REAL, seed=1, level=1)
    kept(folder, logs, chat(150, 8.0, 2), REAL, seed=2, level=8)
    kept(folder, logs, chat(400, 5.0, 3), engine, seed=0, load=0.85, rps=6.0)
    return folder


def predicted(tmp_path: Path, engine: Traits) -> dict[str, Any]:
    folder = Folder.read(experiment(tmp_path, engine).path)
    (run,) = folder.runs()
    return compared(folder, run, calibrated(folder, "linear"), "linear")


def by_class(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["class"]: one for one in found["classes"]}


# ------------------------------------------------------------------------------------------------ what is kept


def test_answers_become_columns_in_the_order_of_sending() -> None:
    told = {"rows": [row(1, 2.0, 0.3, 1, 0.0), row(0, 1.0, 0.2, 5, 0.01)], "late_s": 0.0}
    found = answered(told)
    assert found.t_s.tolist() == [1.0, 2.0]
    assert found.ttft_s.tolist() == pytest.approx([0.2, 0.3])
    assert found.tpot_s[0] == pytest.approx(0.01)
    assert math.isnan(found.tpot_s[1])
    assert found.told == {"late_s": 0.0, "requests": 2, "failed": 0, "expired": 0}


def test_an_experiment_in_which_requests_fail_is_none() -> None:
    with pytest.raises(BenchError, match="1 of 2 requests failed"):
        answered({"rows": [row(0, 1.0, 0.2, 5, 0.01), row(1, 1.0, 0.2, 5, 0.01, "429")]})


def test_who_waited_in_vain_never_reached_a_replica_and_is_counted_and_left_out() -> None:
    error = 'data: {"error": {"code": "wait_expired"}}'
    found = answered({"rows": [row(0, 1.0, 0.2, 5, 0.01), row(1, 1.0, 60.0, 5, 0.01, error)]})
    assert (len(found.t_s), found.told["failed"], found.told["expired"]) == (1, 0, 1)


def test_of_a_step_log_a_run_keeps_the_head_and_its_own_lines_those_in_the_rotated_file_too(tmp_path: Path) -> None:
    head, log = msgspec.json.encode(HEAD), tmp_path / "guide-0.steps.jsonl"
    Path(f"{log}.1").write_bytes(b"\n".join([head, line(9.9), line(10.0)]) + b"\n")
    log.write_bytes(b"\n".join([head, line(10.5), line(11.0)[:-9]]))
    assert cut(log, 10.0).splitlines() == [head, line(10.0), line(10.5)]
    log.write_bytes(b"\n".join([head, line(10.5), line(11.0)]))
    assert cut(log, 10.6).splitlines() == [head, line(11.0)]


def test_a_folder_that_holds_something_is_not_written_to_and_one_without_runs_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no kept runs"):
        Folder.read(tmp_path)
    (tmp_path / "notes").touch()
    with pytest.raises(BenchError, match="not empty"):
        Folder.begin(tmp_path, ABOUT)


def test_kept_runs_come_back_by_load_and_calibrations_by_level(tmp_path: Path) -> None:
    folder = Folder.begin(tmp_path / "kept", ABOUT)
    runs = [Run(told={}, seed=seed, load=load, rps=1.0) for load, seed in ((0.6, 1), (0.6, 0), (0.3, 0))]
    levels = [Run(told={}, seed=level, level=level, again=again) for again in (True, False) for level in (16, 4)]
    for run in (*runs, *levels):
        folder.keep(run, tmp_path, 0.0)
    again = Folder.read(tmp_path / "kept")
    assert again.about == ABOUT
    assert again.runs() == [runs[2], runs[1], runs[0]]
    assert again.levels() == [levels[3], levels[2]]
    assert again.levels(again=True) == [levels[1], levels[0]]


# ------------------------------------------------------------------------------------------------ the prediction


def test_a_service_that_does_what_is_simulated_and_a_constant_is_predicted_without_error(tmp_path: Path) -> None:
    found = predicted(tmp_path, REAL)
    assert set(found["error"]) == {f"p{q}_{what}" for q in (50, 90, 99) for what in ("ttft_s", "tpot_s")}
    assert max(abs(error) for error in found["error"].values()) < 1e-6
    assert found["stalled_s"] == 0.0
    assert found["load_simulated"] == pytest.approx(found["load_real"], rel=1e-6)
    for one in found["classes"]:
        assert (one["simulated_steps"], one["error"]) == (one["steps"], pytest.approx(0.0, abs=1e-6))


def test_a_machine_that_was_slower_than_in_calibration_shows_in_every_class_and_not_with_its_own_steps(
    tmp_path: Path,
) -> None:
    fields = {name: 1.1 * value for name, value in msgspec.structs.asdict(STEP).items()}
    found = predicted(tmp_path, msgspec.structs.replace(REAL, step=Linear(**fields)))
    assert found["error"]["p90_ttft_s"] < -0.08
    assert max(abs(error) for error in found["error_with_own_steps"].values()) < 1e-3
    for one in found["classes"]:
        if one["steps"]:
            assert one["error"] == pytest.approx(1 / 1.1 - 1, abs=1e-6)
            assert one["fitted_error"] in (None, pytest.approx(0.0, abs=1e-6))


def test_a_machine_that_has_become_slower_shows_in_the_calibration_after_the_runs(tmp_path: Path) -> None:
    folder = experiment(tmp_path, REAL)
    slower = Linear(**{name: 1.25 * value for name, value in msgspec.structs.asdict(STEP).items()})
    later = msgspec.structs.replace(REAL, step=slower)
    kept(folder, tmp_path / "log", chat(150, 8.0, 2), later, seed=2, level=8, again=True)
    found = told(calibrated(folder, "linear"), folder)
    assert found["levels"] == pytest.approx({"1": 0.0, "8": 0.0}, abs=1e-6)
    assert found["levels_again"] == pytest.approx({"8": 1 / 1.25 - 1})
    assert found["overhead_s"] == pytest.approx(OVERHEAD_S)


def test_a_run_is_predicted_by_the_steps_of_the_others_and_never_by_its_own(tmp_path: Path) -> None:
    slower = Linear(**{name: 1.25 * value for name, value in msgspec.structs.asdict(STEP).items()})
    later = msgspec.structs.replace(REAL, step=slower)
    folder = experiment(tmp_path, REAL)
    kept(folder, tmp_path / "log", chat(400, 5.0, 4), later, seed=1, load=0.85, rps=6.0)
    first, second = (compared(folder, run, calibrated(folder, "linear"), "linear") for run in folder.runs())
    assert (first["predicted_by"], second["predicted_by"]) == ("other runs", "other runs")
    assert first["error"]["p50_tpot_s"] > 0.2
    assert second["error"]["p50_tpot_s"] < -0.15
    assert first["error_by_calibration"]["p50_tpot_s"] == pytest.approx(0.0, abs=1e-6)
    assert predicted(tmp_path / "alone", REAL)["predicted_by"] == "calibration"


def test_another_schedule_shows_in_the_steps_that_were_run_and_with_its_own_steps_too(tmp_path: Path) -> None:
    found = predicted(tmp_path, msgspec.structs.replace(REAL, chunk_tokens=32))
    classes = by_class(found)
    assert abs(classes["any"]["error"]) < 1e-6
    assert classes["both"]["steps"] > 2 * classes["both"]["simulated_steps"]
    assert abs(found["error_with_own_steps"]["p50_ttft_s"]) > 0.05


def test_steps_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    classes = by_class(predicted(tmp_path, REAL))
    for kind in ("prompts", "decoding", "both"):
        parts = [one for name, one in classes.items() if name.startswith((f"{kind},", f"{kind} "))]
        assert sum(one["steps"] for one in parts) == classes[kind]["steps"] > 0
    assert sum(classes[kind]["steps"] for kind in ("prompts", "decoding", "both")) == classes["any"]["steps"]
    assert classes["prompts that go on"]["steps"] > 0
    assert "decoding, 1" in classes


def test_kept_runs_are_judged_again_without_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = experiment(tmp_path, REAL)
    found = truth.evaluated(folder, None)
    assert found["met"]
    assert [(one["load"], len(one["runs"])) for one in found["loads"]] == [(0.85, 1)]
    assert truth.rows(found["loads"])[0][:2] == ["0.85", "p50_ttft_s"]
    assert set(found["fit"]["levels"]) == {"1", "8"}
    assert "load-0.85-0: 400 requests" in capsys.readouterr().out


def test_a_load_is_judged_by_the_median_run_and_the_worst_is_told() -> None:
    names = [f"p{q}_{what}" for q in (50, 90, 99) for what in ("ttft_s", "tpot_s")]
    runs = [{"error": dict.fromkeys(names, error)} for error in (0.02, -0.3, 0.11)]
    found = judged(runs)
    assert found["p50_ttft_s"] == {"median_error": 0.02, "worst_error": -0.3, "goal": 0.1, "met": True}
    late = judged([{"error": dict.fromkeys(names, 0.15)}])
    assert [late[name]["met"] for name in names] == [False, False, False, False, True, True]


def test_a_witness_tells_the_same_times_as_the_step_that_it_watches() -> None:
    witness = Witness(STEP)
    assert witness.step_s(3, 900, 20, 5000.0) == STEP.step_s(3, 900, 20, 5000.0)
    assert witness.steps() == learn.Steps(*np.array([[3, 900, 20, 5000.0, STEP.step_s(3, 900, 20, 5000.0)]]).T)
