"""What each step of an engine computed and how long it took, a JSON line a step: a simulator learns step times from it.

    {"event": "engine", "engine", "model", "max_running", "chunk_tokens", "kv_tokens", ...}    at the head of each file
    {"event": "step", "batch", "context", "prefill", "pairs", "step_s", "turn_s"}

batch    requests that got a token after their first
context  tokens that these hold together, the one being computed included
prefill  prompt tokens computed beside them
pairs    pairs of tokens that those attend: each sees all before it and itself
step_s   the step alone
turn_s   and what the loop does around it; the turns of an engine that is busy leave no gap between them

The composition follows from what was asked and what came out, so it holds for every engine: a request's first token
ends its prompt; a prompt that is not done took what the step's chunk left it. What was cached is told with the first
token, so of such a prompt the chunks before its last one are told as if nothing had been. Where a replica serves
several models, a turn may hold the steps of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from neaptide.clock import Clock, RealClock
from neaptide.engine.log import Log
from neaptide.engine.options import wants_step_log
from neaptide.engine.protocol import Capacity, Description, Emission, Engine, Sampling
from neaptide.specs import ReplicaSpec

SUFFIX = ".steps.jsonl"  # beside the replica's log


def watched(engine: Engine, spec: ReplicaSpec) -> Engine:
    """`engine`, with a step log where the spec's options ask for one; on stderr where it names no log."""
    if not wants_step_log(spec):
        return engine
    head = {"event": "engine", **msgspec.to_builtins(engine.describe())}
    return Logged(engine, Log(_path(spec), head=head), RealClock())


def _path(spec: ReplicaSpec) -> str:
    """A file for each model of a replica that serves several, by its place: a model's name may hold a slash."""
    if not spec.log_path:
        return ""
    place = f".{[member.model for member in spec.members].index(spec.model)}" if spec.members else ""
    return str(Path(spec.log_path).with_suffix(f"{place}{SUFFIX}"))


class _Step(NamedTuple):
    batch: int
    context: int
    prefill: int
    pairs: float


class _Asked:
    """A request in the engine. `left`: prompt tokens that are still to be computed; 0 once it decodes."""

    __slots__ = ("left", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = self.left = tokens


class Logged:
    """Implements Engine: another one, with a line a step. The loop asks `busy` between two steps; there a turn ends."""

    def __init__(self, engine: Engine, log: Log, clock: Clock) -> None:
        self._engine, self._log, self._clock = engine, log, clock
        self._chunk = engine.describe().chunk_tokens
        self._asked: dict[int, _Asked] = {}  # in the order in which they came
        self._turn_s: float | None = None  # when the turn began; None while idle
        self._open: tuple[_Step, float, float] | None = None  # a step whose turn goes on, when it began, step_s

    def describe(self) -> Description:
        return self._engine.describe()

    def free(self) -> Capacity:
        return self._engine.free()

    def add(
        self, id: int, prompt_ids: Sequence[int], generated_ids: Sequence[int], emitted_chars: int, sampling: Sampling
    ) -> None:
        self._engine.add(id, prompt_ids, generated_ids, emitted_chars, sampling)
        self._asked[id] = _Asked(len(prompt_ids) + len(generated_ids))

    def step(self) -> list[Emission]:
        began_s = self._clock.mono_s()
        emissions = self._engine.step()
        step_s = self._clock.mono_s() - began_s
        step = self._settle(emissions)
        if step.batch or step.prefill:
            self._open = step, began_s if self._turn_s is None else self._turn_s, step_s
        self._turn_s = None
        return emissions

    def busy(self) -> bool:
        busy, now_s = self._engine.busy(), self._clock.mono_s()
        if not busy:
            self._turn_s = None
        elif self._turn_s is None:
            self._turn_s = now_s
        if self._open is not None:
            step, began_s, step_s = self._open
            self._open = None
            turn_s = round(now_s - began_s, 7)
            self._log.info("step", **step._asdict(), step_s=round(step_s, 7), turn_s=turn_s)
        return busy

    def abort(self, id: int) -> None:
        self._engine.abort(id)

    def close(self) -> None:
        self._engine.close()

    def _settle(self, emissions: list[Emission]) -> _Step:
        """What the step was made of, by what came out of it; then everybody's state after it."""
        computed = []
        for emission in emissions:
            asked = self._asked.get(emission.id)
            if asked is not None and (emission.token_ids or emission.finish == "stop"):  # a stop may show no token
                computed.append((emission, asked))
            elif emission.finish:  # aborted or refused
                self._asked.pop(emission.id, None)
        decoding = [asked.tokens for _, asked in computed if not asked.left]
        first = {e.id: e.cached_tokens for e, asked in computed if asked.left}
        prefill, pairs = self._prefill(first, len(decoding))
        for emission, asked in computed:
            asked.tokens += len(emission.token_ids)
            if emission.finish:
                del self._asked[emission.id]
        return _Step(len(decoding), sum(decoding), prefill, pairs)

    def _prefill(self, first: dict[int, int], batch: int) -> tuple[int, float]:
        """Prompt tokens of this step and the pairs that they attend, first come first served. `first`: cached tokens of
        the requests whose prompt is done."""
        room = self._chunk - batch if self._chunk else 0  # without chunks a prompt is computed whole, in its last step
        prefill, pairs = 0, 0.0
        for id, asked in self._asked.items():
            if not asked.left:
                continue
            done = id in first
            took = max(asked.left - first[id], 1) if done else max(0, min(asked.left - 1, room))
            before = asked.tokens - (took if done else asked.left)
            asked.left = 0 if done else asked.left - took
            room, prefill, pairs = room - took, prefill + took, pairs + took * (before + (took + 1) / 2)
        return prefill, pairs
