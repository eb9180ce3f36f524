"""The folder of one run of the app for uploads and shown files; only its owner can read it."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.files import cannot_write

UPLOADS = ".uploads"  # of a workspace
VARIABLE = "GRADIO_TEMP_DIR"  # gradio reads its folder from here; by default all users share one


def choose_folder(workspace: Path) -> None:
    """Let gradio keep its files in the workspace, unless the user or another app of this process chose a folder."""
    os.environ.setdefault(VARIABLE, str(workspace / UPLOADS / secrets.token_hex(8)))


def prepare_folder() -> None:
    """Make the chosen folder, readable by its owner only, and remove those of killed runs.

    Raises:
        UserError: the workspace cannot be written.
    """
    folder = Path(os.environ[VARIABLE])
    if folder.parent.name != UPLOADS:  # chosen by the user
        return
    try:
        _lock(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def new_file(name: str) -> Path:
    """A file of that name in a new folder, which goes with the app's run."""
    folder = Path(os.environ.get(VARIABLE) or tempfile.gettempdir())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder)) / name


@cache
def _lock(folder: Path) -> FileLock:
    """Acquire a folder's lock until this process ends; all its apps share the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.parent.chmod(0o700)
    for old in folder.parent.glob("*.lock"):
        _clear(old.with_suffix(""))
    lock = FileLock(folder.with_suffix(".lock"))
    lock.acquire()
    atexit.register(_remove, folder, lock)
    return lock


def _clear(folder: Path) -> None:
    """Remove the folder of a run that has ended."""
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    with suppress(Timeout, OSError):
        lock.acquire()
        _remove(folder, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    folder.with_suffix(".lock").unlink(missing_ok=True)
