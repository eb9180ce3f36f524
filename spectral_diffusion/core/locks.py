"""Locks between processes, also on file systems that several machines share.

A lock is one of the operating system (flock) where the file system has such locks. Where it has none, or where the
variable ``SPECTRAL_DIFFUSION_LOCKS`` is ``lease``, it is a claim: a file that its owner keeps refreshing, and that
others take over when they have seen it unchanged for a minute. A network file system that is mounted with local locks
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


class ProcessLock:
    """A lock that one process has at a time."""

    def __init__(self, path: Path) -> None:
        """Make it, free as yet.

        Raises:
            UserError: the variable says neither flock nor lease.
        """
        from filelock import FileLock

        kind = os.environ.get(VARIABLE, "flock")
        if kind not in ("flock", "lease"):
            raise UserError(f"{VARIABLE} is flock or lease, not '{kind}'.")
        self.path = path
        self.is_claim = kind == "lease"
        self._lock: BaseFileLock = self._claim() if self.is_claim else FileLock(path, fallback_to_soft=False)

    def _claim(self) -> BaseFileLock:
        from filelock import SoftFileLease

        return SoftFileLease(f"{self.path}.lease", lease_duration=LEASE)

    def acquire(self, timeout: float) -> None:
        """Take it.

        Args:
            timeout: seconds to wait; a claim is waited for as long as an abandoned one takes to be noticed, at least.

        Raises:
            filelock.Timeout: another process has it still.
            OSError: it cannot be made.
        """
        if not self.is_claim:
            try:
                self._lock.acquire(timeout=timeout)
                return
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            self.is_claim, self._lock = True, self._claim()
        self._lock.acquire(timeout=max(timeout, LEASE * 1.2))

    def release(self) -> None:
        """Free it."""
        self._lock.release()


@contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Keep the lock file ``path`` locked. The log names a lock that is waited for longer than a moment.

    Raises:
        UserError: another process has it still after ``timeout`` seconds.
        OSError: it cannot be made.
    """
    from filelock import Timeout

    lock = ProcessLock(path)
    try:
        lock.acquire(min(PATIENCE, timeout))
    except Timeout:
        log.warning("Waiting for another process, which holds %s.", path)
        try:
            lock.acquire(max(0.0, timeout - PATIENCE))
        except Timeout as error:
            raise UserError(
                f"Another process has locked {path} for {timeout:.0f} seconds; end it if it hangs or is stopped, then "
                "try again."
            ) from error
    try:
        yield
    finally:
        lock.release()
