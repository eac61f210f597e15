"""A replica's engine, as both request-level tiers mean it, and the book of what it was asked and did.

At a border (a step's end, or an arrival while idle) the engine puts its next step together:

1. Each request that decodes gets a token. Where KV memory does not hold one more for each, the one that was admitted
   last goes back to the head of the line, to be computed anew with what it had generated; nobody is admitted then.
2. What these tokens leave of `chunk_tokens` is for prompts, as in vLLM and OpenVINO GenAI: first the one that has
   begun, then from the line in its order, while a place in the batch is free and KV memory holds what `admit` asks for.
3. The step lasts as long as its StepTime says. Who is past the prompt at its end has the first token.

Who comes while a step runs waits for its end. A prompt's last token is always computed, whatever prefixes are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np

from neaptide.simulate.arrivals import Requests
from neaptide.simulate.kv import Memory
from neaptide.simulate.steps import Grid, Linear

ENDLESS = 1 << 50  # tokens


class Traits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one replica's engine is. The default: Qwen3-8B in BF16 on one H100 80 GB (computed with aiconfigurator 0.12
    for vLLM, median error 2.9 %, 3.0 % for prefill), its memory less weights and activations."""

    step: Linear | Grid = Linear(
        base_s=6.5701e-3,
        request_s=1.1922e-5,
        token_s=4.6928e-8,
        prefill_token_s=1.9697e-5,
        prefill_pair_s=9.6956e-10,
    )
    max_batch: int = 256  # requests decoding or prefilling
    chunk_tokens: int = 2048  # a step: one for each that decodes, the rest for prompts
    kv_tokens: int | None = 380_000  # None: KV memory never runs out, and every prefix is kept
    kv_block_tokens: int = 16
    headroom: float = 0.01  # share of KV memory that must stay free when a request is admitted beside others
    admit: Literal["prompt", "answer"] = "prompt"  # once KV memory holds it; answer: and all that it will generate
    prefix_block_tokens: int = 512  # what a prefix id of the arrivals stands for; 0: no prefix is kept

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.chunk_tokens < 1 or self.kv_block_tokens < 1:
            raise ValueError("max_batch, chunk_tokens and kv_block_tokens are 1 or more")
        if self.kv_tokens is not None and self.kv_tokens < self.kv_block_tokens:
            raise ValueError("kv_tokens is at least one block")
        if self.prefix_block_tokens % self.kv_block_tokens or not 0 <= self.headroom < 1:
            raise ValueError("prefix_block_tokens is a multiple of kv_block_tokens, headroom a share under 1")


class Book:
    """A row a request, as lists: single elements of arrays are slow. Seconds are NaN until they are known."""

    __slots__ = (
        "arrived_s", "cached", "finish_s", "first_s", "made", "out", "preempted", "prefixes", "prompt", "replica"
    )  # fmt: skip

    def __init__(self, requests: Requests, in_tokens: int, out_tokens: int) -> None:
        """Lengths are those of the requests, or, where they tell none, the ones given; at least 1 each."""
        rows = len(requests.t_s)
        prompt, out = requests.in_tokens, requests.out_tokens
        self.arrived_s: list[float] = requests.t_s.tolist()
        self.prompt: list[int] = [in_tokens] * rows if prompt is None else np.maximum(prompt, 1).tolist()
        self.out: list[int] = [out_tokens] * rows if out is None else np.maximum(out, 1).tolist()
        self.prefixes: list[list[int]] | None = None
        if requests.prefixes is not None:
            values, starts = requests.prefixes.values.tolist(), requests.prefixes.starts.tolist()
            self.prefixes = [values[starts[i] : starts[i + 1]] for i in range(rows)]
        self.first_s, self.finish_s = [math.nan] * rows, [math.nan] * rows
        self.made = [0] * rows  # tokens generated before it was last put back
        self.cached, self.preempted, self.replica = [0] * rows, [0] * rows, [-1] * rows

    def shareable(self, id: int, block_tokens: int) -> list[int]:
        """The blocks of its prompt that another request may share: the full ones."""
        if self.prefixes is None or not block_tokens:
            return []
        return self.prefixes[id][: self.prompt[id] // block_tokens]

    def wanted(self, id: int, block_tokens: int) -> list[int]:
        """The blocks that it may find computed: those of `shareable` that end before its last token."""
        return self.shareable(id, block_tokens)[: (self.prompt[id] - 1) // block_tokens if block_tokens else 0]


class Engine(Protocol):
    """A replica's state. Time comes in; it never goes back. A step that ends at a time has ended then."""

    end_s: float  # of what it is at: nothing changes before, unless somebody enters; inf while idle

    @property
    def in_flight(self) -> int:
        """Running or waiting here."""

    @property
    def waiting(self) -> int: ...

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        """These enter at these times, in order, none before what has been run; then on to `until_s`."""

    def drop(self, now_s: float) -> list[int]:
        """It is gone: who was not done, in the order of the line, with `made` brought up to date."""


def memory(traits: Traits) -> Memory:
    block = traits.kv_block_tokens
    total = ENDLESS if traits.kv_tokens is None else traits.kv_tokens // block * block
    return Memory(total, traits.prefix_block_tokens)


def rounded(traits: Traits, tokens: int) -> int:
    """To whole KV blocks."""
    return -(-tokens // traits.kv_block_tokens) * traits.kv_block_tokens


def whole(traits: Traits, prompt: int, out: int) -> int:
    """KV tokens of a request at its end: it needs none for its last token."""
    return rounded(traits, prompt + out - 1)


def could_hold(traits: Traits, memory: Memory, prompt: int, out: int) -> bool:
    """Would it fit if it were alone?"""
    return whole(traits, prompt, out) <= memory.total
