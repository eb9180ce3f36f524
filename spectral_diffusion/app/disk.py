"""Failed writes as sentences: a full disk is the user's to free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import UserError


@contextmanager
def disk_errors_as_sentence(where: str) -> Iterator[None]:
    """Turn a failed write into an error message for the app.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        yield
    except (UserError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise UserError(f"Cannot write to the workspace's folder {where}: {reason}; free some space there.") from error
