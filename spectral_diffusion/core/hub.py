"""What the Hugging Face hub's client says, as one plain clause."""

from __future__ import annotations

from .errors import reason


def hub_problem(error: Exception) -> str:
    """Why something of the hub was refused, for the end of a sentence; never with a token in it."""
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if name == "GatedRepoError":
        return "it is gated; accept its terms on its page, and log in with 'hf auth login'"
    if name == "RepositoryNotFoundError" or status == 404:
        return "there is none by this name, or it is private and you are not logged in ('hf auth login')"
    if status in (401, 403) or name == "LocalTokenNotFoundError":
        return "the hub refuses this login; log in with 'hf auth login' and a token that may write"
    if name == "HFValidationError":
        return "this is no name of the hub; it is user/name in letters, digits, '-', '_' and '.'"
    if name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError"):
        return "the hub cannot be reached"
    return reason(error)
