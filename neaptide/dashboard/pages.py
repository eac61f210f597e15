"""The page's files: read once, hashed, compressed when first asked for. No client's path is looked up on the disk."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

UI = Path(__file__).with_name("ui")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
INLINE = re.compile(r'<script type="importmap">(.*?)</script>', re.S)


class File:
    """One file as it is served."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.type = TYPES[path.suffix]
        self.etag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @functools.cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.content, 6, mtime=0)

    def answer(self, request: Request) -> Response:
        """The file, or 304 for a browser that still has it."""
        told = {"etag": self.etag, "cache-control": "no-cache", "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=told)
        content = self.content
        if "gzip" in request.headers.get("accept-encoding", ""):
            content = self.compressed
            told["content-encoding"] = "gzip"
        return Response(content, headers={**told, "content-type": self.type})


def files() -> dict[str, File]:
    """Below /ui/: every file of the page but the two documents, which have rules of their own."""
    found = (p for p in sorted(UI.rglob("*")) if p.suffix in TYPES and p.suffix != ".html")
    return {p.relative_to(UI).as_posix(): File(p) for p in found if p.name != "vendor.json"}


def policy(page: bytes) -> str:
    """The content security policy of `page`: our own files, and its one import map by its hash."""
    (inline,) = INLINE.findall(page.decode())
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    return (
        f"default-src 'self'; script-src 'self' 'sha256-{digest}'; img-src 'self' data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
