"""Accepting connections that speak TLS: each handshake with the context in force, and so many at once, so long each.

Whoever says plain HTTP is told so. Past the bound the oldest handshake gives way: an honest one needs a round trip, so
whoever fills the places with silence loses them first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable

import msgspec

from neaptide.errors import RequestError

log = logging.getLogger("neaptide.tls")

HANDSHAKE_S = 10.0
HALF_OPEN = 1024
GOODBYE_S = 5.0  # to take leave of TLS; what was answered has been written by then
ACCEPTS = 64  # at most in one turn of the loop
PAUSE_S = 1.0  # when the process has no descriptor left, and between two log lines
HANDSHAKE = b"\x16"  # the first byte of TLS
PLAIN = RequestError(400, "This port speaks TLS, and plain HTTP came.", slug="plain_http", fix="Write https://.")


class TlsListener:
    """Makes a protocol by `factory` for each connection whose handshake `context()` could finish. `failed` counts the
    others, by reason."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        context: Callable[[], ssl.SSLContext],
        *,
        handshake_s: float = HANDSHAKE_S,
        half_open: int = HALF_OPEN,
    ) -> None:
        """Owns `sock`, which listens."""
        self._loop, self._sock, self._factory, self._context = loop, sock, factory, context
        self._handshake_s, self._half_open = handshake_s, half_open
        self._shaking: dict[asyncio.Task[None], None] = {}  # oldest first
        self._quiet_until_s = 0.0
        self.failed: Counter[str] = Counter()
        sock.setblocking(False)
        self._listen()

    def close(self) -> None:
        """No more connections; those that are made go on."""
        self._loop.remove_reader(self._sock)
        for task in self._shaking:
            task.cancel()
        self._sock.close()

    @property
    def half_open(self) -> int:
        return len(self._shaking)

    def _listen(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                log.error("no connection can be taken: %s", e.strerror or e)
                self._loop.remove_reader(self._sock)
                self._loop.call_later(PAUSE_S, self._listen)
                return
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if len(self._shaking) >= self._half_open:
            oldest = next(iter(self._shaking))
            del self._shaking[oldest]
            oldest.cancel()
            self.failed["crowded_out"] += 1
        task = self._loop.create_task(self._shake(sock))
        self._shaking[task] = None
        task.add_done_callback(lambda done: self._shaking.pop(done, None))

    async def _shake(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._handshake_s):
                if await self._is_tls(sock):
                    await self._loop.connect_accepted_socket(
                        self._factory, sock, ssl=self._context(), ssl_handshake_timeout=2 * self._handshake_s,
                        ssl_shutdown_timeout=GOODBYE_S,
                    )  # fmt: skip
        except TimeoutError:
            self.failed["timeout"] += 1
        except OSError as e:  # ssl.SSLError is one
            self._failed(e)

    async def _is_tls(self, sock: socket.socket) -> bool:
        """Look at the first byte. Where it is not TLS the socket is answered, and closed."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            first = await self._first_byte(sock)
            if first == HANDSHAKE:
                return True
            self.failed["plain_http" if first.isalpha() else "broken_off"] += 1
            if first.isalpha():
                with contextlib.suppress(OSError):
                    sock.recv(1 << 16)  # closing with bytes unread would reset the connection, and the answer with it
                    sock.send(_PLAIN_ANSWER)
                    sock.shutdown(socket.SHUT_WR)
        except BaseException:
            sock.close()
            raise
        sock.close()
        return False

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """b"" when the other side has closed."""
        while True:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                return sock.recv(1, socket.MSG_PEEK)
            readable = asyncio.Event()
            self._loop.add_reader(sock, readable.set)
            try:
                await readable.wait()
            finally:
                self._loop.remove_reader(sock)

    def _failed(self, error: OSError) -> None:
        reason = why_failed(error)
        self.failed[reason] += 1
        if reason != "broken_off" and self._loop.time() >= self._quiet_until_s:
            self._quiet_until_s = self._loop.time() + PAUSE_S
            log.info("a TLS handshake failed: %s (%s)", reason, getattr(error, "verify_message", "") or error)


def why_failed(error: OSError) -> str:
    """A word for why a client's handshake failed; one of few, for a metric."""
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "client_certificate_invalid"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "client_certificate_absent"
    if "ALERT" in reason:
        return "refused_by_client"
    if reason in ("UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER", "WRONG_VERSION_NUMBER", "VERSION_TOO_LOW"):
        return "nothing_in_common"
    return "not_tls" if isinstance(error, ssl.SSLError) else "broken_off"


def _plain_answer() -> bytes:
    body = msgspec.json.encode(PLAIN.body())
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


_PLAIN_ANSWER = _plain_answer()
