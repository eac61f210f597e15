"""A child for supervisor tests: reads its spec, holds the lifeline, does what the spec's `play` says."""

import asyncio
import signal
import sys
from pathlib import Path

from neaptide import lifeline


async def live(spec: dict) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    if spec.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, ended.set)
    Path(spec["alive"]).touch()
    await ended.wait()


def main() -> None:
    spec = lifeline.read_spec(dict)
    lifeline.hold()
    if spec.get("die"):
        sys.exit(3)
    asyncio.run(live(spec))


if __name__ == "__main__":
    main()
