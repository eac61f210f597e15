"""One GET over HTTP/1.1 from somebody who may be slow, endless or no web server at all."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import httptools

from neaptide import __version__

PIECE_BYTES = 64 << 10


class FetchError(Exception):
    """Why there is no answer, in a few words."""


class Answer:
    """What httptools (llhttp) calls as it reads."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.whole = self.framed = False  # framed: the head says how long the body is

    def on_header(self, name: bytes, value: bytes) -> None:
        self.framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, piece: bytes) -> None:
        if not self.whole:  # one answer was asked for
            self.body += piece

    def on_message_complete(self) -> None:
        self.whole = True


async def get(url: str, *, timeout_s: float, most_bytes: int) -> bytes:
    """The body of a 200; `timeout_s` is for all of it, `most_bytes` for the head and framing, too. No redirect is
    followed. FetchError."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _get(url, most_bytes)
    except TimeoutError:
        raise FetchError(f"no whole answer within {timeout_s:g} s") from None
    except OSError as e:
        raise FetchError(e.strerror or str(e)) from e
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
        raise FetchError(f"what answers speaks no HTTP ({e})") from e


async def _get(url: str, most_bytes: int) -> bytes:
    at = urlsplit(url)
    tls = at.scheme == "https"
    reader, writer = await asyncio.open_connection(at.hostname, at.port or (443 if tls else 80), ssl=tls or None)
    try:
        writer.write(_head(at.netloc, f"{at.path or '/'}{'?' if at.query else ''}{at.query}"))
        return await _read(reader, most_bytes)
    finally:
        writer.transport.abort()  # nothing more is said, and a close would wait for TLS to be taken leave of


def _head(host: str, target: str) -> bytes:
    lines = (
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        f"User-Agent: neaptide/{__version__}",
        "Accept: text/plain;version=0.0.4",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def _read(reader: asyncio.StreamReader, most_bytes: int) -> bytes:
    answer, came = Answer(), 0
    parser: Any = httptools.HttpResponseParser(answer)
    while not answer.whole and (piece := await reader.read(PIECE_BYTES)):
        came += len(piece)
        if came > most_bytes:
            raise FetchError(f"its answer is longer than {most_bytes} bytes")
        parser.feed_data(piece)
    if not came or (answer.framed and not answer.whole):
        raise FetchError("the connection broke before the answer was whole")
    if (status := parser.get_status_code()) != 200:
        raise FetchError(f"it answers {status}")
    return bytes(answer.body)
