"""The replica's request table: who waits, who runs, what each has used. Pure synchronous code that takes `now`.

A request goes to the engine only when a slot and its worst case of KV memory (prompt + max_tokens, whole blocks) are
free, so the engine never has to evict. What does not fit waits here in a short line, first come first served: waiting
proper happens in the gateway, which knows priorities and tenants.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from neaptide.engine.answer import Answer, Sink
from neaptide.engine.prompt import Prepared, whole_blocks
from neaptide.engine.protocol import Capacity, Description
from neaptide.link import EndHeader, OpenHeader, TallyRow

LOOKAHEAD = 2  # requests beyond the running ones that we ask for, so that a freed slot never idles
SPARE = 2  # and how many more we take, as several gateways may fill the lookahead at once
PREPARING, WAITING, RUNNING, ENDED = range(4)


class Work:
    """The engine's work so far, as two running sums from which a request's share is a difference."""

    __slots__ = ("share_s", "step_s")

    def __init__(self) -> None:
        self.share_s = 0.0  # sum over steps of step_s / batch: what one request in every step would have cost
        self.step_s = 0.0  # sum over steps of step_s

    def step(self, step_s: float, batch: int) -> None:
        self.step_s += step_s
        self.share_s += step_s / max(batch, 1)


class Job:
    """One request, from OPEN to END; `id` is the engine's number for it."""

    __slots__ = (
        "_share_s", "_step_s", "answer", "arrived_s", "cached_tokens", "deadline_s", "engine_s", "finish", "first_s",
        "held_bytes", "id", "kv_blocks", "kv_token_s", "last_s", "opened", "prepared", "queued_s", "route", "sent_s",
        "sink", "stalled_s", "state",
    )  # fmt: skip

    def __init__(self, id: int, opened: OpenHeader, sink: Sink, held_bytes: int, now: float) -> None:
        self.id, self.opened, self.route, self.sink = id, opened, opened.route, sink
        self.state = PREPARING
        self.held_bytes = held_bytes  # of the body, counted against what the process may hold
        self.arrived_s = now
        self.deadline_s = now + opened.deadline_in_s if opened.deadline_in_s is not None else float("inf")
        self.prepared: Prepared | None = None
        self.answer: Answer | None = None
        self.kv_blocks = 0
        self.sent_s = self.first_s = self.last_s = 0.0  # given to the engine; first and last token; 0 = not yet
        self.queued_s = self.engine_s = self.kv_token_s = 0.0
        self.cached_tokens = 0
        self.finish = ""  # the engine's word, while the client is still owed text
        self.stalled_s = 0.0  # since when its reader gives no credit; 0 = it does
        self._share_s = self._step_s = 0.0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prepared.prompt_ids) if self.prepared is not None else 0

    @property
    def output_tokens(self) -> int:
        return self.answer.output if self.answer is not None else 0

    def begin_account(self, work: Work) -> None:
        """Steps before this moment are not this request's."""
        self._share_s, self._step_s = work.share_s, work.step_s

    def settle(self, work: Work) -> None:
        """Take its share of the steps since the last settling; call before its token count changes."""
        held = self.prompt_tokens + len(self.opened.generated_ids) + self.output_tokens
        self.engine_s += work.share_s - self._share_s
        self.kv_token_s += held * (work.step_s - self._step_s)
        self._share_s, self._step_s = work.share_s, work.step_s

    def end_header(self, finish: str, **fields: object) -> EndHeader:
        """Counts are of this replica's own work: tokens of a resume that others generated are not in them, but for
        those of reasoning, which nobody else can tell from the rest."""
        header = EndHeader(
            finish=finish,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self.answer.reasoned_before + self.answer.reasoning if self.answer is not None else 0,
            output_tokens=self.output_tokens,
            queued_s=self.queued_s,
            engine_s=self.engine_s,
            kv_token_s=self.kv_token_s,
        )
        for name, value in fields.items():
            setattr(header, name, value)
        return header


