"""Long work that streams its progress, and that one user can stop without stopping another's."""

from __future__ import annotations

import queue
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
    """The running work by browser tab: an event each that asks the run to stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def begin(self, who: str) -> None:
        """Register a new run, which may have to wait for its turn."""
        with self._lock:
            self._stops.pop(who, None)
            self._stops[who] = threading.Event()
            while len(self._stops) > MOST_RUNS:
                self._stops.pop(next(iter(self._stops)))

    def take(self, who: str) -> threading.Event:
        """The run's event when its turn comes; a stop requested meanwhile is set already."""
        with self._lock:
            return self._stops.setdefault(who, threading.Event())

    def end(self, who: str, stop: threading.Event) -> None:
        """Remove a finished run."""
        with self._lock:
            if self._stops.get(who) is stop:
                del self._stops[who]

    def busy(self, who: str) -> bool:
        """Whether this tab has a run."""
        with self._lock:
            return who in self._stops

    def stop(self, who: str) -> bool:
        """Ask this tab's run to stop; False if there is none."""
        with self._lock:
            if who in self._stops:
                self._stops[who].set()
            return who in self._stops
