"""The workspace, the only folder that the app writes to, and safe look-up of names in it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import UserError, nearest
from ..core.files import is_special
from ..core.hooks import Event
from .sentences import rendered

Value = TypeVar("Value")
STAGES = {
    "spectrum": "Decomposing the base's weights",
    "train": "Training",
    "fuse": "Fusing",
    "generate": "Generating",
    "calibrate": "Recording each concept's activations",
    "teacher images": "Generating the images to distill from",
    "distill": "Distilling",
}


@dataclass(frozen=True)
class Workspace:
    """The workspace's folders; each is made on the first write."""

    root: Path

    @property
    def concepts(self) -> Path:
        """Photo folders, one per concept."""
        return self.root / "concepts"

    @property
    def jobs(self) -> Path:
        """Trainings that wait, run, or ended: a folder each."""
        return self.root / "jobs"

    @property
    def adapters(self) -> Path:
        """Trained adapters, ``<concept>.safetensors``, and the ledger of slots."""
        return self.root / "adapters"

    @property
    def fused(self) -> Path:
        """Checkpoints that hold several concepts."""
        return self.root / "fused"

    @property
    def pictures(self) -> Path:
        """Generated pictures. The only folder that is served as files."""
        return self.root / "pictures"

    @property
    def trash(self) -> Path:
        """Deleted files: a folder per deletion."""
        return self.root / ".trash"


def safe_name(text: str | None, what: str = "name") -> str:
    """Check a name that becomes a file's name.

    Raises:
        UserError: empty, or anything but letters, digits, ``-`` and ``_``.
    """
    name = text.strip() if isinstance(text, str) else ""
    if not name:
        raise UserError(f"The {what} is missing; write a short one such as rex.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise UserError(f"'{name[:60]}' cannot be the {what}; use letters, digits, - and _ only, at most 40.")
    return name


def pick(name: str | None, known: Mapping[str, Value], what: str, otherwise: str) -> Value:
    """Look a name up instead of building a path from it, so that no name leads out of the workspace.

    Raises:
        UserError: there is none of that name; the message lists the known ones, and ``otherwise`` is the remedy.
    """
    if not isinstance(name, str) or name not in known:
        known_text = f"there are {', '.join(known)}" if known else "there are none yet"
        raise UserError(f"No {what} '{str(name)[:60]}'{nearest(str(name), known)}: {known_text}; {otherwise}.")
    return known[name]


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, without hidden ones and links out of it; empty without a folder.

    Pipes, sockets and devices are skipped, since reading one may never end.
    """
    if not folder.is_dir():
        return []
    inside = folder.resolve()
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.resolve().is_relative_to(inside) and not is_special(path))


def filled(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are filled in; an empty one keeps the default."""
    return {key: value for key, value in changes.items() if value not in (None, "")}


def sentence_of(error: BaseException) -> str:
    """One sentence for any error."""
    if isinstance(error, UserError):
        return rendered(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which a page need not wait for
        return "The GPU has not enough memory for this: choose smaller pictures or fewer at once, or end others."
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return f"Something unexpected went wrong ({reason}); the app goes on, and its console has the details."


class ProgressLine:
    """Turns progress events into a line: the stage, the loss, and the remaining time."""

    def __init__(self, show: Callable[[int, int, str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._show, self._now = show, now
        self._stage, self._began, self._first = "", 0.0, 0

    def __call__(self, event: Event) -> None:
        if event.stage != self._stage:
            self._stage, self._began, self._first = event.stage, self._now(), event.done
        text = STAGES.get(event.stage, event.stage)
        if isinstance(loss := event.metrics.get("loss"), float):
            text += f", loss {loss:.4f}"
        steps = event.done - self._first
        if steps > 0 and event.done < event.total:
            left = (self._now() - self._began) / steps * (event.total - event.done)
            text += f", {duration(left)} left"
        self._show(event.done, event.total, text)


def duration(seconds: float) -> str:
    """A duration as text."""
    return f"about {math.ceil(seconds / 60)} min" if seconds >= 90 else f"{math.ceil(seconds)} s"
