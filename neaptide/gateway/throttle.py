"""What the door asks of limits: may it come in, what has it produced, it is over. Their words are here; what counts is
in gateway/quota.py, where it is counted in gateway/counters.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from neaptide.errors import RequestError
from neaptide.gateway import quota
from neaptide.gateway.counters import ROWS, Counters
from neaptide.gateway.quota import SUM, Bounds, Bucket, Cells, Limit, Permit, Refusal
from neaptide.table import KeyRow
from neaptide.types import Usage

if TYPE_CHECKING:
    from neaptide.gateway.call import Call
    from neaptide.gateway.exchange import Exchange

DEAD_S = 1.0  # how often gateways that are gone are looked for
WORDS: dict[Limit, str] = {
    "rpm": "requests a minute (rpm)",
    "tpm": "tokens a minute (tpm)",
    "concurrency": "requests at once (concurrency)",
}
_HEADERS = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %ds\r\n"


class LimitError(RequestError):
    """429, with the limits that `lines` of the answer's head tell."""

    def __init__(self, message: str, fix: str, wait_s: float, lines: bytes = b"") -> None:
        super().__init__(429, message, slug="rate_limit_exceeded", fix=fix, retry_after_s=wait_s)
        self.lines = lines


class Throttle:
    """The limits of all keys of a gateway."""

    __slots__ = ("_bounds", "_looked_s", "counters")

    def __init__(self, counters: Counters | None = None) -> None:
        self.counters = counters or Counters()
        self._bounds: dict[str, Bounds] = {}  # by key, as of the table in force
        self._looked_s = 0.0

    def renew(self) -> None:
        """There is a new table: keys may have other limits."""
        self._bounds.clear()

    def admit(self, key: KeyRow, call: Call, now: float) -> Permit:
        """Count a request of a key that has limits; LimitError where one has no room."""
        counters = self.counters
        prompt = 0 if call.route == "tokenize" else call.size
        with counters as cells:
            bounds = self._bounds.get(key.id) or self._look_up(key, now)
            for id, at in bounds.rows:
                if cells[at] != id:  # it was idle, and is somebody else's now
                    bounds = self._look_up(key, now)
                    break
            found = quota.admit(cells, bounds, counters.seat, counters.seats, prompt, now)
            lines = _lines(cells, bounds, now)
        if isinstance(found, Refusal):
            _refuse(found, key, lines)
        found.lines = lines
        return found

    def settle(self, permit: Permit, usage: Usage, begun: bool, now: float) -> None:
        """Its request is over. `begun`: a replica has had it."""
        counters, prompt = self.counters, usage.prompt_tokens
        with counters as cells:
            if not begun and usage.outcome != "aborted":
                quota.give_back(cells, permit, counters.seat, now)
                return
            if begun and not prompt and usage.outcome in ("ok", "aborted"):
                prompt = permit.prompt  # nobody has told
            quota.settle(cells, permit, counters.seat, prompt, usage.output_tokens, now)

    def sweep(self, live: Iterable[Exchange], now: float) -> None:
        """Count what running requests have produced."""
        counters = self.counters
        due = [(e.permit, e.tokens) for e in live if e.permit is not None and e.tokens > e.permit.output]
        if due:
            with counters as cells:
                for permit, tokens in due:
                    quota.produced(cells, permit, tokens, now)
        if now - self._looked_s >= DEAD_S:
            self._looked_s = now
            counters.free_dead()

    def _look_up(self, key: KeyRow, now: float) -> Bounds:
        found = []
        for limits in key.quotas:
            id = self.counters.id_of(f"{limits.of}:{key.id if limits.of == 'key' else key.tenant}")
            at = self.counters.row(id, now)
            if at is None:
                message = f"More than {ROWS} keys with limits are in use here at once."
                raise LimitError(message, "Try again in a minute.", quota.SECONDS)
            found.append(Bucket(limits, id, at))
        bounds = self._bounds[key.id] = Bounds(found)
        return bounds


def _refuse(found: Refusal, key: KeyRow, lines: bytes) -> NoReturn:
    whose = "This API key has" if found.of == "key" else f"The tenant '{key.tenant}' has"
    message = f"{whose} reached its limit of {found.value} {WORDS[found.limit]}."
    raise LimitError(message, f"Try again in {math.ceil(found.wait_s)} s, or later.", found.wait_s, lines)


def _lines(cells: Cells, bounds: Bounds, now: float) -> bytes:
    """OpenAI's header lines, of the limits with least room."""
    lines = b""
    for name, windows in ((b"requests", bounds.requests), (b"tokens", bounds.tokens)):
        if windows:
            at, limit, _ = windows[0] if len(windows) == 1 else min(windows, key=lambda w: w.limit - cells[w.at + SUM])
            room, empty_s = quota.left(cells, at, limit, now)
            lines += _HEADERS % (name, limit, name, room, name, math.ceil(empty_s))
    return lines
