"""How long pictures and fusions take here: measured each time, kept in the workspace, and shown before the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pydantic import BaseModel, ValidationError

from ..core.errors import UserError
from ..core.files import read_text, write_text
from .workspace import Workspace, duration

FILE = "speeds.json"
SHARE = 0.5  # of the newest measurement in the mean: a computer may be busy one time and idle the next
_LOCK = threading.Lock()


class Speeds(BaseModel):
    """Seconds per unit of each kind of work: ``generate pocket``, ``fuse pocket gradient``."""

    seconds: dict[str, float] = {}


def read(workspace: Workspace) -> Speeds:
    """What was measured; nothing without a readable file."""
    with suppress(OSError, ValueError, ValidationError):
        return Speeds.model_validate_json(read_text(workspace.root / FILE))
    return Speeds()


def expected(workspace: Workspace, kind: str, units: float) -> float | None:
    """The seconds that so much work of a kind will take; None if it was never measured."""
    known = read(workspace).seconds.get(kind)
    return None if known is None else known * units


def remember(workspace: Workspace, kind: str, units: float, seconds: float) -> None:
    """Take a measurement into the mean. An estimate is no reason to fail: a full disk is ignored."""
    if units <= 0 or seconds <= 0:
        return
    with _LOCK:
        speeds = read(workspace)
        known = speeds.seconds.get(kind, seconds / units)
        speeds.seconds[kind] = (1 - SHARE) * known + SHARE * seconds / units
        with suppress(UserError, OSError):
            write_text(workspace.root / FILE, speeds.model_dump_json(indent=1) + "\n")


@contextmanager
def measured(
    workspace: Workspace, kind: str, units: float, now: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Measure the block, if it succeeds."""
    begun = now()
    yield
    remember(workspace, kind, units, now() - begun)


def work_of_pictures(
    steps: float, pictures: float, guidance: float, boxes: int, prompt_inside: float, width: float, height: float
) -> float:
    """The units of pictures: steps × pictures × passes of the network × megapixels.

    Args:
        prompt_inside: the weight of the whole prompt inside boxes; above 0 it is one more pass.
        width, height: in pixels.
    """
    passes = (guidance > 1) + max(1, boxes + (prompt_inside > 0))
    return steps * pictures * passes * width * height / 1e6


def line(seconds: float | None, what: str) -> str:
    """``About 12 s for these pictures, by the last ones here.``"""
    if seconds is None:
        return ""
    text = duration(max(1.0, seconds)).removeprefix("about ")
    return f"About {text} for {what}, by what was measured here."
