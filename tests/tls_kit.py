"""Certificates for tests, made by our own authority; dates, names and keys as a test wants them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neaptide.clock import wall_s
from neaptide.tls import ca
from neaptide.tls.settings import ListenTls

DAY_S = 86_400.0
HOST = {"dns": ("localhost",), "ips": ("127.0.0.1",), "server": True}


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, for this process and the ones it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class House:
    """One authority in a folder."""

    def __init__(self, folder: Path, days_ago: float = 0.0) -> None:
        self.folder = folder
        self.ca = str(ca.init(folder, "test authority", wall_s() - days_ago * DAY_S))

    def issue(self, name: str, *, days_ago: float = 0.0, renew: bool = False, **wish: Any) -> ca.Issued:
        """A pair, for this host as a server unless `wish` says otherwise."""
        return ca.issue(self.folder, name, ca.Wish(**(wish or HOST)), wall_s() - days_ago * DAY_S, renew)

    def listen(self, name: str = "gateway", **fields: Any) -> ListenTls:
        """TLS of a listener with a fresh pair."""
        made = self.issue(name)
        return ListenTls(cert=made.cert, key=made.key, **fields)

    def mutual(self, auth: str = "required") -> ListenTls:
        return self.listen(client_ca=self.ca, client_auth=auth)

    def client(self, pair: ca.Issued | None = None) -> ssl.SSLContext:
        """Trusts this authority; shows `pair`."""
        context = ssl.create_default_context(cafile=self.ca)
        if pair is not None:
            context.load_cert_chain(pair.cert, pair.key)
        return context
