"""What an engine is: the contract between the step loop (core.py) and an inference library.

An engine lives alone in its process; nothing here is called from two threads. It works in token ids; text, templates
and stop strings are the I/O process's (replica). One contract suite (tests/test_engine_contract.py) holds for all
engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. `max_tokens` counts generated tokens, those given as `generated_ids` included."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # None = none, 0 = of the chosen token, n = of the n likeliest too
    stop_token_ids: tuple[int, ...] = ()
    json_schema: str | None = None  # grammar, where describe() says it works


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """Told once, after loading; the gateway gets it in the link's HELLO."""

    engine: str
    model: str
    context_tokens: int
    vocab_size: int
    max_running: int  # requests decoded together
    kv_tokens: int  # KV memory in tokens
    kv_block_tokens: int = 1  # a request holds whole blocks
    chunk_tokens: int = 0  # most prompt tokens prefilled in one step; 0 = whole prompts
    precision: str = ""
    prefix_cache: bool = False
    logprobs: int = 0  # most alternatives a token
    json_schema: bool = False
    replayable: tuple[str, ...] = ()  # sampling features a resume reproduces: "greedy", "seed", "penalties", ...


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    running: int
    free_slots: int
    free_kv_tokens: int
    kv_usage: float = 0.0  # 0..1


class Emission(msgspec.Struct, kw_only=True, array_like=True):
    """What one step made for one request. `finish` is "" while it runs, then stop | length | abort | error.

    The token that stopped an answer (end of sequence, or one of stop_token_ids) is not among `token_ids`: it is no part
    of the text, and is neither counted nor billed. So the last emission of a "stop" may hold no token.
    """

    id: int
    token_ids: list[int] = []
    finish: str = ""
    cached_tokens: int = 0  # prompt tokens found in the prefix cache; told with the first emission
    logprobs: list[float] | None = None  # one a token id
    error: str = ""


class Engine(Protocol):
    def describe(self) -> Description: ...

    def free(self) -> Capacity:
        """What could be added now without evicting anybody; cheap, called every step."""

    def add(
        self,
        id: int,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
        emitted_chars: int,
        sampling: Sampling,
    ) -> None:
        """Queue a request; `generated_ids` continue an answer begun elsewhere (they count against max_tokens and for
        penalties, and are not emitted again; `emitted_chars` of their text the client already has, for engines that
        detokenise themselves). ValueError when the prompt does not fit the context: check before."""

    def step(self) -> list[Emission]:
        """Run one engine step and return what it made; a finished request's last emission carries `finish` and its
        slot and KV are free when step returns. Call only while `busy()`."""

    def busy(self) -> bool: ...

    def abort(self, id: int) -> None:
        """Forget a request within the next step; unknown ids are ignored; its last emission has finish "abort"."""

    def close(self) -> None: ...
