"""What the Hugging Face hub's client says, as one plain clause; and names on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import reason

PREFIX = "hub:"  # of a photo folder that is a dataset there
ANSWERED = 400  # from this HTTP status on, the hub was reached and refused
NAME = r"(?!\.{1,2}(?:/|@|$))[\w.-]+"  # a user's, or of something of theirs; never . or ..


def is_repository(name: str) -> bool:
    """Whether a text is ``user/name``."""
    return re.fullmatch(f"{NAME}/{NAME}", name) is not None


def is_dataset(folder: Path) -> bool:
    """Whether a photo folder is one on the hub."""
    return Path(folder).as_posix().startswith(PREFIX)


def is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked at all."""
    if (getattr(getattr(error, "response", None), "status_code", None) or 0) >= ANSWERED:
        return False
    names = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError"}
    return bool(names & {kind.__name__ for kind in type(error).__mro__})


def hub_problem(error: Exception) -> str:
    """Why something of the hub was refused, for the end of a sentence; never with a login in it."""
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if name == "GatedRepoError":
        return "it is gated; accept its terms on its page, and log in with 'hf auth login'"
    if name == "RevisionNotFoundError":
        return "it has no such revision"
    if name in ("RemoteEntryNotFoundError", "EntryNotFoundError"):
        return "it is there, but not the file that is looked for"
    if name == "RepositoryNotFoundError" or status == 404:
        return "there is none by this name, or it is private and you are not logged in ('hf auth login')"
    if status in (401, 403) or name == "LocalTokenNotFoundError":
        return "the hub refuses this login; log in with 'hf auth login' and a token that may write"
    if name == "HFValidationError":
        return "this is no name of the hub; it is user/name in letters, digits, '-', '_' and '.'"
    if is_unreachable(error):
        return "the hub cannot be reached"
    return re.sub(r"(Bearer\s+|hf_)[^\s'\"\\]+", r"\1…", reason(error))
