"""How busy each model's GPUs are: every exporter is asked now and then, beside the loop, which reads the last word."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from neaptide.clock import Clock, RealClock
from neaptide.config import GpuSource, ModelSettings
from neaptide.errors import UnreachableError
from neaptide.observe.gpus import read

log = logging.getLogger("neaptide.control")

EVERY_S = 5.0
STALE_S = 15.0  # three words missed
Read = Callable[[GpuSource], Awaitable[tuple[float, ...]]]
Key = tuple[str, int]  # a model, and which of its sources


class Word(NamedTuple):
    at_s: float
    shares: tuple[float, ...]  # 0 to 1, one a GPU


class GpuWatch:
    """What exporters told last. `ask` reads one source and raises UnreachableError."""

    def __init__(self, ask: Read = read, clock: Clock | None = None) -> None:
        self._ask, self._clock = ask, clock or RealClock()
        self._sources: dict[Key, GpuSource] = {}
        self._words: dict[Key, Word] = {}
        self._silent: set[Key] = set()  # those that were said not to tell

    def configure(self, models: Mapping[str, ModelSettings]) -> None:
        """What is told of a source that changed is forgotten; the new one is asked in the next round."""
        before = self._sources
        self._sources = {(name, i): source for name, m in models.items() for i, source in enumerate(m.gpus)}
        kept = {key for key, source in self._sources.items() if before.get(key) == source}
        self._words = {key: word for key, word in self._words.items() if key in kept}
        self._silent &= kept

    def usage(self, models: Sequence[str]) -> float:
        """Mean over the GPUs of these models, 0 to 1; NaN where nobody told lately."""
        oldest_s = self._clock.mono_s() - STALE_S
        words = [w for (model, _), w in self._words.items() if model in models and w.at_s >= oldest_s]
        told = [share for word in words for share in word.shares]
        return fmean(told) if told else math.nan

    async def run(self) -> None:
        """A round every EVERY_S, until cancelled."""
        while True:
            began_s = self._clock.mono_s()
            await self.look()
            await asyncio.sleep(max(0.0, began_s + EVERY_S - self._clock.mono_s()))

    async def look(self) -> None:
        """Ask every source once, all at a time: one that hangs takes no other's turn."""
        await asyncio.gather(*(self._hear(key, source) for key, source in self._sources.items()))

    async def _hear(self, key: Key, source: GpuSource) -> None:
        try:
            shares = await self._ask(source)
        except UnreachableError as e:
            if self._sources.get(key) is source and key not in self._silent:
                self._silent.add(key)
                log.warning("%s: %s; %s", key[0], e.what, e.fix)
            return
        if self._sources.get(key) is not source:
            return  # another configuration came meanwhile
        self._words[key] = Word(self._clock.mono_s(), shares)
        if key in self._silent:
            self._silent.remove(key)
            log.warning("%s: %s tells how busy its GPUs are again", key[0], source.url)
