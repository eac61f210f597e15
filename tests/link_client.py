"""A small blocking client of the link, for tests of both ends: what a gateway says, without a gateway."""

from __future__ import annotations

import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from neaptide import link
from neaptide.link import EndHeader, Frame, FrameReader, Hello, LoadReport, OpenHeader


@dataclass
class Heard:
    """All that came for one stream."""

    ids: list[int] = field(default_factory=list)
    data: bytes = b""
    headers: list[list[str]] = field(default_factory=list)
    frames: int = 0
    end: EndHeader | None = None
    last: bytes = b""

    @property
    def body(self) -> Any:
        return msgspec.json.decode(self.last)

    @property
    def events(self) -> list[Any]:
        """The stream's `data:` payloads, decoded; "[DONE]" as that string."""
        parts = [p for p in (self.data + self.last).split(b"\n\n") if p]
        assert all(p.startswith(b"data: ") for p in parts), parts
        return ["[DONE]" if p == b"data: [DONE]" else msgspec.json.decode(p[6:]) for p in parts]

    @property
    def text(self) -> str:
        choices = [c for e in self.events if e != "[DONE]" for c in e.get("choices", ())]
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


class LinkClient:
    """`wait` reads frames until something holds; what came for streams nobody waits for is kept."""

    def __init__(self, path: str, token: str = "boot", greet: bool = True, timeout_s: float = 20.0) -> None:
        self._timeout_s = timeout_s
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        self._sock.connect(link.short_path(path))
        self._reader = FrameReader()
        self._next = 0
        self.streams: dict[int, Heard] = {}
        self.loads: list[LoadReport] = []
        self.tallies: deque[dict[str, Any]] = deque()
        self.hello: Hello | None = None
        self.closed = False
        if greet:
            self.send(0, link.HELLO, msgspec.json.encode(Hello(token=token, role="gateway", name="test")))
            self.wait(lambda: self.hello is not None or self.closed)

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        self._sock.sendall(link.frame(stream, kind, payload))

    def send_raw(self, data: bytes) -> None:
        self._sock.sendall(data)

    def open(
        self, body: dict[str, Any] | bytes, route: str = "chat.completions", part: int = 1 << 19, **header: Any
    ) -> int:
        """Open a stream; its number. The body goes in frames of `part` bytes."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self._next += 1
        number = self._next
        self.streams[number] = Heard()
        if isinstance(body, dict):
            header.setdefault("stream", bool(body.get("stream")))
            header.setdefault("include_usage", bool((body.get("stream_options") or {}).get("include_usage")))
        header.setdefault("request_id", f"r{number}")
        opened = OpenHeader(route=route, body_bytes=len(raw), **header)
        self.send(number, link.OPEN, link.pack_header(opened, raw[:part]))
        for start in range(part, len(raw), part):
            self.send(number, link.BODY, raw[start : start + part])
        return number

    def call(self, body: dict[str, Any] | bytes, route: str = "chat.completions", **header: Any) -> Heard:
        """Open a stream and wait for its END, giving credit as data comes."""
        return self.finish(self.open(body, route, **header))

    def finish(self, number: int, credit: bool = True) -> Heard:
        heard = self.streams[number]
        given = 0

        def ended() -> bool:
            nonlocal given
            if credit and len(heard.data) - given > link.CREDIT_BYTES // 4:
                self.send(number, link.CREDIT, link.pack_credit(len(heard.data) - given))
                given = len(heard.data)
            return heard.end is not None or self.closed

        self.wait(ended)
        return heard

    def tally(self, *request_ids: str) -> dict[str, Any]:
        self.send(0, link.TALLY, msgspec.json.encode(list(request_ids)))
        self.wait(lambda: self.tallies)
        return self.tallies.popleft()

    def wait(self, condition: Any) -> None:
        """Read frames until `condition()`; AssertionError after the timeout."""
        until = time.monotonic() + self._timeout_s
        while not condition():
            assert time.monotonic() < until, "timed out"
            assert not self.closed, "the replica closed the connection"
            self._read()

    def close(self) -> None:
        self._sock.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            self.closed = True
            return
        for frame in self._reader.feed(data):
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        if frame.type == link.HELLO:
            self.hello = msgspec.json.decode(frame.payload, type=Hello)
        elif frame.type == link.LOAD:
            self.loads.append(msgspec.json.decode(frame.payload, type=LoadReport))
        elif frame.type == link.TALLY:
            self.tallies.append(msgspec.json.decode(frame.payload))
        else:
            self._take_stream(self.streams[frame.stream], frame)

    def _take_stream(self, heard: Heard, frame: Frame) -> None:
        assert heard.end is None, "a frame after END"
        if frame.type == link.TOKEN:
            ids, data = link.split_token(frame.payload)
            heard.ids += ids
            heard.data += data
            heard.frames += 1
        elif frame.type == link.HEADERS:
            heard.headers += msgspec.json.decode(frame.payload)
        elif frame.type == link.END:
            head, heard.last = link.split_header(frame.payload)
            heard.end = msgspec.json.decode(head, type=EndHeader)
        else:
            raise AssertionError(f"unexpected frame type {frame.type}")
