"""Service, link and echo engine in one process, moved by hand: the engine steps when told to."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from neaptide import link
from neaptide.clock import VirtualClock
from neaptide.engine import pipe
from neaptide.engine.echo import EchoEngine
from neaptide.engine.log import Log
from neaptide.engine.prompt import load_model
from neaptide.engine.serve_link import LinkConnection, LinkServer
from neaptide.engine.service import Service
from neaptide.link import EndHeader, FrameReader
from neaptide.specs import ReplicaSpec
from tests.link_client import Heard


class Wire:
    """A transport that reads what it is given, as a gateway would."""

    def __init__(self) -> None:
        self.reader = FrameReader()
        self.heard: dict[int, Heard] = {}
        self.credit: dict[int, int] = {}
        self.aborted = False

    def write(self, data: bytes) -> None:
        for stream, kind, payload in self.reader.feed(data):
            heard = self.heard.get(stream)
            if stream == 0 or heard is None:
                assert stream == 0
                continue
            assert heard.end is None, "a frame after END"
            if kind == link.TOKEN:
                self.credit[stream] -= len(payload)
                assert self.credit[stream] >= 0, "more than its credit"
                ids, text = link.split_token(payload)
                heard.ids += ids
                heard.data += text
            elif kind == link.END:
                head, heard.last = link.split_header(payload)
                heard.end = msgspec.json.decode(head, type=EndHeader)

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True


class Stage:
    """One replica and its gateways; the engine steps when told to."""

    def __init__(self, max_running: int) -> None:
        settings = {"max_running": max_running, "kv_mib": 1, "context_tokens": 700}
        options = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in settings.items()}
        spec = ReplicaSpec(id="e", epoch=1, model="m", revision="r", engine="echo", token="t", options=options)
        self.engine = EchoEngine(spec, VirtualClock(), lambda s: None)
        self.service = Service(spec, self._send, Log("/dev/null"), stall_s=1e9)
        self.server = LinkServer(self.service, Log("/dev/null"))
        self.service.warm(load_model("echo", ""), self.engine.describe())
        self.service.ready()
        self.gateways: list[tuple[LinkConnection, Wire]] = []
        self.prompts: dict[tuple[int, int], str] = {}

    def _send(self, messages: list[pipe.ToEngine]) -> None:
        for message in messages:
            if isinstance(message, pipe.Add):
                self.engine.add(
                    message.id, message.prompt_ids, message.generated_ids, message.emitted_chars, message.sampling
                )
            elif isinstance(message, pipe.Abort):
                self.engine.abort(message.id)

    def connect(self) -> None:
        connection, wire = self.server.protocol(), Wire()
        connection.connection_made(wire)  # type: ignore[arg-type]
        connection.data_received(link.frame(0, link.HELLO, b'{"token":"t"}'))
        self.gateways.append((connection, wire))

    def open(self, gateway: int, length: int, stream: bool, stop: bool) -> None:
        connection, wire = self.gateways[gateway]
        number = len(wire.heard) + 1
        prompt = f"{gateway}.{number} " + "wörd " * length
        self.prompts[gateway, number] = prompt
        asked: dict[str, Any] = {"prompt": prompt, "stream": stream, "max_tokens": 500, "ignore_eos": True}
        body = json.dumps({**asked, "stop": ["rd w", "zz"]} if stop else asked).encode()
        wire.heard[number], wire.credit[number] = Heard(), link.CREDIT_BYTES
        header = link.OpenHeader(
            request_id=f"{gateway}-{number}", route="completions", body_bytes=len(body), stream=stream
        )
        connection.data_received(link.frame(number, link.OPEN, link.pack_header(header, body[:10])))
        connection.data_received(link.frame(number, link.BODY, body[10:]))

    def to_all(self, gateway: int, kind: int, payload: bytes, every: int) -> None:
        connection, wire = self.gateways[gateway]
        for number in list(wire.heard)[::every]:
            if kind == link.CREDIT:
                wire.credit[number] += link.split_credit(payload)
            connection.data_received(link.frame(number, kind, payload))

    def step(self, times: int) -> None:
        for _ in range(times):
            if self.engine.busy():
                emissions = self.engine.step()
                self.service.stepped(pipe.Stepped(emissions, self.engine.free(), 0.01, len(emissions)))
        self.service.changed()

    def lose(self, gateway: int) -> None:
        self.gateways[gateway][0].connection_lost(None)

    def check(self) -> None:
        for (gateway, number), prompt in self.prompts.items():
            heard = self.gateways[gateway][1].heard[number]
            raw = prompt.encode()
            assert bytes(heard.ids) == (raw * 500)[: len(heard.ids)]
            if heard.end is not None and heard.end.finish in ("stop", "length") and heard.data + heard.last:
                streamed = heard.data != b"" or heard.last.startswith(b"data:")
                text = heard.text if streamed else json.loads(heard.last)["choices"][0]["text"]
                assert (prompt * 500).startswith(text.rstrip("\ufffd"))
                assert "rd w" not in text or len(heard.ids) == heard.end.output_tokens
