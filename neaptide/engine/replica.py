"""A replica's I/O process: `python -m neaptide.engine.replica`, its ReplicaSpec on stdin.

The engine process is started first of all: it loads for seconds, and what this process imports (0.2 s: HTTP, templates,
tokenizer) comes meanwhile. life.py is the rest.
"""

from __future__ import annotations

import sys

from neaptide import lifeline
from neaptide.clock import mono_s
from neaptide.engine.child import start
from neaptide.errors import NeaptideError
from neaptide.link import STALL_S
from neaptide.specs import ReplicaSpec


def run(spec: ReplicaSpec, stall_s: float = STALL_S) -> int:
    """Serve until told to end; the process's exit code. Must be called in the main thread."""
    began_s = mono_s()
    try:
        started = start(spec)
        stages = {"spawn_s": mono_s() - began_s}
        from neaptide.engine.life import live

        stages["io_import_s"] = mono_s() - began_s - stages["spawn_s"]
        return live(spec, started, stages, began_s, stall_s)
    except NeaptideError as e:
        print(e, file=sys.stderr)
        return e.exit_code


def main() -> None:
    spec = lifeline.read_spec(ReplicaSpec)
    lifeline.hold()
    sys.exit(run(spec))


if __name__ == "__main__":
    main()
