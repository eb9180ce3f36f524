"""Failed writes as sentences: a full disk is the user's to free."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import UserError

REMEDIES = {  # by the system's number of the error
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "start the app with a workspace on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def unwritten(where: str, why: str, number: int | None) -> UserError:
    """What to say of a folder of the workspace that cannot be written; ``number`` is the system's of the error."""
    remedy = REMEDIES.get(number or errno.ENOSPC, "free some space there")
    return UserError(f"Cannot write to the workspace's folder {where}: {why}; {remedy}.")


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
        raise unwritten(where, cause.strerror or str(cause), cause.errno) from error
