"""Bodies on their way in: counted while they are held, read into prompts, the long ones in threads.

The tokenizer releases the GIL, so a prompt of a megabyte that takes a second does not stall the streams beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from neaptide.engine import refusals
from neaptide.engine.prompt import Model, Prepared, encode, prepare
from neaptide.engine.protocol import Description
from neaptide.errors import RequestError
from neaptide.link import OpenHeader
from neaptide.wire.parse import Abilities, Generation, Tokenization, parse_chat, parse_completion, parse_tokenize

LONG_BODY_BYTES = 16 * 1024  # tokenising this takes about a millisecond; longer goes to a thread
MAX_HELD_BYTES = 64 << 20  # bodies of open requests, all together
MAX_BODY_BYTES = 16 << 20
THREADS = 2
ROUTES = ("chat.completions", "completions", "tokenize")


class Read(NamedTuple):
    """What a body asked for. `prepared` is None for a Tokenization, whose whole answer `ids` are."""

    asked: Generation | Tokenization
    ids: list[int]
    prepared: Prepared | None


class Intake:
    """`preparing` counts the bodies that are in a thread now."""

    def __init__(self, model: Model, description: Description, max_tokens_default: int) -> None:
        self.model, self.description = model, description
        self._max_tokens_default = max_tokens_default
        self.preparing = 0
        self._can = Abilities(description.logprobs, description.json_schema)
        self._threads = ThreadPoolExecutor(THREADS, "prepare")

    def read(self, opened: OpenHeader, body: bytes) -> Read:
        """RequestError for what cannot be served."""
        if opened.route == "tokenize":
            asked = parse_tokenize(body)
            return Read(asked, encode(self.model, asked.prompt), None)
        parse = parse_chat if opened.route == "chat.completions" else parse_completion
        generation = parse(body, self._can)
        prepared = prepare(self.model, self.description, generation, self._max_tokens_default)
        return Read(generation, prepared.prompt_ids, prepared)

    def read_elsewhere(self, opened: OpenHeader, body: bytes, then: Callable[[asyncio.Future[Read]], None]) -> None:
        """`read` in a thread; `then` is called in the loop with the outcome."""

        def done(future: asyncio.Future[Read]) -> None:
            self.preparing -= 1
            if not future.cancelled():
                future.exception()  # whoever began the request may have left: an error that nobody asks for is no news
                then(future)

        self.preparing += 1
        asyncio.get_running_loop().run_in_executor(self._threads, self.read, opened, body).add_done_callback(done)

    def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Held:
    """Bytes of bodies that the process holds; bounded, whatever comes."""

    def __init__(self) -> None:
        self.bytes = 0

    def reserve(self, count: int) -> RequestError | None:
        """Count a body that is about to be read; the error when it may not be."""
        if count > MAX_BODY_BYTES:
            return refusals.body_too_large(count, MAX_BODY_BYTES)
        if self.bytes + count > MAX_HELD_BYTES:
            return refusals.full("The replica holds as many bytes of requests as it may.")
        self.bytes += count
        return None

    def release(self, count: int) -> None:
        self.bytes -= count
