"""What each path is: the inference routes go to the door, the small pages are answered here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from urllib.parse import unquote_to_bytes

import msgspec

from neaptide.clock import wall_s
from neaptide.errors import RequestError
from neaptide.gateway import admit, answer, metrics
from neaptide.gateway.call import Call
from neaptide.gateway.connection import Connection
from neaptide.gateway.door import Door
from neaptide.gateway.route import UNLIMITED, Target
from neaptide.gateway.secure import Secure
from neaptide.gateway.server import Server
from neaptide.table import Cors, DeploymentRow, KeyRow, Limits

INFERENCE = {
    b"/v1/chat/completions": "chat.completions",
    b"/v1/completions": "completions",
    b"/tokenize": "tokenize",
}
MODELS = b"/v1/models"
OPEN_PAGES = frozenset((b"/health", b"/health/ready", b"/version", b"/metrics"))  # no key needed
_encode = msgspec.json.Encoder().encode

OF_A_REPLICA: tuple[tuple[str, str, Callable[[Target, float], float]], ...] = (
    ("neaptide_replica_in_flight", "Requests in flight from here.", lambda t, _: t.in_flight),
    (
        "neaptide_replica_limit",
        "Requests that may be in flight from here.",
        lambda t, _: t.most if t.most < UNLIMITED else math.inf,
    ),
    ("neaptide_replica_up", "1 when it can be reached.", lambda t, now: float(t.reachable(now))),
    ("neaptide_replica_erring", "1 while it is left out for its errors.", lambda t, _: float(t.erring)),
)


class Routes:
    """The server's Gate."""

    def __init__(self, door: Door, version: str) -> None:
        self.door = door
        self.version = version
        self.server: Server | None = None  # set by whoever assembles
        self.secure: Secure | None = None  # likewise

    def name(self, call: Call) -> None:
        call.name(self.door.ids, wall_s())

    def at_head(self, call: Call, limits: Limits) -> None:
        call.path = path = _path(call.target)
        route = INFERENCE.get(path)
        if call.method == b"OPTIONS" and self._preflight(call):
            return
        if route is None:
            self._judge_page(call, path)
            return
        _check_method(call, b"POST")
        if not self.door.held:
            raise RequestError(503, "The gateway is starting.", slug="starting", retry_after_s=1.0)
        call.keys = self.door.keys
        call.key = key = call.keys.find(call.headers.get(b"authorization"), call.wall_s)
        if key.scopes:
            admit.check_scope(key, admit.SCOPE_OF.get(route, "inference"))
        call.route = route
        coding = call.headers.get(b"content-encoding")
        if coding is not None and coding.lower() != b"identity":
            raise RequestError(
                415,
                "Compressed bodies are not accepted.",
                slug="content_encoding",
                fix="Send it without Content-Encoding.",
            )

    def again(self, call: Call, body: bytes, now: float) -> bool:
        now_wall_s, key = wall_s(), call.key
        if call.keys is not self.door.keys:  # the table has changed since
            return False
        if key is not None and key.expires_wall_s is not None and now_wall_s >= key.expires_wall_s:
            return False
        call.renew(body, now, self.door.ids, now_wall_s)
        return True

    def enter(self, connection: Connection, call: Call, now: float) -> None:
        if call.route and call.key is not None:
            self.door.enter(connection, call, call.key, now)
            return
        status, content_type, body, lines = self._page(call, now)
        connection.answer(call, status, content_type, body, lines)
        self.door.log_access(connection, call, status, now)

    def refuse(self, connection: Connection, call: Call, error: RequestError, now: float) -> None:
        self.door.refuse(connection, call, error, now)
        self.door.log_access(connection, call, error.status, now)

    # --- pages

    def _judge_page(self, call: Call, path: bytes) -> None:
        if path == MODELS or path.startswith(MODELS + b"/"):
            _check_method(call, b"GET, HEAD")
            call.key = self.door.keys.find(call.headers.get(b"authorization"), call.wall_s)
            admit.check_scope(call.key, "models")
            if path != MODELS:
                self._model(call)
        elif path in OPEN_PAGES:
            _check_method(call, b"GET, HEAD")
        else:
            shown = path[:100].decode("latin-1")
            raise RequestError(404, f"Unknown path {shown!r}.", slug="unknown_path", fix="The API is under /v1.")

    def _page(self, call: Call, now: float) -> tuple[int, bytes, bytes, bytes]:
        """(status, content type, body, header lines)"""
        path = call.path
        if call.method == b"OPTIONS":
            return 204, b"text/plain", b"", PREFLIGHT
        if path == MODELS:
            rows = [_model_object(row, name) for row, name in self._models(call.key)]
            return 200, answer.JSON, _encode({"object": "list", "data": rows}), b""
        if path.startswith(MODELS):
            return 200, answer.JSON, _encode(self._model(call)), b""
        if path == b"/metrics":
            return 200, metrics.CONTENT_TYPE, self.door.metrics.render(self._gauges(now)), b""
        if path == b"/version":
            return 200, answer.JSON, _encode({"version": self.version}), b""
        if path == b"/health/ready" and not self.door.held:
            return 503, answer.JSON, _encode({"status": "starting"}), b"retry-after: 1\r\n"
        return 200, answer.JSON, _encode({"status": "ready" if self.door.held else "starting"}), b""

    def _models(self, key: KeyRow | None) -> Iterator[tuple[DeploymentRow, str]]:
        """The deployments that `key` may use, and their aliases."""
        for lane in self.door.lanes.values():
            if key is None or not key.models or lane.row.model in key.models:
                for name in (lane.row.model, *lane.row.aliases):
                    yield lane.row, name

    def _model(self, call: Call) -> dict[str, str | int]:
        wanted = unquote_to_bytes(call.path[len(MODELS) + 1 :]).decode("utf-8", "replace")
        for row, name in self._models(call.key):
            if name == wanted:
                return _model_object(row, name)
        raise RequestError(404, f"The model '{wanted[:100]}' does not exist.", slug="model_not_found", param="model")

    def _gauges(self, now: float) -> Iterator[tuple[str, str, str, float]]:
        door, server = self.door, self.server
        lanes = list(door.lanes.items())
        for model, lane in lanes:
            labels = f'model_name="{metrics.escape(model)}"'
            yield "vllm:num_requests_running", "Requests at replicas.", labels, lane.running
        for model, lane in lanes:
            labels = f'model_name="{metrics.escape(model)}"'
            yield "vllm:num_requests_waiting", "Requests waiting in the gateway.", labels, len(lane.line)
        for model, lane in lanes:
            if lane.cache is not None:
                labels = f'model_name="{metrics.escape(model)}"'
                yield "neaptide_cache_bytes", "Answers kept and being recorded.", labels, lane.cache.held_bytes
        for model, lane in lanes:
            if lane.relief is not None:
                labels = f'model_name="{metrics.escape(model)}"'
                yield "neaptide_degrade_steps", "Steps under pressure in force.", labels, lane.relief.level.steps
        for name, text, read in OF_A_REPLICA:
            for target in door.targets.values():  # of a pool under the pool's name, once
                labels = f'model_name="{metrics.escape(target.row.model)}",replica="{metrics.escape(target.row.id)}"'
                yield name, text, labels, read(target, now)
        yield "neaptide_in_flight", "Requests in this gateway.", "", len(door.live)
        if server is not None:
            yield "neaptide_connections", "Client connections.", "", len(server.connections)
            yield "neaptide_body_bytes", "Request bodies held.", "", server.body_bytes
        if self.secure is not None:
            yield from self.secure.gauges(wall_s())
        if door.access is not None:
            yield "neaptide_access_log_dropped", "Access log lines dropped.", "", door.access.dropped

    def _preflight(self, call: Call) -> bool:
        """Is it a browser's preflight from an allowed origin?"""
        cors: Cors = self.door.table.slow.cors
        origin = call.headers.get(b"origin")
        if origin is None or b"access-control-request-method" not in call.headers:
            return False
        return "*" in cors.origins or origin.decode("latin-1") in cors.origins


