"""`neaptide simulate --setup`: policies on an engine as it was measured."""

from __future__ import annotations

import math

import msgspec

from neaptide.cli.draw import span, table
from neaptide.cli.session import Session
from neaptide.cli.words import say
from neaptide.simulate.cold import Stage
from neaptide.simulate.measured import Measured, Run, outcome
from neaptide.simulate.settings import Setup
from neaptide.types import Standby


def changed(setup: Setup, cold_start_s: float | None, standby: Standby | None) -> Setup:
    """--cold-start-s and --standby stand above the setup's own."""
    if cold_start_s is not None:
        setup = msgspec.structs.replace(setup, boot=(Stage(name="start", seconds=cold_start_s),))
    return setup if standby is None else msgspec.structs.replace(setup, standby=standby)


def show(session: Session, found: Measured) -> None:
    if session.as_json:
        session.data(outcome(found))
        return
    columns = ["policy", "target", "attainment", "hours", "events", "p50", "p99", "p50_tpot", "p99_tpot", "unserved"]
    rows = [_row(run) for run in found.runs]
    if found.setup.standby.max:
        columns.append("standby")
        rows = [[*row, f"{run.served.standby_hours:,.1f}"] for row, run in zip(rows, found.runs, strict=True)]
    table(_title(found), [say(f"simulate.col.{name}") for name in columns], rows)


def _row(run: Run) -> list[str]:
    served = run.served
    return [
        run.name,
        "-" if run.target is None else f"{run.target:g}",
        f"{100 * served.attainment:.2f} %",
        f"{served.replica_hours:,.1f}",
        f"{served.scale_events:,d}",
        *(_span(served.quantile("ttft_s", q)) for q in (0.5, 0.99)),
        *(_span(served.quantile("tpot_s", q)) for q in (0.5, 0.99)),
        f"{served.unserved:,d}",
    ]


def _span(seconds: float) -> str:
    return span(None if math.isnan(seconds) else seconds)


def _title(found: Measured) -> str:
    question, setup = found.question, found.setup
    return say(
        "simulate.setup_title", first=question.first_day, last=question.last_day, seed=question.seed,
        tier=question.tier, capacity=f"{found.capacity_rps:.3g}", cold=f"{setup.cold_start_s:g}",
        slo=f"{setup.slo_ttft_s:g}",
    )  # fmt: skip
