"""What a replica says when it cannot serve a request: one place for statuses, slugs and words."""

from __future__ import annotations

from collections.abc import Iterable

from neaptide.errors import RequestError

AGAIN_S = 1.0  # Retry-After


def full(message: str = "The replica's waiting line is full.") -> RequestError:
    return RequestError(429, message, slug="replica_full", retry_after_s=AGAIN_S)


def draining() -> RequestError:
    return _unavailable("The replica is shutting down.", "draining")


def starting() -> RequestError:
    return _unavailable("The replica is still starting.", "starting")


def engine_died(why: str) -> RequestError:
    message = f"The engine process died while this request was open ({why})."
    return RequestError(502, message, slug="engine_died", kind="api_error")


def engine_refused(text: str, began: bool) -> RequestError:
    """The engine ended this request alone; before its first token that is the request's fault."""
    if began:
        return RequestError(502, text[:500], slug="engine_error", kind="api_error")
    return RequestError(400, text[:500], slug="engine_refused")


def deadline_passed() -> RequestError:
    return RequestError(504, "The deadline passed while the request waited in the replica.", slug="deadline_exceeded")


def body_too_large(size: int, most: int) -> RequestError:
    return RequestError(413, f"A body of {size} bytes exceeds {most}.", slug="body_too_large")


def answer_too_large(size: int, most: int) -> RequestError:
    message = f"The answer of {size} bytes exceeds {most}."
    return RequestError(413, message, slug="answer_too_large", fix="Ask for fewer tokens, or stream.")


def impossible_resume() -> RequestError:
    message = "The tokens to continue from are not of this model's vocabulary."
    return RequestError(400, message, slug="impossible_resume")


def unknown_route(route: str) -> RequestError:
    return RequestError(404, f"The route '{route[:64]}' is not served here.", slug="unknown_route")


def unknown_model(model: str) -> RequestError:
    return RequestError(404, f"The model '{model[:64]}' does not exist here.", slug="model_not_found", param="model")


def no_model(served: Iterable[str]) -> RequestError:
    names = ", ".join(served)
    return RequestError(400, f"This replica serves several models ({names}): name one.", slug="no_model", param="model")


def internal(error: Exception) -> RequestError:
    message = f"The replica failed to read the request ({type(error).__name__})."
    return RequestError(500, message, slug="internal_error")


def retryable(error: RequestError) -> bool:
    """Whether another replica may well serve what this one refused before it began."""
    return error.status in (429, 503)


def _unavailable(message: str, slug: str) -> RequestError:
    return RequestError(503, message, slug=slug, kind="service_unavailable", retry_after_s=AGAIN_S)
