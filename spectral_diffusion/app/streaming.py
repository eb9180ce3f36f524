"""Long work that streams its progress, and that one user can stop without stopping another's."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..core.errors import UserError
from ..core.hooks import Event, Progress

News = TypeVar("News")
Result = TypeVar("Result")
MOST_RUNS = 1000  # runs that are remembered; older ones are dropped


def stream(work: Callable[[Callable[[News], None]], Result], stop: threading.Event) -> Iterator[News | Result]:
    """Run ``work(tell)`` in a thread; yields the latest value passed to ``tell``, and the result at the end.

    If the reader leaves early, ``stop`` is set and the thread is joined. An error of the work is raised.
    """
    messages: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()

    def run() -> None:
        try:
            messages.put(("done", work(lambda news: messages.put(("news", news)))))
        except BaseException as error:  # raised in the reader
            messages.put(("failed", error))

    thread = threading.Thread(target=run, daemon=True, name="drawing")
    thread.start()
    try:
        while True:
            kind, item = messages.get()
            while kind == "news" and not messages.empty():  # a slow reader gets the newest
                kind, item = messages.get()
            if kind == "failed":
                raise item  # type: ignore[misc]
            yield item  # type: ignore[misc]
            if kind == "done":
                return
    finally:
        stop.set()
        thread.join()


def cancellable(stop: threading.Event, progress: Progress, message: str) -> Progress:
    """A progress that ends the work at its next step once ``stop`` is set.

    Raises:
        UserError: ``stop`` is set.
    """

    def show(event: Event) -> None:
        if stop.is_set():
            raise UserError(message)
        progress(event)

    return show


class CancelTokens:
    """The runs by browser tab. A run has a ticket from when it is asked for, while it still waits for its turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, tuple[str, threading.Event | None]] = {}  # ticket: tab, and the event once it runs

    def begin(self, who: str) -> str:
        """Register a new run, which may have to wait for its turn; returns its ticket."""
        ticket = secrets.token_hex(8)
        with self._lock:
            self._runs[ticket] = who, None
            while len(self._runs) > MOST_RUNS:
                self._runs.pop(next(iter(self._runs)))
        return ticket

    def take(self, ticket: str | None) -> threading.Event | None:
        """The event of a run whose turn has come; None if it was stopped while it waited."""
        with self._lock:
            if ticket is None or ticket not in self._runs:
                return None
            who, event = self._runs[ticket][0], threading.Event()
            self._runs[ticket] = who, event
            return event

    def end(self, ticket: str | None) -> None:
        """Remove a finished run."""
        with self._lock:
            self._runs.pop(ticket or "", None)

    def busy(self, who: str) -> bool:
        """Whether this tab has a run, also one that waits."""
        with self._lock:
            return any(owner == who for owner, _ in self._runs.values())

    def stop(self, who: str) -> bool:
        """Ask this tab's runs to stop: those that wait are dropped at once. Returns whether one is at work."""
        with self._lock:
            mine = {ticket: event for ticket, (owner, event) in self._runs.items() if owner == who}
            for ticket, event in mine.items():
                if event is None:
                    del self._runs[ticket]
                else:
                    event.set()
            return any(event is not None for event in mine.values())
