"""TLS of this gateway's listener: the certificate in force, its handshakes, and what is told of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

from neaptide.gateway.server import Server
from neaptide.table import CertificateGauge
from neaptide.tls.listen import TlsListener
from neaptide.tls.served import Served
from neaptide.tls.settings import ListenTls


class Secure:
    """Exists where the listener speaks TLS."""

    def __init__(self, tls: ListenTls, told: str = "") -> None:
        """`told` as Served says; ConfigError when the files are no good."""
        self.served = Served(tls, "listen", told)
        self._listener: TlsListener | None = None

    def listen(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, server: Server) -> TlsListener:
        server.mutual = bool(self.served.tls.client_ca)
        self._listener = TlsListener(loop, sock, server, lambda: self.served.context)
        return self._listener

    def gauge(self) -> CertificateGauge:
        served = self.served
        return CertificateGauge(
            subject=served.leaf.subject, not_after_s=served.leaf.not_after_s, refused=served.refused
        )

    def gauges(self, now_s: float) -> Iterator[tuple[str, str, str, float]]:
        """As Metrics.render takes them; `now_s`: wall seconds."""
        served, listener = self.served, self._listener
        yield "neaptide_tls_certificate_days_left", "Until it expires.", "", served.days_left(now_s)
        yield "neaptide_tls_certificate_refused", "1 when a newer one is no good.", "", float(bool(served.refused))
        if listener is not None:
            yield "neaptide_tls_handshakes_open", "Handshakes that have begun.", "", listener.half_open
            for reason, n in listener.failed.items():
                yield "neaptide_tls_handshakes_failed", "Handshakes that failed.", f'reason="{reason}"', n
