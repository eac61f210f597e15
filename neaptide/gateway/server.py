"""All client connections of a gateway: their limits, their sweep, their end."""

from __future__ import annotations

from neaptide.clock import wall_s
from neaptide.gateway import answer
from neaptide.gateway.connection import Connection, Gate
from neaptide.table import Cors, Limits


class Server:
    """All client connections of a gateway, their limits and their sweep."""

    def __init__(self, gate: Gate, limits: Limits, cors: Cors) -> None:
        self.gate = gate
        self.limits, self.cors = limits, cors
        self.connections: set[Connection] = set()
        self.body_bytes = 0  # request bodies held now
        self.draining = False
        self.mutual = False  # TLS clients show certificates
        self.date = answer.DateLine(wall_s())

    def __call__(self) -> Connection:
        return Connection(self)

    def sweep(self, now: float) -> None:
        """Twice a second: the Date line, and connections that are overdue."""
        self.date.refresh(wall_s())
        for connection in list(self.connections):
            if connection.due_s < now:
                connection.overdue(now)

    def drain(self) -> None:
        """No more requests: idle connections end now, the others with their answer."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()

    def abort(self) -> None:
        for connection in list(self.connections):
            connection.abort()
