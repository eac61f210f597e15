"""A deterministic, weightless engine: it answers with the prompt, byte by byte, at set latencies.

Vocabulary: ids 0..255 are the bytes, 256 ends an answer, 257 begins a prompt. The answer's token number p is the
prompt's byte number p, cyclically, so a resume from `generated_ids` continues exactly. It says "stop" after the prompt
was echoed once. It runs in virtual time too: everything it knows of time are the clock and the `wait` it is given.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from neaptide.clock import Clock
from neaptide.engine.blocks import PrefixModel, Reservations
from neaptide.engine.options import PLACEMENT, parse
from neaptide.engine.protocol import Capacity, Description, Emission, Sampling
from neaptide.specs import ReplicaSpec

EOS, BOS = 256, 257
VOCABULARY = 258
BLOCK_TOKENS = 16
KV_BYTES_A_TOKEN = 1024  # what a token would weigh in a small model; only kv_mib's meaning hangs on it
FILLER = (ord("."),)  # echoed where the prompt holds no byte
UNDERSTOOD = ("kv_mib", "max_running", "context_tokens", "echo_ttft_ms", "echo_tpot_ms", "threads", *PLACEMENT)


class _Answer:
    __slots__ = ("cached", "due_s", "end", "id", "position", "prompt", "sampling", "source", "told")

    def __init__(self, id: int, prompt: Sequence[int], begun: int, sampling: Sampling) -> None:
        self.id, self.prompt, self.sampling = id, prompt, sampling
        self.source = tuple(token for token in prompt if token < EOS) or FILLER
        self.position = begun  # tokens generated so far, those given included
        self.end = sampling.max_tokens if sampling.ignore_eos else max(len(self.source), sampling.min_tokens)
        self.cached, self.due_s, self.told = 0, 0.0, False

    def next_emission(self) -> Emission:
        """One token, or the finish where there is none left; the last allowed token carries "length"."""
        sampling, position = self.sampling, self.position
        cached, self.told = (0 if self.told else self.cached), True
        if position >= sampling.max_tokens:
            return Emission(id=self.id, finish="length", cached_tokens=cached)
        token = self.source[position % len(self.source)]
        stopped = token in sampling.stop_token_ids and position >= sampling.min_tokens
        if stopped or position >= self.end:
            return Emission(id=self.id, finish="stop", cached_tokens=cached)
        self.position = position + 1
        return Emission(
            id=self.id,
            token_ids=[token],
            finish="length" if self.position >= sampling.max_tokens else "",
            cached_tokens=cached,
            logprobs=None if sampling.logprobs is None else [0.0],
        )


class EchoEngine:
    """Implements Engine. `wait(seconds)` may return early (a command has come); the step then emits what is due."""

    def __init__(self, spec: ReplicaSpec, clock: Clock, wait: Callable[[float], object]) -> None:
        options = parse(spec, UNDERSTOOD)
        self._clock, self._wait = clock, wait
        self._ttft_s, self._tpot_s = options.echo_ttft_ms / 1e3, options.echo_tpot_ms / 1e3
        self._context = options.context_tokens or 8192
        self._max_running = options.max_running or 256
        tokens = options.kv_mib * (1 << 20) // KV_BYTES_A_TOKEN if options.kv_mib else self._context * self._max_running
        self._kv = Reservations(tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        self._prefixes = None if spec.prefix_cache == "off" else PrefixModel(self._kv.total_blocks, BLOCK_TOKENS)
        self._model = spec.model
        self._waiting: deque[_Answer] = deque()
        self._running: dict[int, _Answer] = {}
        self._due: list[tuple[float, int]] = []  # heap of (when, id); ids no longer running are skipped
        self._aborted: list[int] = []

    def describe(self) -> Description:
        return Description(
            engine="echo",
            model=self._model,
            context_tokens=self._context,
            vocab_size=VOCABULARY,
            max_running=self._max_running,
            kv_tokens=self._kv.total_tokens,
            kv_block_tokens=BLOCK_TOKENS,
            precision="bytes",
            prefix_cache=self._prefixes is not None,
            replayable=("greedy", "seed", "penalties"),
        )

    def free(self) -> Capacity:
        full = bool(self._waiting)
        return Capacity(
            running=len(self._running),
            free_slots=0 if full else self._max_running - len(self._running),
            free_kv_tokens=0 if full else self._kv.free_tokens,
            kv_usage=self._kv.usage,
        )

    def add(
        self, id: int, prompt_ids: Sequence[int], generated_ids: Sequence[int], emitted_chars: int, sampling: Sampling
    ) -> None:
        if id in self._running or any(a.id == id for a in self._waiting):
            raise ValueError(f"request {id} is already here")
        if len(prompt_ids) + 1 > self._context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens; the context of {self._context} leaves no answer"
            )
        if sampling.json_schema is not None:
            raise ValueError("the echo engine has no grammar")
        room = self._context - len(prompt_ids)
        if sampling.max_tokens > room:
            sampling = msgspec.structs.replace(sampling, max_tokens=room)
        if not self._kv.could_hold(len(prompt_ids) + sampling.max_tokens):
            raise ValueError(f"prompt and answer need more than all KV memory ({self._kv.total_tokens} tokens)")
        self._waiting.append(_Answer(id, prompt_ids, len(generated_ids), sampling))
        self._admit()

    def step(self) -> list[Emission]:
        now = self._clock.mono_s()
        if not self._aborted and self._due and self._due[0][0] > now:
            self._wait(self._due[0][0] - now)
            now = self._clock.mono_s()
        emissions = [Emission(id=id, finish="abort") for id in self._aborted]
        self._aborted.clear()
        emissions += [self._advance(answer, now) for answer in self._take_due(now)]
        return emissions

    def busy(self) -> bool:
        return bool(self._running or self._waiting or self._aborted)

    def abort(self, id: int) -> None:
        if id in self._running:
            self._end(self._running[id])
        elif any(a.id == id for a in self._waiting):
            self._waiting = deque(a for a in self._waiting if a.id != id)
        else:
            return
        self._aborted.append(id)

    def close(self) -> None:
        self._running.clear()
        self._waiting.clear()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            answer = self._waiting[0]
            tokens = len(answer.prompt) + answer.sampling.max_tokens
            if not self._kv.can_hold(tokens):
                return
            self._kv.hold(answer.id, tokens)
            if self._prefixes is not None:
                answer.cached = self._prefixes.cached_tokens(answer.prompt)
                self._prefixes.learn(answer.prompt)
            answer.due_s = self._clock.mono_s() + self._ttft_s
            self._running[answer.id] = self._waiting.popleft()
            heapq.heappush(self._due, (answer.due_s, answer.id))

    def _take_due(self, now: float) -> list[_Answer]:
        due = []
        while self._due and self._due[0][0] <= now:
            when, id = heapq.heappop(self._due)
            answer = self._running.get(id)
            if answer is not None and answer.due_s == when:  # else aborted, perhaps added anew under the same id
                due.append(answer)
        return due

    def _advance(self, answer: _Answer, now: float) -> Emission:
        emission = answer.next_emission()
        if emission.finish:
            self._end(answer)
            return emission
        # Keep the beat after a late wake-up, but do not burst after a long stall.
        answer.due_s = max(answer.due_s + self._tpot_s, now - self._tpot_s)
        heapq.heappush(self._due, (answer.due_s, answer.id))
        return emission

    def _end(self, answer: _Answer) -> None:
        del self._running[answer.id]
        self._kv.release(answer.id)
        self._admit()
