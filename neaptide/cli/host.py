"""What this machine offers, in one line; each part is looked up, none assumed."""

from __future__ import annotations

import os
from pathlib import Path


def summary() -> str:
    """ "no GPU found → CPU · 2 cores · 21.4 GiB free · AVX-512"."""
    parts = [accelerator(), f"{len(os.sched_getaffinity(0))} cores", f"{free_gib():.1f} GiB free"]
    return " · ".join([*parts, *vector_unit()])


def accelerator() -> str:
    found = [name for name, path in DEVICES.items() if Path(path).exists()]
    return f"{', '.join(found)} found (the built-in engine uses the CPU)" if found else "no GPU found → CPU"


DEVICES = {
    "NVIDIA GPU": "/dev/nvidia0",
    "AMD GPU": "/dev/kfd",
    "Ascend NPU": "/dev/davinci0",
    "NPU": "/dev/accel/accel0",
}


def free_gib() -> float:
    """MemAvailable; 0 where /proc does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / (1 << 20)
    except OSError:
        return 0.0
    return 0.0


def vector_unit() -> list[str]:
    """The widest of the instruction sets that int8 inference gains by."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("flags")[2]
    except OSError:
        return []
    words = set(flags.partition("\n")[0].split())
    for flag, name in (("amx_int8", "AMX"), ("avx512_vnni", "AVX-512 VNNI"), ("avx512f", "AVX-512"), ("avx2", "AVX2")):
        if flag in words:
            return [name]
    return []
