"""How many prompt tokens one step may prefill so that the requests being decoded beside it keep their pace.

A step that prefills a chunk delays every running answer by the chunk's time; it may last twice the TPOT goal. The rate
is measured once for a model, a machine and a setting, and kept in the replica's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import msgspec

FILE = "calibration.json"
KEPT = 64  # entries; the oldest goes first
FLOOR_TOKENS, CEILING_TOKENS, BLOCK_TOKENS = 32, 2048, 32
STEP_TPOTS = 2.0
TOLERANCE = 1.5  # a chunk off by less than this factor is not worth a second load
FLOPS_A_THREAD = 200e9  # int8 prefill of one server core; measured 215-260 GFLOP/s; only a first guess


class Calibration(msgspec.Struct, frozen=True):
    prefill_tokens_per_s: float


def chunk_tokens(prefill_tokens_per_s: float, tpot_s: float) -> int:
    """Whole blocks that a step of 2 x `tpot_s` can prefill, between the floor and the ceiling."""
    tokens = int(prefill_tokens_per_s * STEP_TPOTS * tpot_s)
    return max(FLOOR_TOKENS, min(CEILING_TOKENS, tokens // BLOCK_TOKENS * BLOCK_TOKENS))


def guessed_rate(weights_bytes: int, threads: int) -> float:
    """Prefill tokens/s before any measurement: two operations a weight, a byte a weight."""
    return FLOPS_A_THREAD * threads / (2 * max(weights_bytes, 1))


def is_close(chunk: int, other: int) -> bool:
    return max(chunk, other) <= TOLERANCE * min(chunk, other)


def key(*, model: str, threads: int, precision: str, library: str) -> str:
    """What a rate hangs on; `model` is its directory's digest."""
    facts = [model, threads, precision, library, _processor()]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:24]


def recall(cache_dir: str, key: str) -> Calibration | None:
    """A broken file is told on stderr and measured anew."""
    return _read(cache_dir).get(key) if cache_dir else None


def keep(cache_dir: str, key: str, calibration: Calibration) -> None:
    """Atomic; an unwritable directory costs the next start a measurement, not this one its life."""
    if not cache_dir:
        return
    entries = {k: v for k, v in _read(cache_dir).items() if k != key} | {key: calibration}
    kept = dict(list(entries.items())[-KEPT:])
    path = Path(cache_dir) / FILE
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(msgspec.json.encode(kept))
        fresh.replace(path)
    except OSError as error:
        print(f"calibration not kept: {error}", file=sys.stderr)


def _read(cache_dir: str) -> dict[str, Calibration]:
    path = Path(cache_dir) / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Calibration])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"{path} is unreadable, calibrating anew: {error}", file=sys.stderr)
        return {}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        return platform.processor()
    return platform.machine()
