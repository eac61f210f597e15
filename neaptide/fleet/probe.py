"""Asking a replica over HTTP how it is: one short request, bounded in time and bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from neaptide.link import short_path

MOST = 1 << 20


async def get(socket_path: Path, target: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """(HTTP status, body); (0, b"") when nobody answers in time."""
    return await ask(socket_path, "GET", target, timeout_s=timeout_s)


async def ask(
    socket_path: Path, method: str, target: str, *, token: str = "", body: bytes = b"", timeout_s: float = 2.0
) -> tuple[int, bytes]:
    """As `get`, with a method, a body and the boot token, where they are wanted."""
    if not _is_bound(socket_path):
        return 0, b""
    head = f"{method} {target} HTTP/1.1\r\nHost: replica\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token else ""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(short_path(socket_path))
            try:
                writer.write(f"{head}\r\n".encode() + body)
                answer = await reader.read(MOST)
                while chunk := await reader.read(MOST - len(answer)):
                    answer += chunk
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    said, _, content = answer.partition(b"\r\n\r\n")
    status = said[9:12]
    return (int(status), content) if status.isdigit() else (0, b"")


def _is_bound(socket_path: Path) -> bool:
    """A look is far cheaper than a connection that fails: a hundred replicas may be starting at once."""
    return socket_path.exists()
