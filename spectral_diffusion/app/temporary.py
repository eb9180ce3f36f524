"""The folder of one run of the app: what is uploaded and shown goes through it, and nobody else may read it."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.files import cannot_write

UPLOADS = ".uploads"  # of a workspace
VARIABLE = "GRADIO_TEMP_DIR"  # where gradio asks for its folder, again and again; by default all users share one


def choose_folder(workspace: Path) -> None:
    """Let gradio keep its files in the workspace, unless the person or an app of this process chose a folder before."""
    os.environ.setdefault(VARIABLE, str(workspace / UPLOADS / secrets.token_hex(8)))


def prepare_folder() -> None:
    """Make the chosen folder, for its owner only, and take away those of runs that were killed.

    Raises:
        UserError: the workspace cannot be written.
    """
    folder = Path(os.environ[VARIABLE])
    if folder.parent.name != UPLOADS:  # a person's own choice
        return
    try:
        _lock(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


@cache
def _lock(folder: Path) -> FileLock:
    """The lock of a folder, which is held as long as this process lives: all its apps share the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.parent.chmod(0o700)
    for old in folder.parent.glob("*.lock"):
        _clear(old.with_suffix(""))
    lock = FileLock(folder.with_suffix(".lock"))
    lock.acquire()
    atexit.register(_remove, folder, lock)
    return lock


def _clear(folder: Path) -> None:
    """Take away the folder of a run that goes on no more."""
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    with suppress(Timeout, OSError):
        lock.acquire()
        _remove(folder, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    folder.with_suffix(".lock").unlink(missing_ok=True)
