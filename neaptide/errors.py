"""One exception tree; every error says what happened, why, and what to type next.

NeaptideError                 what, why, fix; code E###, exit_code for the CLI, status and type for HTTP
 ├─ ConfigError        E1xx   neaptide.yaml, environment, ports, state directory          exit 2
 ├─ ModelError         E2xx   a model's source, files, conversion, engine                  exit 1
 ├─ ProcessError       E3xx   a process of ours that did not start, answer or stop          exit 1
 ├─ UnreachableError   E4xx   no server where one was expected                              exit 3
 ├─ StorageError       E5xx   disk full, journal or ledger unreadable                       exit 1
 └─ RequestError       E6xx   a request refused: carries the OpenAI fields                  exit 4
"""

from __future__ import annotations

# What decoding a stranger's bytes may raise: msgspec follows nesting on the C stack, and says so by the second.
UNREADABLE = (ValueError, RecursionError)


class NeaptideError(Exception):
    """`what` happened (with the value), `why` (what was expected), `fix` (what to type). `code` is stable: E104."""

    code = "E000"
    exit_code = 1
    status = 500

    def __init__(self, what: str, *, why: str = "", fix: str = "", code: str | None = None) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        lines += [f"  why  {self.why}"] if self.why else []
        lines += [f"  fix  {self.fix}"] if self.fix else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        """For --json: the same words, as fields."""
        return {"code": self.code, "what": self.what, "why": self.why, "fix": self.fix}


class ConfigError(NeaptideError):
    code, exit_code, status = "E100", 2, 400


class ModelError(NeaptideError):
    code, exit_code, status = "E200", 1, 503


class ProcessError(NeaptideError):
    code, exit_code, status = "E300", 1, 503


class UnreachableError(NeaptideError):
    code, exit_code, status = "E400", 3, 502


class StorageError(NeaptideError):
    code, exit_code, status = "E500", 1, 507


class RequestError(NeaptideError):
    """A refused request. The HTTP answer is `{"error": {message, type, param, code}}` with `status` and, where one
    helps, Retry-After. `slug` is OpenAI's `code` (machine-readable, e.g. `context_length_exceeded`)."""

    code, exit_code = "E600", 4

    def __init__(
        self,
        status: int,
        message: str,
        *,
        slug: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
        fix: str = "",
    ) -> None:
        super().__init__(message, fix=fix)
        self.status, self.slug, self.param, self.retry_after_s = status, slug, param, retry_after_s
        self.kind = kind or KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object; the fix, where there is one, is part of the message."""
        message = f"{self.what} {self.fix}".strip()
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.slug}}


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
