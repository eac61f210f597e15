"""One HTTP request as the server read it: what the head says, the body, and who is asking."""

from __future__ import annotations

from neaptide.errors import RequestError
from neaptide.gateway import ids
from neaptide.table import KeyRow


class Call:
    """Filled by the server while bytes come, by the door at the head's end; read-only after that.

    `close`: the connection ends with the answer. `refusal`: decided at the head; the body, if small, is read and
    dropped so that the connection can stay. `size`: bytes of body held. `allow`: the methods of its path, where its
    own is wrong.
    """

    __slots__ = (
        "allow",
        "arrived_s",
        "body",
        "client_id",
        "close",
        "head_bytes",
        "headers",
        "http11",
        "id",
        "key",
        "method",
        "parts",
        "path",
        "refusal",
        "route",
        "size",
        "target",
        "traceparent",
        "wall_s",
    )

    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.wall_s = 0.0
        self.method = self.target = self.path = self.allow = b""
        self.headers: dict[bytes, bytes] = {}
        self.head_bytes = 0
        self.http11 = True
        self.close = False
        self.refusal: RequestError | None = None
        self.route = ""
        self.key: KeyRow | None = None
        self.parts: list[bytes] = []
        self.body = b""
        self.size = 0
        self.id = ""
        self.client_id = self.traceparent = b""

    def name(self, made: ids.Ids, wall_s: float) -> None:
        """Give it its ids: ours, the client's if it is fit to be echoed, and the trace."""
        self.wall_s = wall_s
        self.id = made.next(wall_s)
        headers = self.headers
        self.client_id = ids.client_id(headers[b"x-request-id"]) if b"x-request-id" in headers else b""
        self.traceparent = ids.hop(headers.get(b"traceparent"))

    def id_lines(self) -> bytes:
        """The header lines by which an answer can be found again. A valid traceparent comes back as it came."""
        own, trace = self.id.encode(), self.traceparent
        sent = self.headers.get(b"traceparent")
        if sent is not None and sent[3:35] == trace[3:35]:
            trace = sent
        client = self.client_id or own
        return b"x-request-id: %b\r\nx-neaptide-request-id: %b\r\ntraceparent: %b\r\n" % (client, own, trace)

    def again(self, body: bytes, arrived_s: float) -> Call:
        """The next call with the same head but for the length of its body."""
        call = Call.__new__(Call)
        call.arrived_s, call.body, call.key = arrived_s, body, None
        call.size = len(body)
        call.method, call.target, call.path, call.route = self.method, self.target, self.path, self.route
        call.headers, call.head_bytes, call.http11, call.close = self.headers, self.head_bytes, True, False
        call.allow, call.parts, call.refusal = b"", [], None
        return call
