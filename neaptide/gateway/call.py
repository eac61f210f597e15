"""One HTTP request as the server read it: what the head says, the body, and who is asking."""

from __future__ import annotations

from neaptide.errors import RequestError
from neaptide.gateway import ids
from neaptide.gateway.admit import Keys, Terms
from neaptide.table import KeyRow


class Call:
    """Filled by the server while bytes come, by the door at the head's end; read-only after that, until `renew` makes
    it the next call with the same head.

    `close`: the connection ends with the answer. `refusal`: decided at the head; the body, if small, is read and
    dropped so that the connection can stay. `size`: bytes of body held. `allow`: the methods of its path, where its
    own is wrong. `keys`: the keys in force when its head was judged. `terms`: what its head asks, once the door has
    read it.
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
        "keys",
        "method",
        "parts",
        "path",
        "refusal",
        "route",
        "size",
        "target",
        "terms",
        "traceparent",
        "tracestate",
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
        self.keys: Keys | None = None
        self.terms: Terms | None = None
        self.parts: list[bytes] = []
        self.body = b""
        self.size = 0
        self.id = ""
        self.client_id = self.traceparent = self.tracestate = b""

    def name(self, made: ids.Ids, wall_s: float) -> None:
        """Give it its ids: ours, the client's if it is fit to be echoed, and the trace."""
        headers = self.headers
        self.client_id = ids.client_id(headers.get(b"x-request-id"))
        self.tracestate = headers.get(b"tracestate", b"")[:512]
        self.wall_s = wall_s
        self.id = made.next(wall_s)
        self.traceparent = ids.hop(headers.get(b"traceparent"))

    def renew(self, body: bytes, arrived_s: float, made: ids.Ids, wall_s: float) -> None:
        """Become the next call with the same head but for the length of its body: the same object, because what the
        head says, and what was judged by it, stays. Only when its answer is out, so that nobody holds it."""
        self.arrived_s, self.wall_s = arrived_s, wall_s
        self.body = body
        self.size = len(body)
        self.id = made.next(wall_s)
        self.traceparent = ids.hop(self.headers.get(b"traceparent"))

    def id_lines(self) -> bytes:
        """The header lines by which an answer can be found again. A valid traceparent comes back as it came."""
        own, trace = self.id.encode(), self.traceparent
        sent = self.headers.get(b"traceparent")
        if sent is not None and sent[3:35] == trace[3:35]:
            trace = sent
        client = self.client_id or own
        return b"x-request-id: %b\r\nx-neaptide-request-id: %b\r\ntraceparent: %b\r\n" % (client, own, trace)
