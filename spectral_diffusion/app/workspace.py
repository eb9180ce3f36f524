"""The one folder that the app writes to, and the rules by which names lead into it."""

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
    "generate": "Drawing",
    "watch": "Seeing what each concept does",
    "lesson": "Drawing what each concept is alone",
    "teach": "Teaching",
}


@dataclass(frozen=True)
class Workspace:
    """The folder's parts; each is made when something is first written there."""

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
        """What trainings give, ``<concept>.safetensors``, and the ledger of slots."""
        return self.root / "adapters"

    @property
    def fused(self) -> Path:
        """Checkpoints that hold several concepts."""
        return self.root / "fused"

    @property
    def pictures(self) -> Path:
        """What was drawn. The only part that is served as files."""
        return self.root / "pictures"

    @property
    def trash(self) -> Path:
        """What was deleted: a folder per deletion, for a person to look into."""
        return self.root / ".trash"


def safe_name(text: str | None, what: str = "name") -> str:
    """A name that can be a file's name and nothing else.

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
    """Look a name up rather than build a path from it, so that no name leads out of the workspace.

    Raises:
        UserError: there is none of that name; the sentence says what there is, and ``otherwise`` what to do.
    """
    if not isinstance(name, str) or name not in known:
        known_text = f"there are {', '.join(known)}" if known else "there are none yet"
        raise UserError(f"No {what} '{str(name)[:60]}'{nearest(str(name), known)}: {known_text}; {otherwise}.")
    return known[name]


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, without hidden ones and links that lead elsewhere; nothing without a folder.

    Pipes, sockets and devices are left out: reading one may never end.
    """
    if not folder.is_dir():
        return []
    inside = folder.resolve()
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.resolve().is_relative_to(inside) and not is_special(path))


def filled(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were filled in; an empty one leaves the default."""
    return {key: value for key, value in changes.items() if value not in (None, "")}


def sentence_of(error: BaseException) -> str:
    """One sentence for any error; a UserError has its own."""
    if isinstance(error, UserError):
        return rendered(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which no page has to wait for
        return "The GPU has not enough memory for this: choose smaller pictures or fewer at once, or end others."
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return f"Something unexpected went wrong ({reason}); the app goes on, and its console has the details."


class ProgressLine:
    """Turns progress events into a line to show: what is done, the loss, and the time that is left."""

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
    """A time for a person's eyes."""
    return f"about {math.ceil(seconds / 60)} min" if seconds >= 90 else f"{math.ceil(seconds)} s"