PREFLIGHT = (
    b"access-control-allow-methods: GET, POST\r\naccess-control-max-age: 600\r\n"
    b"access-control-allow-headers: authorization, content-type, x-request-id, x-neaptide-priority, "
    b"x-neaptide-deadline-ms, x-neaptide-conversation, x-neaptide-revision, x-neaptide-cache, x-neaptide-degrade, "
    b"x-stainless-arch, x-stainless-async, x-stainless-lang, x-stainless-os, "
    b"x-stainless-package-version, x-stainless-read-timeout, x-stainless-retry-count, x-stainless-runtime, "
    b"x-stainless-runtime-version, x-stainless-timeout\r\n"
)


def _path(target: bytes) -> bytes:
    """The path of a request target, the absolute form included."""
    if not target.startswith(b"/") and b"://" in target[:12]:
        target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
    return target.partition(b"?")[0]


def _check_method(call: Call, allowed: bytes) -> None:
    if call.method not in allowed.split(b", "):
        call.allow = allowed
        method = call.method.decode("latin-1")
        raise RequestError(405, f"{method} is not allowed here.", slug="method_not_allowed")


def _model_object(row: DeploymentRow, name: str) -> dict[str, str | int]:
    return {"id": name, "object": "model", "created": row.created_s, "owned_by": row.owned_by}
