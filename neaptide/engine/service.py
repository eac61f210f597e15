"""A replica's work on requests, between its front ends (link, HTTP) and its engine process.

A request walks: open -> (thread, when long) prepare -> admission -> engine -> answer -> sink. The front ends hand in a
Sink each and flush what the sinks gathered when `flush` tells them to: once a batch of engine steps, so one write a
connection and step. Single-threaded: everything here runs in the event loop, but for `prepare`.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Callable, Sequence

from neaptide.clock import mono_s, wall_s
from neaptide.engine import pipe, refusals
from neaptide.engine.answer import Answer, Sink
from neaptide.engine.hot import Hot
from neaptide.engine.intake import LONG_BODY_BYTES, ROUTES, Held, Intake, Read
from neaptide.engine.log import Log
from neaptide.engine.prime import MOST_TOKENS, Primer
from neaptide.engine.prompt import Model, Prepared
from neaptide.engine.protocol import Description, Emission
from neaptide.engine.report import Meters
from neaptide.engine.requests import ENDED, LOOKAHEAD, PREPARING, RUNNING, WAITING, Admission, Job, Tally, Work
from neaptide.engine.text import Text
from neaptide.errors import RequestError
from neaptide.link import MAX_FRAME, STALL_S, LoadReport, OpenHeader
from neaptide.specs import ReplicaSpec
from neaptide.wire import chunks
from neaptide.wire.parse import Generation, warning_header

MAX_LAST_BYTES = MAX_FRAME - (1 << 12)  # what END can carry beside its header
TICK_S = 0.1  # deadlines in the line, stalled readers
CROSSING_S = 0.001  # a request written this long before a step began is in it

STARTING, READY, DRAINING, DEAD = "starting", "ready", "draining", "dead"


class Shared:
    """What the services of one process have in common: bytes of bodies, what became of requests, the front ends."""

    def __init__(self) -> None:
        self.held, self.tally = Held(), Tally()
        self.flushers: list[Callable[[], None]] = []
        self.services: list[Service] = []


class Service:
    """One engine's requests. `engine_send` writes to the engine; `flush` is called after each batch of changes."""

    def __init__(
        self,
        spec: ReplicaSpec,
        engine_send: Callable[[list[pipe.ToEngine]], None],
        log: Log,
        stall_s: float = STALL_S,
        shared: Shared | None = None,
    ) -> None:
        shared = shared or Shared()
        self.spec, self.state = spec, STARTING
        self.meters = Meters()
        self.held, self.tally, self.flushers = shared.held, shared.tally, shared.flushers
        self._mates = shared.services
        self._mates.append(self)
        self.description: Description | None = None
        self._emptied = asyncio.Event()
        self._send, self._log, self._stall_s = engine_send, log, stall_s
        self.primer = Primer()
        self._hot: Hot | None = None  # only where prompts' beginnings are shared by all
        self._intake: Intake | None = None
        self._admission: Admission | None = None
        self._work = Work()
        self._ids = itertools.count(1)
        self._open: dict[int, Job] = {}  # not ended for the client
        self._engine: dict[int, Job] = {}  # in the engine, whether anybody still reads or not
        self._fresh: list[Job] = []  # given to the engine, perhaps not yet part of a step
        self._commands: list[pipe.ToEngine] = []
        self._kv_usage = 0.0
        self._heard_s = mono_s()
        self._tick: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------------ life

    def warm(self, model: Model, description: Description) -> None:
        """The engine is warm: it may be primed."""
        self.description = description
        self._intake = Intake(model, description, self.spec.max_tokens_default)
        self._admission = Admission(description)
        if self._shares() and description.prefix_cache:
            self._hot = Hot(description.kv_block_tokens)
            now = mono_s()
            self.primer.warm(description, now)
            self._prime(now)

    def ready(self) -> None:
        """Take requests; call once it is warm."""
        self.state = READY

    def hottest(self) -> list[list[int]]:
        """The beginnings of prompts that recur, as token ids; none where tenants share no cache."""
        return self._hot.hottest(MOST_TOKENS) if self._hot is not None else []

    def prime(self, prefixes: Sequence[Sequence[int]]) -> None:
        """Compute these, of a sibling, when there is nothing else to do."""
        if self._shares():
            now = mono_s()
            self.primer.offer(prefixes, now)
            self._prime(now)

    def drain(self) -> None:
        """Take nothing new; hand back what has not started; what runs goes on."""
        if self.state in (STARTING, READY):
            self.state = DRAINING
        for job in list(self._open.values()):
            if job.state in (PREPARING, WAITING):
                self._fail(job, refusals.draining(), retryable=True)
        self.changed()

    def engine_gone(self, why: str) -> None:
        """Every request ends; those the engine had not been given may be tried elsewhere."""
        self.state = DEAD
        for job in list(self._open.values()):
            self._fail(job, refusals.engine_died(why), retryable=job.state != RUNNING)
        self.changed()

    def cut(self) -> None:
        """The grace is over: end what still runs."""
        for job in list(self._open.values()):
            self._fail(job, refusals.draining(), retryable=False)
        self._give(mono_s())
        self.changed()

    def busy(self) -> bool:
        return bool(self._open)

    async def idle(self) -> None:
        """Until no request is open."""
        while self._open:
            self._emptied.clear()
            await self._emptied.wait()

    def stop(self) -> None:
        if self._intake is not None:
            self._intake.stop()
        if self._tick is not None:
            self._tick.cancel()

    def stuck_s(self, now: float) -> float:
        """For how long an engine with work to do has said nothing."""
        return now - self._heard_s if self._engine else 0.0

    def load(self) -> LoadReport:
        admission, intake = self._admission, self._intake
        if admission is None or intake is None:
            return LoadReport(draining=self.state in (DRAINING, DEAD))
        slots = admission.slots(intake.preparing) if self.state == READY else 0
        return LoadReport(
            running=len(self._engine),
            waiting=len(admission.waiting) + intake.preparing,
            slots=slots,
            ahead=min(slots, LOOKAHEAD),
            free_kv_tokens=admission.free_kv_tokens,
            kv_usage=round(self._kv_usage, 4),
            step_s=round(self.meters.median_step_s(), 6),
            draining=self.state in (DRAINING, DEAD),
        )

    # ------------------------------------------------------------------------------------------------ requests

    def open(self, opened: OpenHeader, body: bytes, sink: Sink, from_body: bool = False) -> Job:
        """Begin a request whose `body` was reserved before; its end comes through `sink`, perhaps before this returns.
        `from_body`: the body decides about streaming, not the header."""
        now = mono_s()
        job = self._enter(opened, body, sink, now)
        try:
            intake = self._check_open(opened)
            if len(body) > LONG_BODY_BYTES:
                intake.read_elsewhere(opened, body, lambda done: self._read_ended(job, done.result, from_body))
            else:
                self._begin(job, intake.read(opened, body), from_body)
        except Exception as e:
            self._refuse(job, e)
        self._give(now)
        self._arm()
        return job

    def refuse(self, opened: OpenHeader, body: bytes, sink: Sink, error: RequestError) -> Job:
        """As `open`, of a request that is known to be none for this replica."""
        job = self._enter(opened, body, sink, mono_s())
        self._refuse(job, error)
        return job

    def _enter(self, opened: OpenHeader, body: bytes, sink: Sink, now: float) -> Job:
        job = Job(next(self._ids), opened, sink, len(body), now)
        self._open[job.id] = job
        self.tally.running(job)
        return job

    def abort(self, job: Job) -> None:
        """The client left. Its END follows at once with what it has used so far; unknown and ended ones are ignored."""
        if job.state == ENDED:
            return
        if job.state == RUNNING and not job.finish:
            self._commands.append(pipe.Abort(job.id))
        self._end(job, "abort")
        self._give(mono_s())

    def credit_came(self, job: Job) -> None:
        if job.answer is None or job.state == ENDED:
            return
        job.answer.credit_came()
        if job.answer.drained():
            job.stalled_s = 0.0
            if job.finish:
                self._complete(job, job.finish)

    def _check_open(self, opened: OpenHeader) -> Intake:
        if self.state != READY or self._admission is None or self._intake is None:
            raise refusals.draining() if self.state != STARTING else refusals.starting()
        if opened.route not in ROUTES:
            raise refusals.unknown_route(opened.route)
        if not self._admission.has_room(self._intake.preparing) and opened.route != "tokenize":
            raise refusals.full()
        return self._intake

    def _read_ended(self, job: Job, result: Callable[[], Read], from_body: bool) -> None:
        if job.state == ENDED:  # its client did not wait
            return
        try:
            self._begin(job, result(), from_body)
        except Exception as e:
            self._refuse(job, e)
        self._give(mono_s())
        self.changed()

    def _refuse(self, job: Job, e: Exception) -> None:
        """Anything but a RequestError is a bug of ours or of a library, met by one request: it alone fails."""
        if not isinstance(e, RequestError):
            where = "".join(traceback.format_exception(e))[-1024:]
            self._log.error("unexpected", request_id=job.opened.request_id, where=where)
            e = refusals.internal(e)
        self._fail(job, e, retryable=refusals.retryable(e))

    def _begin(self, job: Job, read: Read, from_body: bool) -> None:
        intake, admission = self._intake, self._admission
        assert intake is not None  # noqa: S101 (ready)
        assert admission is not None  # noqa: S101
        asked, opened = read.asked, job.opened
        if from_body and asked.model not in (None, self.spec.model):
            raise refusals.unknown_model(asked.model)
        _check_resume(opened, intake.description)
        if warning := warning_header(asked.ignored):
            job.sink.headers([("Warning", warning)])
        if not isinstance(asked, Generation) or read.prepared is None:
            self._finish_bytes(job, "stop", chunks.tokenized(read.ids, intake.description.context_tokens))
            return
        if from_body:
            opened.stream, opened.include_usage = asked.stream, asked.include_usage
        job.prepared = read.prepared
        job.answer = self._answer(job, intake.model, asked, read.prepared)
        max_tokens = read.prepared.sampling.max_tokens
        if len(opened.generated_ids) >= max_tokens or job.answer.stopped:
            self._complete(job, "stop" if job.answer.stopped else "length")
            return
        admission.enqueue(job, max_tokens)

    def _answer(self, job: Job, model: Model, asked: Generation, prepared: Prepared) -> Answer:
        opened, tokenizer = job.opened, model.tokenizer
        text = Text(tokenizer.decoder(), asked.stop, opened.generated_ids, opened.emitted_chars)
        opened.emitted_chars = text.known_chars
        created_s = opened.created_s or int(wall_s())
        label = chunks.Label(opened.request_id, self.spec.model, self.spec.revision, created_s)
        answer = Answer(
            job.sink,
            tokenizer,
            text,
            label,
            chat=asked.chat,
            stream=opened.stream,
            include_usage=opened.include_usage,
            logprobs=asked.logprobs is not None,
            resumed=len(opened.generated_ids),
        )
        answer.recall(prepared.prompt_ids, opened.generated_ids)
        return answer

    def _give(self, now: float) -> None:
        """Hand the engine what fits, and what else it must be told."""
        admission = self._admission
        if admission is not None and admission.waiting:
            self._expire(admission, now)
        while admission is not None and self.state == READY and (job := admission.next()) is not None:
            prepared = job.prepared
            assert prepared is not None  # noqa: S101 (it waited in the line)
            opened = job.opened
            self._commands.append(
                pipe.Add(
                    job.id, prepared.prompt_ids, opened.generated_ids, opened.emitted_chars or 0, prepared.sampling
                )
            )
            job.sent_s = now
            job.queued_s = now - job.arrived_s
            job.begin_account(self._work)
            self._fresh.append(job)
            if not self._engine:
                self._heard_s = now
            self._engine[job.id] = job
            if self._hot is not None:
                self._hot.saw(prepared.prompt_ids, now)
        if self._commands:
            self._send(self._commands)
            self._commands = []
        if not self._engine:
            self._prime(now)

    def _prime(self, now: float) -> None:
        """Let the engines compute ahead, while no request is in any of this process."""
        if self.state not in (STARTING, READY) or any(mate._engine for mate in self._mates):
            return
        for mate in self._mates:
            if (add := mate.primer.next(mate._ids, now)) is not None:
                mate._send([add])

    def _shares(self) -> bool:
        return self.spec.prefix_cache == "shared"

    # ------------------------------------------------------------------------------------------------ steps

    def stepped(self, message: pipe.Stepped) -> None:
        """One engine step: account, decode, build; the frames leave with the next flush."""
        now = self._heard_s = mono_s()
        assert self._admission is not None  # noqa: S101 (an engine steps after Ready)
        if self._engine:  # else it only computed ahead
            self._work.step(message.step_s, message.batch)
            self.meters.step(message.step_s, message.batch)
        self._kv_usage = message.capacity.kv_usage
        if self._fresh:
            self._account_fresh(now - message.step_s - CROSSING_S, {emission.id for emission in message.emissions})
        for emission in message.emissions:
            job = self._engine.get(emission.id)
            if job is None:
                if emission.finish and self.primer.is_running(emission.id):
                    self.primer.ended(emission.finish)
                continue
            job.settle(self._work)
            if emission.cached_tokens:
                job.cached_tokens = min(emission.cached_tokens, job.prompt_tokens)  # a resume's ids may be cached, too
            if emission.finish:
                del self._engine[job.id]
                self._admission.release(job)
            if job.state != ENDED:
                try:
                    self._advance(job, emission, now)
                except Exception as e:  # the others in this step go on
                    self._refuse(job, e)
        fresh = self._fresh
        self._admission.heard(message.capacity, sum(job.kv_blocks for job in fresh), len(fresh))
        self._give(now)

    def _account_fresh(self, began_s: float, seen: set[int]) -> None:
        """A request that came too late for this step neither pays for it nor is in the engine's capacity."""
        late = []
        for job in self._fresh:
            if job.sent_s > began_s and job.id not in seen:
                job.begin_account(self._work)
                late.append(job)
            else:
                job.queued_s = max(job.sent_s, began_s) - job.arrived_s
        self._fresh = late

    def _advance(self, job: Job, emission: Emission, now: float) -> None:
        answer = job.answer
        assert answer is not None  # noqa: S101 (it went to the engine)
        if job.finish:  # complete, its reader still owes credit; the engine is only confirming
            return
        if emission.token_ids:
            self.meters.token(job, now, len(emission.token_ids))
            answer.push(emission.token_ids, emission.logprobs)
        finish = emission.finish
        if answer.stopped:
            if not finish:
                self._commands.append(pipe.Abort(job.id))
            finish = "stop"
        if finish in ("error", "abort"):
            self._engine_refused(job, emission)
        elif not answer.drained():
            job.stalled_s = job.stalled_s or now
            job.finish = finish
        elif finish:
            self._complete(job, finish)

    def _engine_refused(self, job: Job, emission: Emission) -> None:
        text = emission.error or f"The engine ended the request with '{emission.finish}'."
        began = bool(job.output_tokens) or emission.finish == "abort"
        self._fail(job, refusals.engine_refused(text, began), retryable=False)

    # ------------------------------------------------------------------------------------------------ ends

    def _complete(self, job: Job, finish: str) -> None:
        assert job.answer is not None  # noqa: S101 (callers have pushed to it)
        last = job.answer.last_bytes(finish, job.prompt_tokens, job.cached_tokens)
        self._finish_bytes(job, finish, last)

    def _finish_bytes(self, job: Job, finish: str, last: bytes) -> None:
        streaming = job.answer is not None and job.answer.streaming
        if len(last) > MAX_LAST_BYTES:
            self._fail(job, refusals.answer_too_large(len(last), MAX_LAST_BYTES), retryable=False)
            return
        kind = "text/event-stream" if streaming else "application/json"
        self._end(job, finish, last, content_type=kind)

    def _fail(self, job: Job, error: RequestError, *, retryable: bool) -> None:
        """A stream that has begun gets an error event; anything else the error's JSON, as the whole HTTP body."""
        if job.state == RUNNING and job.id in self._engine and self.state != DEAD:
            self._commands.append(pipe.Abort(job.id))
        slug = error.slug or "invalid_request"
        begun = job.answer is not None and job.answer.streaming and job.answer.begun
        last = chunks.error_event(error) if begun else chunks.error_body(error)
        kind = "text/event-stream" if begun else "application/json"
        retryable = retryable and not begun
        self._end(job, "error", last, status=error.status, error=slug, retryable=retryable, content_type=kind)

    def _end(self, job: Job, finish: str, last: bytes = b"", **fields: object) -> None:
        if job.state == WAITING and self._admission is not None and job in self._admission.waiting:
            self._admission.remove(job)
        if job.state == RUNNING:
            job.settle(self._work)
        job.state = ENDED
        self.held.release(job.held_bytes)
        del self._open[job.id]
        self.tally.ended(job, finish)
        self.meters.ended(job, finish, mono_s())
        job.sink.end(job.end_header(finish, **fields), last)
        if not self._open:
            self._emptied.set()

    # ------------------------------------------------------------------------------------------------ timers

    def _expire(self, admission: Admission, now: float) -> None:
        for job in admission.expired(now):
            self._fail(job, refusals.deadline_passed(), retryable=False)

    def _arm(self) -> None:
        if self._tick is None and self._open:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._ticked)

    def _ticked(self) -> None:
        self._tick = None
        now = mono_s()
        for job in [j for j in self._open.values() if j.stalled_s and now - j.stalled_s >= self._stall_s]:
            self._log.info("stalled", request_id=job.opened.request_id, stall_s=self._stall_s)
            if not job.finish:
                self._commands.append(pipe.Abort(job.id))
            self._end(job, "abort", error="stalled")
        self._give(now)
        self.changed()
        self._arm()

    def changed(self) -> None:
        """Let the front ends send what has gathered."""
        for flush in self.flushers:
            flush()


def _check_resume(opened: OpenHeader, description: Description) -> None:
    """What was generated elsewhere must be of this engine's vocabulary."""
    ids = opened.generated_ids
    if (opened.emitted_chars or 0) < 0 or (ids and not 0 <= min(ids) <= max(ids) < description.vocab_size):
        raise refusals.impossible_resume()
