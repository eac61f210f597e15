"""The playground's way to the gateway: one POST on a connection of its own, its answer passed on as it comes.

The browser needs no other origin and never sees the API key. Closing the answer closes the connection, and the gateway
then aborts the request.
"""

from __future__ import annotations

import asyncio
import ssl
import urllib.parse
from collections.abc import AsyncIterator

import httptools

from neaptide.errors import UnreachableError

CONNECT_S = 5.0
HEAD_S = 930.0  # a little more than the gateway lets an answer take
READ = 1 << 16


class Answer:
    """A gateway's answer: status and headers at once, the body by `pieces`. Close it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._headed = self._whole = False
        self.status = 0
        self.headers: dict[str, str] = {}

    # what the parser calls
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status, self._headed = self._parser.get_status_code(), True

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._whole = True

    async def head(self) -> None:
        """Read until status and headers are known."""
        while not self._headed:
            if not await self._read():
                raise _unreachable("it closed the connection before it answered")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; an answer that breaks off just ends."""
        try:
            while True:
                for piece in self._pieces:
                    yield piece
                self._pieces.clear()
                if self._whole or not await self._read():
                    return
        finally:
            self.close()

    async def _read(self) -> bool:
        try:
            data = await self._reader.read(READ)
            if data:
                self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as e:
            raise _unreachable(str(e)) from e
        return bool(data)

    def close(self) -> None:
        self._writer.close()


async def post(api_url: str, path: str, body: bytes, key: str, tls: ssl.SSLContext | None = None) -> Answer:
    """POST {api_url}{path} as JSON; `tls` for https. UnreachableError E404 when no gateway answers."""
    url = urllib.parse.urlsplit(api_url)
    connecting = asyncio.open_connection(url.hostname, url.port, ssl=tls)
    try:
        reader, writer = await asyncio.wait_for(connecting, CONNECT_S)
    except (OSError, TimeoutError) as e:
        raise _unreachable(str(e) or "it did not answer in time") from e
    answer = Answer(reader, writer)
    head = (
        f"POST {url.path}{path} HTTP/1.1\r\nhost: {url.netloc}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode("latin-1") + body)
        await asyncio.wait_for(answer.head(), HEAD_S)
    except BaseException as e:
        answer.close()
        if isinstance(e, TimeoutError):
            raise _unreachable("it did not answer in time") from e
        raise
    return answer


def _unreachable(why: str) -> UnreachableError:
    return UnreachableError("the gateway does not answer", why=why, fix="neaptide status", code="E404")
