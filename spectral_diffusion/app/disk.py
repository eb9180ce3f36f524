"""Failed writes as sentences: a full disk is the user's to free."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import UserError

FREE = "free some space there"
REMEDIES = {  # by the system's number of the error
    errno.ENOSPC: FREE,
    errno.EDQUOT: FREE,
    errno.EFBIG: FREE,
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "start the app with a workspace on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class NotWritable(UserError):
    """A folder of the workspace cannot be written."""


def unwritten(where: str, why: str, number: int | None) -> NotWritable:
    """What to say of a folder of the workspace that cannot be written; ``number`` is the system's of the error."""
    remedy = REMEDIES.get(number or 0, "look at what is in its place")
    return NotWritable(f"Cannot write to the workspace's folder {where}: {why}; {remedy}.")


@contextmanager
def disk_errors_as_sentence(where: str) -> Iterator[None]:
    """Turn a failed write into an error message for the app.

    Raises:
        NotWritable: a file cannot be written.
    """
    try:
        yield
    except NotWritable:  # of another folder, which it names
        raise
    except (UserError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise unwritten(where, cause.strerror or str(cause), cause.errno) from error
