"""OpenVINO GenAI's continuous batching as an Engine: its scheduler batches, our admission keeps it from running dry.

Why the library is held at arm's length (docs/decisions/0011): a request that it must preempt and that is then cancelled
can crash it, so requests are handed over only when their worst case fits; cancelling inside a prefill leaves a block in
the prefix cache that says it is complete and is not, so such a request is prefilled to its end first; a bad grammar
stalls it for good, so none is accepted; the same request id twice breaks a step, so ids are ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

from neaptide.engine import openvino_pipeline as pipeline
from neaptide.engine.blocks import PrefixModel, Reservations
from neaptide.engine.protocol import Capacity, Description, Emission, Sampling
from neaptide.models.hold import hold, release
from neaptide.specs import ReplicaSpec


class _Sequence:
    """A request between add and its last emission."""

    __slots__ = (
        "cached",
        "config",
        "generated",
        "handle",
        "id",
        "left",
        "logprobs",
        "prefilled",
        "prompt",
        "serial",
        "stepped",
        "stops",
    )

    def __init__(self, id: int, serial: int, prompt: list[int], left: int, stops: frozenset[int], config: Any) -> None:
        self.id, self.serial, self.prompt, self.left, self.stops, self.config = id, serial, prompt, left, stops, config
        self.logprobs = config.logprobs > 0
        self.handle: Any = None
        self.generated: list[int] = []
        self.cached = 0
        self.stepped = self.prefilled = False


class OpenVinoEngine:
    """Implements Engine. `stages` is filled with load_s, calibrate_s and warmup_s."""

    def __init__(self, spec: ReplicaSpec, stages: dict[str, float]) -> None:
        planned = pipeline.plan(spec)
        self._held = hold(planned.files.path)  # a node's cache does not evict what an engine maps
        self._plan, self._pipeline = pipeline.load(planned, spec, stages)
        planned = self._plan
        self._model = spec.model
        self._kv = Reservations(planned.kv_blocks, pipeline.BLOCK_TOKENS)
        self._prefixes = PrefixModel(planned.kv_blocks, pipeline.BLOCK_TOKENS) if planned.prefix_cache else None
        self._serial = count(1)
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._leaving: list[_Sequence] = []  # aborted inside a prefill: computed to its end, heard by nobody
        self._cancelled: list[_Sequence] = []  # the library frees them in its next step
        self._settled: list[Emission] = []  # emissions that need no step

    def describe(self) -> Description:
        planned = self._plan
        return Description(
            engine="openvino",
            model=self._model,
            context_tokens=planned.files.context_tokens,
            vocab_size=planned.files.vocab_size,
            max_running=planned.max_running,
            kv_tokens=self._kv.total_tokens,
            kv_block_tokens=pipeline.BLOCK_TOKENS,
            chunk_tokens=planned.batched_tokens,
            precision=planned.precision,
            prefix_cache=planned.prefix_cache,
            replayable=("greedy", "repetition_penalty"),
        )

    def free(self) -> Capacity:
        taken = len(self._running) + len(self._leaving) + len(self._cancelled)
        full = bool(self._waiting)
        return Capacity(
            running=len(self._running),
            free_slots=0 if full else self._plan.max_running - taken,
            free_kv_tokens=0 if full else self._kv.free_tokens,
            kv_usage=self._kv.usage,
        )

    def add(
        self, id: int, prompt_ids: Sequence[int], generated_ids: Sequence[int], emitted_chars: int, sampling: Sampling
    ) -> None:
        files = self._plan.files
        if id in self._running or any(s.id == id for s in self._waiting):
            raise ValueError(f"request {id} is already here")
        if sampling.json_schema is not None:
            raise ValueError("this engine takes no grammar: a bad one would stall the library for everybody")
        if len(prompt_ids) + 1 > files.context_tokens or not prompt_ids:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens; it must have at least 1 and leave room for an answer in the "
                f"context of {files.context_tokens}"
            )
        total = min(len(prompt_ids) + sampling.max_tokens, files.context_tokens)
        if not self._kv.could_hold(total):
            raise ValueError(
                f"prompt and answer need {total} tokens of KV memory, all of it is {self._kv.total_tokens}"
            )
        prompt = [*prompt_ids, *generated_ids]
        if min(prompt) < 0 or max(prompt) >= files.vocab_size:
            raise ValueError(f"token ids must lie in 0..{files.vocab_size - 1}")
        left = total - len(prompt)
        if left <= 0:
            self._settled.append(Emission(id=id, finish="length"))
            return
        try:
            config = pipeline.generation_config(sampling, left, len(generated_ids), frozenset(files.eos_token_ids))
            config.validate()
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"sampling refused: {pipeline.last_line(error)}") from error
        stops = pipeline.stop_ids(sampling, frozenset(files.eos_token_ids))
        self._waiting.append(_Sequence(id, next(self._serial), prompt, left, stops, config))
        self._admit()

    def step(self) -> list[Emission]:
        emissions, self._settled = self._settled, []
        released, self._cancelled = self._cancelled, []
        if self._running or self._leaving or released:
            self._pipeline.step()
        for sequence in released:
            self._kv.release(sequence.serial)
        for sequence in tuple(self._running.values()):
            if sequence.handle.can_read():
                emissions.append(self._read(sequence))
            else:
                sequence.stepped = True
                if sequence.handle.get_status() != pipeline.RUNNING:
                    emissions.append(self._lost(sequence))
        if self._leaving:
            self._see_off()
        if self._waiting:
            self._admit()
        return emissions

    def busy(self) -> bool:
        return bool(self._running or self._waiting or self._settled or self._cancelled or self._leaving)

    def abort(self, id: int) -> None:
        sequence = self._running.pop(id, None)
        if sequence is not None:
            self._cancel(sequence)
        elif any(s.id == id for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if s.id != id)
        else:
            return
        self._settled.append(Emission(id=id, finish="abort"))

    def close(self) -> None:
        """Free everything in the library too, which complains on stderr of blocks still held when it is destroyed."""
        for sequence in (*self._running.values(), *self._leaving):
            sequence.handle.cancel()
        self._waiting.clear()
        self._running.clear()
        self._leaving.clear()
        self._pipeline.step()
        release(self._held)

    def _admit(self) -> None:
        """Hand over, in order, what fits with its whole answer: the library is never short of a block."""
        while self._waiting:
            sequence = self._waiting[0]
            taken = len(self._running) + len(self._leaving) + len(self._cancelled)
            tokens = len(sequence.prompt) + sequence.left
            if taken >= self._plan.max_running or not self._kv.can_hold(tokens):
                return
            self._waiting.popleft()
            self._kv.hold(sequence.serial, tokens)
            if self._prefixes is not None:
                sequence.cached = self._prefixes.cached_tokens(sequence.prompt)
            ids = pipeline.token_tensor(sequence.prompt)
            sequence.handle = self._pipeline.add_request(sequence.serial, ids, sequence.config)
            self._running[sequence.id] = sequence

    def _read(self, sequence: _Sequence) -> Emission:
        outputs = sequence.handle.read()
        if not outputs:
            return self._lost(sequence)
        output = next(iter(outputs.values()))
        ids = output.generated_ids
        emission = Emission(id=sequence.id, token_ids=ids)
        if sequence.logprobs:
            emission.logprobs = output.generated_log_probs
        sequence.left -= len(ids)
        if not sequence.prefilled:
            sequence.prefilled = True
            emission.cached_tokens = sequence.cached
            if self._prefixes is not None:
                self._prefixes.learn(sequence.prompt)
        if self._prefixes is not None:
            sequence.generated += ids
        if ids[-1] in sequence.stops:
            ids.pop()
            if emission.logprobs is not None:
                emission.logprobs.pop()
            emission.finish = "stop"
        elif sequence.left <= 0:
            emission.finish = "length"
        if emission.finish:
            self._end(sequence)
        return emission

    def _end(self, sequence: _Sequence) -> None:
        del self._running[sequence.id]
        self._kv.release(sequence.serial)
        if self._prefixes is not None:
            self._prefixes.learn(sequence.prompt + sequence.generated[:-1])  # the last token's KV was never computed

    def _lost(self, sequence: _Sequence) -> Emission:
        del self._running[sequence.id]
        self._kv.release(sequence.serial)
        status = sequence.handle.get_status().name
        return Emission(id=sequence.id, finish="error", error=f"the inference library dropped the request ({status})")

    def _cancel(self, sequence: _Sequence) -> None:
        if self._prefixes is not None and sequence.stepped and not sequence.prefilled:
            self._leaving.append(sequence)
            return
        sequence.handle.cancel()
        self._cancelled.append(sequence)

    def _see_off(self) -> None:
        """Cancel the aborted whose prefill is complete now."""
        staying = []
        for sequence in self._leaving:
            if sequence.handle.can_read():
                sequence.handle.cancel()
                self._cancelled.append(sequence)
            else:
                staying.append(sequence)
        self._leaving = staying
