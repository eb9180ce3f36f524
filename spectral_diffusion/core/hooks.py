"""Callbacks of long jobs. Library code calls them; the command line or the app shows the events."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from .errors import Cancelled


@dataclass(frozen=True)
class Event:
    """One step of a long job: ``done`` of ``total``, with a few figures to show."""

    stage: str
    done: int
    total: int
    metrics: dict[str, Any] = field(default_factory=dict)


class Progress(Protocol):
    """Called after every step of a long job."""

    def __call__(self, event: Event, /) -> None: ...


class Pace:
    """Seconds of a step: the median of the last ones, so that a single slow step changes little."""

    def __init__(self, window: int = 32) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._before: tuple[int, float] | None = None

    def add(self, done: int, now: float) -> None:
        """Take note that ``done`` steps are made at the time ``now`` in seconds."""
        if self._before is not None and done == self._before[0]:
            return  # a caller may report more often than once per step
        if self._before is not None and done > self._before[0]:
            self._recent.append((now - self._before[1]) / (done - self._before[0]))
        self._before = (done, now)

    @property
    def seconds_per_step(self) -> float | None:
        """None before the second step."""
        return median(self._recent) if self._recent else None


def brief_duration(seconds: float) -> str:
    """A time for a person's eyes: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def silent(event: Event, /) -> None:
    """Show nothing."""


def ignore(text: str) -> None:
    """Drop a message."""


def never() -> bool:
    """Do not stop."""
    return False


@dataclass(frozen=True)
class Hooks:
    """The callbacks of a long job.

    Attributes:
        progress: called after every step.
        notify: called with a sentence that the user should read.
        should_stop: called between steps; the job then saves what it has and raises :class:`.errors.Cancelled`.
    """

    progress: Progress = silent
    notify: Callable[[str], None] = ignore
    should_stop: Callable[[], bool] = never

    def step(self, stage: str, done: int, total: int, **metrics: Any) -> None:
        """Report that ``done`` of ``total`` steps of a stage are done."""
        self.progress(Event(stage, done, total, metrics))

    def raise_if_stopped(self, message: str = "Stopped.") -> None:
        """End the job here if a stop is requested.

        Raises:
            Cancelled: it is.
        """
        if self.should_stop():
            raise Cancelled(message)


QUIET = Hooks()  # says nothing, never stops
