"""What bench.truth keeps of each time that it sent requests, so that a changed simulator meets the same runs again.

DIR/about.json                        what was asked for
DIR/level-8/told.json                 calibration: 8 requests in flight a replica, and what the client saw
DIR/level-8-again/told.json           the same after the runs: was the machine still as fast?
DIR/load-0.85-0/told.json             a run that is predicted: its load and seed, and what the client saw
DIR/load-0.85-0/guide-0.steps.jsonl   the steps of that time, a replica's; `neaptide fit` reads it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.kit import BenchError

STEPS = "*.steps.jsonl"
EXPIRED = "wait_expired"  # in the error of a request that the gateway let wait in vain


class About(msgspec.Struct, frozen=True, kw_only=True):
    minutes: float  # of each run
    replicas: int
    in_tokens: float  # means of the whole trace
    out_tokens: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """`told`: of bench.openloop, and the CPU seconds of each role. `level` is a calibration's, the others a run's."""

    told: dict[str, Any]
    seed: int
    level: int | None = None
    again: bool = False  # a calibration after the runs, which the fit does not see
    load: float | None = None
    rps: float | None = None

    @property
    def name(self) -> str:
        if self.level is None:
            return f"load-{self.load:g}-{self.seed}"
        return f"level-{self.level}{'-again' if self.again else ''}"


class Sent(NamedTuple):
    """What the client saw of the requests that were answered, arrays [requests] in the order of sending."""

    t_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]  # NaN of a single token
    in_tokens: NDArray[np.int64]
    out_tokens: NDArray[np.int64]
    told: dict[str, Any]  # errors, lag, CPU seconds


def answered(told: dict[str, Any]) -> Sent:
    """BenchError where more than one in a hundred requests failed: what is left would be another experiment. Who waited
    in the gateway for as long as it lets anybody never reached a replica: counted, and left out on both sides."""
    rows = told["rows"]
    good = sorted((row for row in rows if not row[6]), key=lambda row: row[1])
    expired = sum(EXPIRED in row[6] for row in rows)
    failed = len(rows) - len(good) - expired
    if failed > len(rows) / 100 or not good:
        raise BenchError(f"{failed} of {len(rows)} requests failed: {[r[6] for r in rows if r[6]][:1]}")
    _, sent_s, first_s, end_s, prompt, out, _ = (np.array(column) for column in zip(*good))
    sent_s, first_s, end_s = (column.astype(np.float64) for column in (sent_s, first_s, end_s))
    tpot_s = np.where(out > 1, (end_s - first_s) / np.maximum(out - 1, 1), np.nan)
    counts = {"requests": len(rows), "failed": failed, "expired": expired}
    rest = {name: value for name, value in told.items() if name != "rows"} | counts
    return Sent(sent_s, first_s - sent_s, tpot_s, prompt.astype(np.int64), out.astype(np.int64), rest)


class Folder:
    """The kept runs. Written once: BenchError where a new one is to be begun in a folder that holds something."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.about = path, about

    @classmethod
    def begin(cls, path: Path, about: About) -> Folder:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise BenchError(f"{path} is not empty: pass a folder that is, or a new one")
        (path / "about.json").write_bytes(msgspec.json.encode(about))
        return cls(path, about)

    @classmethod
    def read(cls, path: Path) -> Folder:
        try:
            return cls(path, msgspec.json.decode((path / "about.json").read_bytes(), type=About))
        except (OSError, ValueError) as e:
            raise BenchError(f"{path} holds no kept runs: {e}") from None

    def keep(self, run: Run, logs: Path, since_s: float) -> None:
        """`logs`: where the replicas write theirs; what they wrote from this wall time on is the run's."""
        here = self.path / run.name
        here.mkdir()
        for log in sorted(logs.glob(STEPS)):
            (here / log.name).write_bytes(cut(log, since_s))
        (here / "told.json").write_bytes(msgspec.json.encode(run))

    def levels(self, *, again: bool = False) -> list[Run]:
        """Calibrations, the least in flight first."""
        found = (run for run in self._all() if run.level is not None and run.again == again)
        return sorted(found, key=lambda run: run.level or 0)

    def runs(self) -> list[Run]:
        return sorted((run for run in self._all() if run.load is not None), key=lambda run: (run.load or 0.0, run.seed))

    def logs(self, *runs: Run) -> list[Path]:
        return [log for run in runs for log in sorted((self.path / run.name).glob(STEPS))]

    def _all(self) -> list[Run]:
        return [msgspec.json.decode(file.read_bytes(), type=Run) for file in self.path.glob("*/told.json")]


class _Line(msgspec.Struct):
    t: float = 0.0  # wall time, seconds; a head has none


def cut(log: Path, since_s: float) -> bytes:
    """A step log's head and its lines from this wall time on, those of its rotated predecessor first."""
    parts = [part for part in (Path(f"{log}.1"), log) if part.exists()]
    head, *lines = [line for part in parts for line in part.read_bytes().splitlines()]
    return b"\n".join([head, *(line for line in lines if _written_s(line) >= since_s)]) + b"\n"


def _written_s(line: bytes) -> float:
    try:
        return msgspec.json.decode(line, type=_Line).t
    except ValueError:  # cut short by a full disk
        return 0.0
