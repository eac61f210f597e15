"""What memory there is, and whether the models of one replica fit into it beside each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from neaptide.clock import mono_s
from neaptide.errors import ModelError
from neaptide.specs import ReplicaSpec


def check(spec: ReplicaSpec) -> dict[str, float]:
    """Before any of them is loaded: ModelError E213 where what the members need exceeds the memory there is. A single
    model takes its share of what is there, and echo needs none. The seconds it took, the library's import included, as
    a stage of the start."""
    if not spec.members or spec.engine != "openvino":
        return {}
    if importlib.util.find_spec("openvino_genai") is None:
        return {}  # that it is missing is said where it is loaded
    started_s = mono_s()
    from neaptide.engine import openvino_pipeline as pipeline

    needs = {one.model: pipeline.memory_bytes(pipeline.plan(one)) for one in spec.each()}
    fit(spec.model, needs, available_bytes())
    return {"memory_s": mono_s() - started_s}


def fit(pool: str, needs: Mapping[str, int], available_bytes: int) -> None:
    """ModelError where `needs` (bytes by model) add up to more than `available_bytes`."""
    total = sum(needs.values())
    if total <= available_bytes:
        return
    largest = max(needs, key=lambda model: needs[model])
    each = ", ".join(f"{model} {_mib(need)}" for model, need in needs.items())
    raise ModelError(
        f"the models of pool {pool!r} need {_mib(total)}, and {_mib(available_bytes)} are free",
        why=f"weights, KV and working memory: {each}",
        fix=f"take {largest} out of pools.{pool}.models, or give models.{largest}.options.kv_mib a smaller value",
        code="E213",
    )


def available_bytes() -> int:
    """Memory that can still be taken: the machine's, or what the container's limit leaves."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
