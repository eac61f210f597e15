"""The models of one replica as one to its front ends: link and HTTP see a Pool, whether it serves one model or four.

Each model has a Service of its own, with its own KV memory, slots and line; bodies held, tallies and front ends are the
process's. The engine process behind them is one, so they become ready together, drain together and die together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from neaptide.engine import pipe, refusals
from neaptide.engine.answer import Sink
from neaptide.engine.protocol import Description
from neaptide.engine.report import Meters, joined
from neaptide.engine.requests import Job
from neaptide.engine.service import Service, Shared
from neaptide.link import LoadReport, OpenHeader
from neaptide.specs import ReplicaSpec
from neaptide.types import Steps


class _Named(msgspec.Struct):
    model: str | None = None


_named = msgspec.json.Decoder(_Named).decode


class Pool:
    """`services` in the order of the spec's members; `shared` is what they were made with."""

    def __init__(self, spec: ReplicaSpec, services: Sequence[Service], shared: Shared) -> None:
        self.spec, self.services = spec, tuple(services)
        self.held, self.tally, self.flushers = shared.held, shared.tally, shared.flushers
        self._first = self.services[0]
        self._by_model = {service.spec.model: service for service in self.services}
        self._rounds = Rounds(len(self.services))

    # ------------------------------------------------------------------------------------------------ requests

    def open(self, opened: OpenHeader, body: bytes, sink: Sink, from_body: bool = False) -> Job:
        """As Service.open, at the model that the header names, or the body where `from_body`."""
        if len(self.services) == 1:
            return self._first.open(opened, body, sink, from_body)
        if from_body:
            opened.model = _model_of(body)
        service = self._by_model.get(opened.model)
        if service is None:
            error = refusals.unknown_model(opened.model) if opened.model else refusals.no_model(self._by_model)
            return self._first.refuse(opened, body, sink, error)
        return service.open(opened, body, sink, from_body)

    def abort(self, job: Job) -> None:
        self._of(job).abort(job)

    def credit_came(self, job: Job) -> None:
        self._of(job).credit_came(job)

    def _of(self, job: Job) -> Service:
        return self._by_model.get(job.opened.model, self._first)

    # ------------------------------------------------------------------------------------------------ life

    @property
    def state(self) -> str:
        return self._first.state

    def stepped(self, index: int, message: pipe.Stepped) -> None:
        self.services[index].stepped(message)
        self._rounds.step(index, message)

    def changed(self) -> None:
        self._first.changed()  # the front ends are the same

    def drain(self) -> None:
        for service in self.services:
            service.drain()

    def engine_gone(self, why: str) -> None:
        for service in self.services:
            service.engine_gone(why)

    def cut(self) -> None:
        for service in self.services:
            service.cut()

    def busy(self) -> bool:
        return any(service.busy() for service in self.services)

    async def idle(self) -> None:
        """Until no request is open: none is taken any more while somebody waits for this."""
        for service in self.services:
            await service.idle()

    def stop(self) -> None:
        for service in self.services:
            service.stop()

    # ------------------------------------------------------------------------------------------------ prefixes

    def prefixes(self) -> dict[str, list[list[int]]]:
        """What a new replica of the same models is primed with."""
        return {model: service.hottest() for model, service in self._by_model.items()}

    def prime(self, prefixes: Mapping[str, Sequence[Sequence[int]]]) -> None:
        for model, service in self._by_model.items():
            service.prime(prefixes.get(model, ()))

    async def primed(self, most_s: float) -> None:
        """Until all that was offered is computed, at most `most_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                for service in self.services:
                    await service.primer.done()

    def primed_tokens(self) -> int:
        return sum(service.primer.tokens for service in self.services)

    # ------------------------------------------------------------------------------------------------ what is told

    def stuck_s(self, now: float) -> float:
        """For how long the engine has said nothing to a model that has work: each busy one has its turn."""
        return max(service.stuck_s(now) for service in self.services)

    def load(self) -> LoadReport:
        """Of all its models together: requests and room added up, the fullest KV memory, the time of a round."""
        if len(self.services) == 1:
            return self._first.load()
        loads = {model: service.load() for model, service in self._by_model.items()}
        return LoadReport(
            running=sum(x.running for x in loads.values()),
            waiting=sum(x.waiting for x in loads.values()),
            slots=sum(x.slots for x in loads.values()),
            ahead=max(x.ahead for x in loads.values()),  # of each one's room
            free_kv_tokens=sum(x.free_kv_tokens for x in loads.values()),
            kv_usage=max(x.kv_usage for x in loads.values()),
            step_s=round(self._rounds.meters.median_step_s(), 6),
            draining=any(x.draining for x in loads.values()),
            rooms={model: x.slots for model, x in loads.items()},
        )

    def steps(self) -> Steps:
        meters = self._first.meters if len(self.services) == 1 else self._rounds.meters
        return meters.steps_told()

    @property
    def description(self) -> Description | None:
        """Of several models: the slots and the context of the largest, the KV memory of all. None until it is ready."""
        told = [s.description for s in self.services if s.description is not None]
        if len(told) < len(self.services):
            return None
        if len(told) == 1:
            return told[0]
        return msgspec.structs.replace(
            told[0],
            model=self.spec.model,
            context_tokens=max(d.context_tokens for d in told),
            kv_tokens=sum(d.kv_tokens for d in told),
            max_running=max(d.max_running for d in told),
        )

    def descriptions(self) -> Mapping[str, Description | None]:
        return {model: service.description for model, service in self._by_model.items()}

    def contexts(self) -> dict[str, int]:
        """Tokens of context of each model, 0 before it is known."""
        return {model: d.context_tokens if d else 0 for model, d in self.descriptions().items()}

    def metrics(self) -> str:
        return joined(s.meters.text(s.spec.model, s.load(), s.description) for s in self.services)


class Rounds:
    """The steps of several models that take turns, as one engine's: a round is the last step of each that has requests.
    Its time is what lies between two tokens of any of them, its batch all that are served so."""

    def __init__(self, models: int) -> None:
        self.meters = Meters()
        self._last: list[tuple[float, int]] = [(0.0, 0)] * models  # step s, batch

    def step(self, index: int, message: pipe.Stepped) -> None:
        self._last[index] = (message.step_s, message.batch)
        self.meters.step(sum(s for s, _ in self._last), sum(batch for _, batch in self._last))
        if not message.capacity.running:
            self._last[index] = (0.0, 0)


def _model_of(body: bytes) -> str:
    """What a body asks for; "" where it names none, or is no such thing."""
    try:
        return _named(body).model or ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
