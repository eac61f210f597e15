"""A replica's I/O process: `python -m neaptide.engine.replica`, its ReplicaSpec on stdin.

The engine process is started first of all: it loads for seconds, and what this process imports (0.2 s: HTTP, templates,
tokenizer) comes meanwhile. life.py is the rest.

With an engine's name behind it, it is a spare: both processes import what any replica of that engine needs, and wait
for the spec that says which one to be.
"""

from __future__ import annotations

import sys

from neaptide import lifeline
from neaptide.clock import mono_s
from neaptide.engine.child import Started, begin, start, tell
from neaptide.engine.readahead import read_ahead
from neaptide.errors import NeaptideError
from neaptide.link import STALL_S
from neaptide.specs import ReplicaSpec
from neaptide.types import SPARE


def run(
    spec: ReplicaSpec, stall_s: float = STALL_S, waiting: Started | None = None, waited_s: float | None = None
) -> int:
    """Serve until told to end; the process's exit code. Must be called in the main thread. `waiting`: a spare's engine
    process, which has waited for `waited_s`."""
    began_s = mono_s()
    read_ahead([one.source for one in spec.each()])
    try:
        started = waiting or start(spec)
        if waiting is not None:
            tell(waiting, spec)
        stages = {"spawn_s": mono_s() - began_s} | ({} if waited_s is None else {SPARE: waited_s})
        from neaptide.engine.life import live

        stages["io_import_s"] = mono_s() - began_s - stages["spawn_s"]
        return live(spec, started, stages, began_s, stall_s)
    except NeaptideError as e:
        print(e, file=sys.stderr)
        return e.exit_code


def wait(engine: str) -> int:
    """Be ready to be any replica of `engine`, then the one whose spec comes; the process's exit code."""
    began_s = mono_s()
    waiting = begin(engine)
    import neaptide.engine.life  # noqa: F401  (what any replica needs, ahead of time)

    spec = lifeline.read_spec(ReplicaSpec)
    lifeline.log_to(spec.log_path)
    return run(spec, waiting=waiting, waited_s=mono_s() - began_s)


def main() -> None:
    lifeline.hold()
    if sys.argv[1:]:
        sys.exit(wait(sys.argv[1]))
    sys.exit(run(lifeline.read_spec(ReplicaSpec)))


if __name__ == "__main__":
    main()
