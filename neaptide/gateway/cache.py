"""Which requests are the same, and the answers that are kept for them: a store of bounded bytes. Pure; `now` is given.

One a deployment and gateway process. The bytes of answers that are still being recorded count too, so that the bound
holds whatever is in flight.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from neaptide.gateway.kept import Kept
from neaptide.table import Caching

if TYPE_CHECKING:
    from neaptide.gateway.shared import Flight

ROUTES = frozenset(("chat.completions", "completions"))
# What a client says of itself and of how the answer is to travel: no answer depends on it. `stream` counts apart.
UNTOLD = (
    "user",
    "metadata",
    "safety_identifier",
    "request_id",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
)
MIB = 1 << 20
LARGEST = 64  # an answer of more than one such part of the memory is not kept
ENTRY_BYTES = 600  # what an entry takes beside its answer, roughly

_NOTHING = msgspec.Raw(b"")


class _Heat(msgspec.Struct, gc=False):
    temperature: msgspec.Raw = _NOTHING


_decode_heat = msgspec.json.Decoder(_Heat).decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(order="sorted").encode


def identity(body: bytes, scope: tuple[str, ...], stream: bool, wanted: bool = False) -> bytes | None:
    """The same for two bodies of a scope that are equal as JSON, but for UNTOLD, `stream_options.include_usage` and how
    `stream` is said. None: the answer is chance (no temperature 0) and not `wanted` all the same, or the body cannot be
    read exactly. Numbers are what a double holds; 0 and 0.0 differ."""
    try:
        heat = bytes(_decode_heat(body).temperature)
        if not wanted and (heat[:1] not in b"0-" or not heat or _decode(heat) != 0):
            return None
        read: dict[str, Any] = _decode(body)
        for name in (*UNTOLD, "stream"):
            read.pop(name, None)
        options = read.get("stream_options")
        if isinstance(options, dict):
            options.pop("include_usage", None)
        if not options:
            read.pop("stream_options", None)
        text = _encode((scope, stream, read))
    except (ValueError, OverflowError, RecursionError):
        return None
    return hashlib.blake2b(text, digest_size=32).digest()


class Entry(NamedTuple):
    kept: Kept
    at_s: float  # when its answer ended
    size: int


class Cache:
    """The answers of one deployment, by identity; who was asked for longest ago leaves first."""

    __slots__ = ("_entries", "_held", "flights", "settings")

    def __init__(self, settings: Caching) -> None:
        self.settings = settings
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._held = 0
        self.flights: dict[bytes, Flight] = {}  # answers that are on their way, for whoever asks the same meanwhile

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Of what is kept and of what is being recorded."""
        return self._held

    @property
    def largest(self) -> int:
        """Bytes of an answer that is kept, at most."""
        return self.settings.memory_mib * MIB // LARGEST

    def adopt(self, settings: Caching) -> None:
        """These are in force from now on."""
        self.settings = settings
        self.room(0)

    def find(self, name: bytes, now: float, stale_s: float = 0.0) -> Entry | None:
        """What is kept under `name` and not older than it may be, or than `stale_s` if that is more."""
        entry = self._entries.get(name)
        if entry is None or now - entry.at_s >= max(self.settings.ttl_s, stale_s):
            return None
        self._entries.move_to_end(name)
        return entry

    def keep(self, name: bytes, kept: Kept, now: float) -> bool:
        """Whether there is room for it: not for one that is too large."""
        self.drop(name)
        size = kept.size + ENTRY_BYTES
        if size > self.largest or not self.room(size):
            return False
        self._held += size
        self._entries[name] = Entry(kept, now, size)
        return True

    def drop(self, name: bytes) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._held -= entry.size

    def room(self, size: int) -> bool:
        """Whether so many bytes more fit; entries leave for them."""
        most = self.settings.memory_mib * MIB
        while self._held + size > most and self._entries:
            self.drop(next(iter(self._entries)))
        return self._held + size <= most

    def take(self, size: int) -> bool:
        """Bytes for an answer that is being recorded, if they fit; `give` them back at its end."""
        if not self.room(size):
            return False
        self._held += size
        return True

    def give(self, size: int) -> None:
        self._held -= size
