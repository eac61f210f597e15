"""How much of the host's processor is ours to use."""

from __future__ import annotations

import os
from pathlib import Path


def usable() -> float:
    """Cores that we may run on, or what a cgroup allows where that is less."""
    cores, allowed = len(os.sched_getaffinity(0)), quota()
    return cores if allowed is None else min(cores, allowed)


def quota() -> float | None:
    """Cores that cgroup v2 allows; None where it does not limit or tell."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)
