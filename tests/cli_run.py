"""Runs the command line as a process of its own, in an environment without the tester's language and state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DROPPED = (
    "NEAPTIDE_STATE",
    "NEAPTIDE_LANG",
    "NEAPTIDE_ADMIN_URL",
    "NEAPTIDE_ADMIN_TOKEN",
    "OPENAI_API_KEY",
    "NO_COLOR",
    "LANG",
    "LC_MESSAGES",
)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in DROPPED}
    return {**kept, "LC_ALL": "C.UTF-8", **more}


def cli(*args: str, cwd: Path | None = None, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """`neaptide args...`; `given` is its stdin."""
    command = [sys.executable, "-m", "neaptide.cli", *args]
    return subprocess.run(
        command, input=given, capture_output=True, text=True, encoding="utf-8", timeout=60, cwd=cwd,
        env=environment(**env),
    )  # fmt: skip
