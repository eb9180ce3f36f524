"""The workspace's trash: what was deleted or replaced is kept for a month, then deleted for good."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.files import folder_size
from .disk import disk_errors_as_sentence
from .workspace import Workspace, visible

DAYS = 30
STAMP = "%Y%m%d-%H%M%S"  # how the folders of the trash begin


@dataclass(frozen=True)
class Trash:
    """The deletions that can be undone: how many, and their bytes."""

    count: int
    size: int

    def line(self) -> str:
        """What the page says of it; empty for an empty trash."""
        if not self.count:
            return ""
        things = "1 deletion" if self.count == 1 else f"{self.count} deletions"
        return f"Trash: {things}, {_megabytes(self.size)}. Each is deleted for good after {DAYS} days."


def contents(workspace: Workspace) -> Trash:
    """The trash as it is now."""
    folders = visible(workspace.trash)
    return Trash(len(folders), sum(folder_size(folder) for folder in folders))


def discard(workspace: Workspace, what: str, paths: Iterable[Path]) -> Path:
    """Move files or folders into a new folder of the trash, and return that folder.

    Raises:
        UserError: they cannot be moved.
    """
    with disk_errors_as_sentence(".trash"):
        workspace.trash.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime(STAMP)
        folder = Path(tempfile.mkdtemp(prefix=f"{stamp}-{what}-", dir=workspace.trash))
        for path in paths:
            if path.exists() or path.is_symlink():
                path.rename(folder / path.name)
    return folder


def keep(workspace: Workspace, what: str, paths: Iterable[Path]) -> Path:
    """Keep what is about to be replaced: a copy of it in a new folder of the trash, which is returned.

    Raises:
        UserError: it cannot be copied.
    """
    with disk_errors_as_sentence(".trash"):
        folder = discard(workspace, what, [])
        try:
            for path in paths:
                if path.is_dir():
                    shutil.copytree(path, folder / path.name, copy_function=_link)
                elif path.exists():
                    _link(path, folder / path.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, which is replaced and never written in place; copy it where the disk cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def empty(workspace: Workspace, older_than: float = DAYS, now: float | None = None) -> str:
    """Delete for good what was deleted more than ``older_than`` days ago.

    Returns:
        A sentence, or nothing if there was nothing to delete.
    """
    moment = time.time() if now is None else now
    count = size = kept = 0
    for folder in visible(workspace.trash):
        deleted = _deleted_at(folder)
        if older_than and (deleted is None or moment - deleted < older_than * 86400):
            continue  # what bears no time was not put here by the app, and goes only when everything does
        bytes_of_it = folder_size(folder)
        with suppress(OSError):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        if folder.exists():
            kept += 1
            continue
        count, size = count + 1, size + bytes_of_it
    sentences = []
    if count:
        things = "1 deletion" if count == 1 else f"{count} deletions"
        aged = f" of more than {older_than:g} days ago" if older_than else ""
        sentences.append(f"Emptied the trash: {things}{aged}, {_megabytes(size)}.")
    if kept:
        sentences.append(f"{kept} in it cannot be deleted; look at the folder .trash of the workspace.")
    return " ".join(sentences)


def _deleted_at(folder: Path) -> float | None:
    """When the app put something into the trash, in seconds since the epoch, as its name says; None for other names."""
    try:
        return time.mktime(time.strptime("-".join(folder.name.split("-")[:2]), STAMP))
    except (ValueError, OverflowError):
        return None


def _megabytes(size: int) -> str:
    return f"{max(1, round(size / 1e6))} MB"