class Admission:
    """Slots, KV blocks and the waiting line of one engine."""

    def __init__(self, description: Description) -> None:
        self._block = description.kv_block_tokens
        self.total_blocks = whole_blocks(description.kv_tokens, self._block) // self._block
        self.max_running = description.max_running
        self.held_blocks = 0
        self.running = 0  # in the engine, those that nobody reads any more included
        self.waiting: deque[Job] = deque()
        self._mean_blocks = 1.0  # of recent requests: how many more the free memory would take
        self._engine_slots = description.max_running  # the engine's own word, less what was sent since
        self._engine_blocks = self.total_blocks

    def has_room(self, preparing: int) -> bool:
        """Whether one more request may come in, `preparing` of which are not yet in the line."""
        inside = self.running + len(self.waiting) + preparing
        return inside < self.max_running + LOOKAHEAD + SPARE and len(self.waiting) < LOOKAHEAD + SPARE

    def enqueue(self, job: Job, max_tokens: int) -> None:
        """At the end of the line; the job has been prepared."""
        job.state = WAITING
        job.kv_blocks = -(-(job.prompt_tokens + max_tokens) // self._block)
        self._mean_blocks += 0.1 * (job.kv_blocks - self._mean_blocks)
        self.waiting.append(job)

    def next(self) -> Job | None:
        """The head of the line when it fits now: it counts as running from here on. Never overtakes."""
        if not self.waiting or not self._fits(self.waiting[0].kv_blocks):
            return None
        job = self.waiting.popleft()
        job.state = RUNNING
        self.running += 1
        self.held_blocks += job.kv_blocks
        self._engine_slots -= 1
        self._engine_blocks -= job.kv_blocks
        return job

    def release(self, job: Job) -> None:
        """The engine has ended it."""
        self.running -= 1
        self.held_blocks -= job.kv_blocks

    def heard(self, capacity: Capacity, sent_blocks: int, sent: int) -> None:
        """The engine's own account; `sent` requests of `sent_blocks` may have crossed it on the way."""
        self._engine_slots = capacity.free_slots - sent
        self._engine_blocks = capacity.free_kv_tokens // self._block - sent_blocks

    def remove(self, job: Job) -> None:
        self.waiting.remove(job)

    def expired(self, now: float) -> list[Job]:
        return [job for job in self.waiting if job.deadline_s <= now]

    def slots(self, preparing: int) -> int:
        """How many more requests it would take right now, lookahead included."""
        queued = len(self.waiting) + preparing
        free = min(self.max_running - self.running, int(self.free_blocks / max(self._mean_blocks, 1.0)))
        return max(0, (0 if self.waiting else free) + LOOKAHEAD - queued)

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.held_blocks

    @property
    def free_kv_tokens(self) -> int:
        return self.free_blocks * self._block

    def _fits(self, blocks: int) -> bool:
        if self.running >= self.max_running or blocks > self.free_blocks:
            return False
        # An idle engine says nothing, so its last word may be old: our own count decides then.
        return self.running == 0 or (self._engine_slots > 0 and blocks <= self._engine_blocks)


class Tally:
    """What became of recent requests, by the gateway's request id; bounded, oldest forgotten first."""

    def __init__(self, most: int = 2_000) -> None:
        self._rows: OrderedDict[str, Job | TallyRow] = OrderedDict()
        self._most = most

    def running(self, job: Job) -> None:
        self._rows[job.opened.request_id] = job
        self._rows.move_to_end(job.opened.request_id)
        while len(self._rows) > self._most:
            self._rows.popitem(last=False)

    def ended(self, job: Job, finish: str) -> None:
        if self._rows.get(job.opened.request_id) is job:
            self._rows[job.opened.request_id] = _row(job, True, finish)

    def rows(self, request_ids: list[str]) -> dict[str, TallyRow]:
        """Rows of those that are known; a running request's counts are those of this moment."""
        found = ((id, self._rows.get(id)) for id in request_ids)
        return {id: _row(x, False, "") if isinstance(x, Job) else x for id, x in found if x is not None}


def _row(job: Job, done: bool, finish: str) -> TallyRow:
    return TallyRow(
        done=done,
        finish=finish,
        prompt_tokens=job.prompt_tokens,
        cached_tokens=job.cached_tokens,
        output_tokens=job.output_tokens,
        engine_s=job.engine_s,
    )
