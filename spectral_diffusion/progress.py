"""Progress without printing: library code calls back, the command line or the UI shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """One step of a long job: ``done`` of ``total``, with a few figures to show."""

    stage: str
    done: int
    total: int
    figures: dict[str, Any] = field(default_factory=dict)


class Progress(Protocol):
    """Called after every step of a long job."""

    def __call__(self, event: Event, /) -> None: ...


def silent(event: Event, /) -> None:
    """Show nothing."""
