"""A new replica is given the hottest prefixes of a sibling (docs/decisions/0029).

Whom to ask is a pure choice; asking and giving are one task a launch, beside the loop, and nothing waits for it. What
passes is prompts: it stays in memory, and is logged nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neaptide.clock import mono_s
from neaptide.fleet.probe import ask
from neaptide.types import Launch, Replica

GIVERS = ("ready", "standby", "draining")
KNOCK_S = 0.05  # a replica listens some 0.3 s after its process began
GIVE_UP_S = 30.0


def sibling(revision: str, replicas: Sequence[Replica]) -> Replica | None:
    """The oldest ready replica of the same revision: it has seen most, and has the same tokens. Without one, one that
    stands by or drains: it remembers."""
    known = [r for r in replicas if r.revision == revision and r.state in GIVERS]
    return min(known, key=lambda r: (GIVERS.index(r.state), r.started_s, r.id), default=None)


class Priming:
    """`http_path` is where a replica of that id serves HTTP, `token` what it wants to hear."""

    def __init__(self, http_path: Callable[[str], Path], token: str) -> None:
        self._http_path, self._token = http_path, token
        self._tasks: set[asyncio.Task[None]] = set()

    def launched(self, launches: Sequence[Launch], revisions: Mapping[str, str], replicas: Sequence[Replica]) -> None:
        """These are on their way; `revisions` by deployment."""
        for launch in launches:
            giver = sibling(revisions.get(launch.deployment, ""), replicas)
            if giver is not None and giver.id != launch.replica:
                task = asyncio.get_running_loop().create_task(self._pass_on(giver.id, launch.replica))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, giver: str, taker: str) -> None:
        status, prefixes = await ask(self._http_path(giver), "GET", "/prefixes", token=self._token)
        path, until_s = self._http_path(taker), mono_s() + GIVE_UP_S
        while status == 200 and mono_s() < until_s:
            heard, _ = await ask(path, "POST", "/prefixes", token=self._token, body=prefixes)
            if heard:
                return
            await asyncio.sleep(KNOCK_S)
