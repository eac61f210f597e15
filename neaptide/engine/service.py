"""A replica's work on requests, between its front ends (link, HTTP) and its engine process.

A request walks: open -> (thread, when long) prepare -> admission -> engine -> answer -> sink. The front ends hand in a
Sink each and flush what the sinks gathered when `flush` tells them to: once a batch of engine steps, so one write a
connection and step. Single-threaded: everything here runs in the event loop, but for `prepare`.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from neaptide.clock import mono_s, wall_s
from neaptide.engine import pipe
from neaptide.engine.answer import Answer, Sink
from neaptide.engine.log import Log
from neaptide.engine.prompt import Model, Prepared, encode, prepare
from neaptide.engine.protocol import Description, Emission
from neaptide.engine.report import Meters
from neaptide.engine.requests import ENDED, PREPARING, RUNNING, WAITING, Admission, Job, Tally, Work
from neaptide.engine.text import Text
from neaptide.errors import RequestError
from neaptide.link import STALL_S, LoadReport, OpenHeader
from neaptide.specs import ReplicaSpec
from neaptide.wire import chunks
from neaptide.wire.parse import (
    Abilities,
    Generation,
    Tokenization,
    parse_chat,
    parse_completion,
    parse_tokenize,
    warning_header,
)

LONG_BODY_BYTES = 16 * 1024  # tokenising this takes about a millisecond; longer goes to a thread
MAX_HELD_BYTES = 64 << 20  # bodies of requests that are being read or prepared, all together
MAX_BODY_BYTES = 16 << 20
TICK_S = 0.1  # deadlines in the line, stalled readers
CROSSING_S = 0.001  # a request written this long before a step began is in it

STARTING, READY, DRAINING, DEAD = "starting", "ready", "draining", "dead"
ROUTES = ("chat.completions", "completions", "tokenize")


class Service:
    """One engine's requests. `engine_send` writes to the engine; `flush` is called after each batch of changes."""

    def __init__(
        self,
        spec: ReplicaSpec,
        engine_send: Callable[[list[pipe.ToEngine]], None],
        log: Log,
        stall_s: float = STALL_S,
    ) -> None:
        self.spec, self.state = spec, STARTING
        self.meters = Meters()
        self.tally = Tally()
        self.description: Description | None = None
        self.flushers: list[Callable[[], None]] = []
        self._emptied = asyncio.Event()
        self._send, self._log, self._stall_s = engine_send, log, stall_s
        self._model: Model | None = None
        self._admission: Admission | None = None
        self._can = Abilities()
        self._work = Work()
        self._ids = itertools.count(1)
        self._open: dict[int, Job] = {}  # not ended for the client
        self._engine: dict[int, Job] = {}  # in the engine, whether anybody still reads or not
        self._fresh: list[Job] = []  # given to the engine, perhaps not yet part of a step
        self._commands: list[pipe.ToEngine] = []
        self._preparing = 0
        self._held_bytes = 0
        self._kv_usage = 0.0
        self._heard_s = mono_s()
        self._threads = ThreadPoolExecutor(1, "prepare")
        self._tick: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------------ life

    def ready(self, model: Model, description: Description) -> None:
        """The engine is warm: take requests."""
        self._model, self.description = model, description
        self._can = Abilities(description.logprobs, description.json_schema)
        self._admission = Admission(description)
        self.state = READY

    def drain(self) -> None:
        """Take nothing new; hand back what has not started; what runs goes on."""
        if self.state in (STARTING, READY):
            self.state = DRAINING
        for job in list(self._open.values()):
            if job.state in (PREPARING, WAITING):
                self._fail(job, _draining(), retryable=True)
        self.changed()

    def engine_gone(self, why: str) -> None:
        """Every request ends; those the engine had not been given may be tried elsewhere."""
        self.state = DEAD
        for job in list(self._open.values()):
            message = f"The engine process died while this request was open ({why})."
            error = RequestError(502, message, slug="engine_died", kind="api_error")
            self._fail(job, error, retryable=job.state != RUNNING)
        self.changed()

    def cut(self) -> None:
        """The grace is over: end what still runs."""
        for job in list(self._open.values()):
            self._fail(job, _draining(), retryable=False)
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
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._tick is not None:
            self._tick.cancel()

    def stuck_s(self, now: float) -> float:
        """For how long an engine with work to do has said nothing."""
        return now - self._heard_s if self._engine else 0.0

    def load(self) -> LoadReport:
        admission = self._admission
        if admission is None:
            return LoadReport(draining=self.state in (DRAINING, DEAD))
        return LoadReport(
            running=len(self._engine),
            waiting=len(admission.waiting) + self._preparing,
            slots=admission.slots(self._preparing) if self.state == READY else 0,
            free_kv_tokens=admission.free_kv_tokens,
            kv_usage=round(self._kv_usage, 4),
            step_s=round(self.meters.median_step_s(), 6),
            draining=self.state in (DRAINING, DEAD),
        )

    # ------------------------------------------------------------------------------------------------ requests

    def reserve_bytes(self, count: int) -> RequestError | None:
        """Count a body that is about to be read; the error when it may not be."""
        if count > MAX_BODY_BYTES:
            return RequestError(413, f"A body of {count} bytes exceeds {MAX_BODY_BYTES}.", slug="body_too_large")
        if self._held_bytes + count > MAX_HELD_BYTES:
            return _full("The replica holds as many bytes of requests as it may.")
        self._held_bytes += count
        return None

    def release_bytes(self, count: int) -> None:
        self._held_bytes -= count

    def open(self, opened: OpenHeader, body: bytes, sink: Sink, from_body: bool = False) -> Job:
        """Begin a request whose `body` was reserved before; its end comes through `sink`, perhaps before this returns.
        `from_body`: the body decides about streaming, not the header."""
        now = mono_s()
        job = Job(next(self._ids), opened, sink, len(body), now)
        self._open[job.id] = job
        self.tally.running(job)
        try:
            self._check_open(opened)
            if len(body) > LONG_BODY_BYTES:
                self._preparing += 1
                future = asyncio.get_running_loop().run_in_executor(self._threads, self._read, opened, body)
                future.add_done_callback(lambda done: self._read_elsewhere(job, done, from_body))
            else:
                self._begin(job, self._read(opened, body), from_body)
        except RequestError as e:
            self._fail(job, e, retryable=e.status in (429, 503))
        except Exception as e:
            self._unexpected(job, e)
        self._give(now)
        self._arm()
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

    def _check_open(self, opened: OpenHeader) -> None:
        if self.state != READY or self._admission is None:
            raise _draining() if self.state != STARTING else _starting()
        if opened.route not in ROUTES:
            raise RequestError(404, f"The route '{opened.route[:64]}' is not served here.", slug="unknown_route")
        if not self._admission.has_room(self._preparing) and opened.route != "tokenize":
            raise _full("The replica's waiting line is full.")

    def _read(self, opened: OpenHeader, body: bytes) -> tuple[Generation, Prepared] | tuple[Tokenization, list[int]]:
        """Body to prompt; runs in a thread when it is long."""
        model, description = self._loaded()
        if opened.route == "tokenize":
            asked = parse_tokenize(body)
            return asked, encode(model, asked.prompt)
        parse = parse_chat if opened.route == "chat.completions" else parse_completion
        generation = parse(body, self._can)
        return generation, prepare(model, description, generation)

    def _read_elsewhere(self, job: Job, done: asyncio.Future, from_body: bool) -> None:  # type: ignore[type-arg]
        self._preparing -= 1
        if done.cancelled() or job.state == ENDED:
            return
        try:
            self._begin(job, done.result(), from_body)
        except RequestError as e:
            self._fail(job, e, retryable=e.status in (429, 503))
        except Exception as e:
            self._unexpected(job, e)
        self._give(mono_s())
        self.changed()

    def _unexpected(self, job: Job, e: Exception) -> None:
        """A bug of ours or of a library, met by one request: it alone fails."""
        where = "".join(traceback.format_exception(e))[-1024:]
        self._log.error("unexpected", request_id=job.opened.request_id, where=where)
        self._fail(job, _internal(e), retryable=False)

    def _loaded(self) -> tuple[Model, Description]:
        assert self._model is not None  # noqa: S101 (callers run only once ready)
        assert self.description is not None  # noqa: S101
        return self._model, self.description

    def _begin(
        self, job: Job, read: tuple[Generation, Prepared] | tuple[Tokenization, list[int]], from_body: bool
    ) -> None:
        assert self._admission is not None  # noqa: S101 (ready)
        asked, prepared = read
        if from_body and asked.model not in (None, self.spec.model):
            raise RequestError(
                404, f"The model '{asked.model[:64]}' does not exist here.", slug="model_not_found", param="model"
            )
        if warning := warning_header(asked.ignored):
            job.sink.headers([("Warning", warning)])
        if isinstance(asked, Tokenization) or isinstance(prepared, list):
            ids = prepared if isinstance(prepared, list) else []
            self._finish_bytes(job, "stop", chunks.tokenized(ids, self._loaded()[1].context_tokens))
            return
        opened = job.opened
        if from_body:
            opened.stream, opened.include_usage = asked.stream, asked.include_usage
        job.prepared = prepared
        job.answer = self._answer(job, asked, prepared)
        if len(opened.generated_ids) >= prepared.sampling.max_tokens or job.answer.stopped:
            self._complete(job, "stop" if job.answer.stopped else "length")
            return
        self._admission.enqueue(job, prepared.sampling.max_tokens)

    def _answer(self, job: Job, asked: Generation, prepared: Prepared) -> Answer:
        opened, tokenizer = job.opened, self._loaded()[0].tokenizer
        text = Text(tokenizer.decoder(), asked.stop, opened.generated_ids, opened.emitted_chars)
        label = chunks.Label(opened.request_id, self.spec.model, self.spec.revision, int(wall_s()))
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
                pipe.Add(job.id, prepared.prompt_ids, opened.generated_ids, opened.emitted_chars, prepared.sampling)
            )
            job.sent_s = now
            job.queued_s = now - job.arrived_s
            job.begin_account(self._work)
            self._fresh.append(job)
            if not self._engine:
                self._heard_s = now
            self._engine[job.id] = job
        if self._commands:
            self._send(self._commands)
            self._commands = []

    # ------------------------------------------------------------------------------------------------ steps

    def stepped(self, message: pipe.Stepped) -> None:
        """One engine step: account, decode, build; the frames leave with the next flush."""
        now = self._heard_s = mono_s()
        assert self._admission is not None  # noqa: S101 (an engine steps after Ready)
        self._work.step(message.step_s, message.batch)
        self.meters.step(message.step_s, message.batch)
        self._kv_usage = message.capacity.kv_usage
        if self._fresh:
            self._account_fresh(now - message.step_s - CROSSING_S, {emission.id for emission in message.emissions})
        for emission in message.emissions:
            job = self._engine.get(emission.id)
            if job is None:
                continue
            job.settle(self._work)
            if emission.cached_tokens:
                job.cached_tokens = emission.cached_tokens
            if emission.finish:
                del self._engine[job.id]
                self._admission.release(job)
            if job.state != ENDED:
                self._advance(job, emission, now)
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
        if job.output_tokens or emission.finish == "abort":
            self._fail(job, RequestError(502, text[:500], slug="engine_error", kind="api_error"), retryable=False)
        else:
            self._fail(job, RequestError(400, text[:500], slug="engine_refused"), retryable=False)

    # ------------------------------------------------------------------------------------------------ ends

    def _complete(self, job: Job, finish: str) -> None:
        assert job.answer is not None  # noqa: S101 (callers have pushed to it)
        last = job.answer.last_bytes(finish, job.prompt_tokens, job.cached_tokens)
        self._finish_bytes(job, finish, last)

    def _finish_bytes(self, job: Job, finish: str, last: bytes) -> None:
        streaming = job.answer is not None and job.answer.streaming
        if len(last) > MAX_LAST_BYTES:
            self._fail(job, _too_large(len(last)), retryable=False)
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
        self._held_bytes -= job.held_bytes
        del self._open[job.id]
        self.tally.ended(job, finish)
        self.meters.ended(job, finish, mono_s())
        job.sink.end(job.end_header(finish, **fields), last)
        if not self._open:
            self._emptied.set()

    # ------------------------------------------------------------------------------------------------ timers

    def _expire(self, admission: Admission, now: float) -> None:
        for job in admission.expired(now):
            message = "The request's deadline passed while it waited in the replica."
            self._fail(job, RequestError(504, message, slug="deadline_exceeded"), retryable=False)

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


MAX_LAST_BYTES = (1 << 20) - (1 << 12)  # a link frame less its header


def _full(message: str) -> RequestError:
    return RequestError(429, message, slug="replica_full", retry_after_s=1.0)


def _draining() -> RequestError:
    message = "The replica is shutting down."
    return RequestError(503, message, slug="draining", kind="service_unavailable", retry_after_s=1.0)


def _starting() -> RequestError:
    message = "The replica is still starting."
    return RequestError(503, message, slug="starting", kind="service_unavailable", retry_after_s=1.0)


def _internal(e: Exception) -> RequestError:
    return RequestError(500, f"The replica failed to read the request ({type(e).__name__}).", slug="internal_error")


def _too_large(size: int) -> RequestError:
    message = f"The answer of {size} bytes exceeds {MAX_LAST_BYTES}."
    return RequestError(413, message, slug="answer_too_large", fix="Ask for fewer tokens, or stream.")
