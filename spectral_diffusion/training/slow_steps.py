"""Whether a training's steps have become slow because its threads wait for each other."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

WINDOW = 8  # steps that are judged together
SLOW = 4.0  # times the quickest window


class SlowSteps:
    """Called after every step, it notes once if the last ones took far longer than the quickest of this run.

    It changes nothing by itself: the number of threads decides the last bits of a training.

    Args:
        threads: of this process; one has nothing to wait for.
    """

    def __init__(self, threads: int, note: Callable[[str], None]) -> None:
        self.threads, self.note = threads, note
        self.noted = threads < 2
        self.quickest = float("inf")
        self._last: float | None = None
        self._times: deque[float] = deque(maxlen=WINDOW)

    def step(self, clock: float) -> None:
        """A step has ended at this time, in seconds."""
        if self._last is not None:
            self._times.append(clock - self._last)
        self._last = clock
        if self.noted or len(self._times) < WINDOW:
            return
        now = statistics.median_low(self._times)
        self.quickest = min(self.quickest, now)
        if now > SLOW * self.quickest:
            self.noted = True
            self.note(
                f"Note: steps take {now / self.quickest:.0f} times as long as this run's quickest: on a busy machine "
                f"its {self.threads} threads wait for each other, and OMP_NUM_THREADS=1 is quicker (it can be "
                "stopped and resumed with it; the last bits depend on the number of threads)."
            )
