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


def outside_only(model: str) -> RequestError:
    return RequestError(
        403,
        f"This key's data stays inside, and all replicas of '{model}' that could answer are outside.",
        slug="data_class",
        fix="Ask for a model that is served inside; or have a replica inside added, or the key's data class changed.",
        param="model",
    )


def no_revision(model: str, revision: str) -> RequestError:
    return RequestError(
        404,
        f"No replica of '{model}' is of the revision '{revision}'.",
        slug="revision_not_found",
        fix="Leave x-neaptide-revision out, or name one that `neaptide status --json` lists.",
    )


def no_start(why: str) -> RequestError:
    return RequestError(503, f"No replica starts: {why}.", slug="replica_failing", retry_after_s=5.0)
