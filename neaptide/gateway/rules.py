"""What a request's head must be beyond what the parser already refuses. Pure."""

from __future__ import annotations

from neaptide.errors import RequestError
from neaptide.gateway.call import Call
from neaptide.table import Cors, Limits

HEADERS_AT_MOST = 100
ONCE = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"content-encoding", b"expect"))


def framing_error(call: Call, version: str, limits: Limits) -> RequestError | None:
    """What llhttp lets pass and we do not."""
    headers = call.headers
    if version not in ("1.1", "1.0"):
        return RequestError(505, f"HTTP/{version} is not served here.", slug="http_version")
    if call.head_bytes > limits.header_bytes or len(headers) > HEADERS_AT_MOST:
        return too_large_head(limits)
    if call.http11 and not headers.get(b"host"):
        return RequestError(400, "The Host header is missing.", slug="bad_http")
    coding = headers.get(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or b"content-length" in headers or not call.http11):
        return RequestError(400, "Transfer-Encoding must be chunked, alone and in HTTP/1.1.", slug="bad_http")
    expect = headers.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        return RequestError(417, "Only `Expect: 100-continue` is served.", slug="expectation")
    return None


def cors_lines(call: Call, cors: Cors) -> bytes:
    origin = call.headers.get(b"origin")
    if origin is None or not ("*" in cors.origins or origin.decode("latin-1") in cors.origins):
        return b"vary: origin\r\n"
    return (
        b"access-control-allow-origin: %b\r\nvary: origin\r\n"
        b"access-control-expose-headers: x-request-id, x-neaptide-request-id, x-neaptide-cache, x-neaptide-degraded, "
        b"age, retry-after, "
        b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
        b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens\r\n" % origin
    )


def too_large_head(limits: Limits) -> RequestError:
    return RequestError(
        431, f"The head exceeds {limits.header_bytes} bytes or {HEADERS_AT_MOST} headers.", slug="head_too_large"
    )


def too_large_body(limits: Limits) -> RequestError:
    return RequestError(413, f"The body exceeds {limits.body_bytes} bytes.", slug="body_too_large")
