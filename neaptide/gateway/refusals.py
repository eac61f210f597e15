"""What the door says no with, whoever asks."""

from __future__ import annotations

from neaptide.errors import RequestError


def no_longer_served() -> RequestError:
    return RequestError(404, "The model is no longer served.", slug="model_not_found", param="model")


def unknown_model(model: str) -> RequestError:
    return RequestError(
        404,
        f"The model '{model}' does not exist.",
        slug="model_not_found",
        param="model",
        fix="GET /v1/models lists those that do.",
    )


def disk_full(disk: str) -> RequestError:
    return RequestError(
        507, f"The disk is full, so usage cannot be recorded: {disk}.", slug="disk_full", kind="api_error"
    )
