"""Locks between processes, also on file systems that several machines share.

A lock is one of the operating system (flock) where the file system has such locks. Where it has none, or where the
variable ``SPECTRAL_DIFFUSION_LOCKS`` is ``lease``, it is a claim: a file that its owner keeps refreshing, and that
others take over when it has not been refreshed for a minute. A network file system that is mounted with local locks
(``nolock``, ``local_lock=all``) needs the variable, since its locks seem to work and hold on one machine only.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

VARIABLE = "SPECTRAL_DIFFUSION_LOCKS"
PATIENCE = 5.0  # seconds that a lock is waited for without a word
LEASE = 60.0  # seconds without a refreshment after which a claim is taken over
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def acquired(path: Path, timeout: float) -> BaseFileLock:
    """A lock on ``path``, taken; its ``release`` frees it.

    Raises:
        filelock.Timeout: another process holds it still after ``timeout`` seconds.
        OSError: it cannot be made.
        UserError: the variable says something else.
    """
    from filelock import FileLock, SoftFileLease

    kind = os.environ.get(VARIABLE, "flock")
    if kind not in ("flock", "lease"):
        raise UserError(f"{VARIABLE} is flock or lease, not '{kind}'.")
    if kind == "flock":
        lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(timeout=timeout)
            return lock
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    lease = SoftFileLease(f"{path}.lease", lease_duration=LEASE)
    lease.acquire(timeout=timeout)
    return lease


@contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file ``path``. The log names a lock that is waited for longer than a moment.

    Raises:
        UserError: another process still holds it after ``timeout`` seconds.
        OSError: it cannot be made.
    """
    from filelock import Timeout

    try:
        lock = acquired(path, min(PATIENCE, timeout))
    except Timeout:
        log.warning("Waiting for another process, which holds %s.", path)
        try:
            lock = acquired(path, max(0.0, timeout - PATIENCE))
        except Timeout as error:
            raise UserError(
                f"Another process has locked {path} for {timeout:.0f} seconds; end it if it hangs or is stopped, then "
                "try again."
            ) from error
    try:
        yield
    finally:
        lock.release()
