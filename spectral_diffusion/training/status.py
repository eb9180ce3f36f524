"""A training's state in a small JSON file that a page, or anybody, may read while it runs and after it has ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..config.settings import Settings
from ..core.errors import Cancelled, Fix, UserError, reason
from ..core.files import read_text, write_text
from ..core.hooks import Event, Pace, Progress, silent

State = Literal["starting", "running", "stopped", "done", "failed", "lost"]
POINTS = 400  # of the curve at most
EVERY = 1.0  # seconds between two writes of the same state
STALE = 3600.0  # seconds without a word after which a process that cannot be looked up counts as gone


class Sample(BaseModel):
    """A sample grid generated after a step."""

    step: int
    file: str


class TrainingStatus(BaseModel):
    """The content of ``status.json``. ``lost`` is never written: :func:`read_status` gives it to a dead run."""

    state: State = "starting"
    stage: str = ""  # of the work: encode, prior images, train …
    step: int = 0  # of the stage
    steps: int = 0
    loss: float | None = None
    curve: list[tuple[int, float]] = []  # step and running mean of the loss
    eta: float | None = None  # seconds left
    started: str = ""  # ISO times
    updated: str = ""
    host: str = ""  # the machine that it runs on
    pid: int = 0
    pid_started: int | None = None  # when the process began, in the system's ticks, so that a reused pid is recognized
    notes: list[str] = []
    samples: list[Sample] = []
    message: str = ""  # one sentence on how it ended
    fixes: list[Fix] = []  # what puts that right; of several, one is enough
    output: str = ""
    config: dict[str, Any] = {}  # resolved settings


def status_path(output: Path) -> Path:
    """The default status file of the run that writes ``output``."""
    return output.with_name(f"{output.stem}.status.json")


def read_status(path: Path) -> TrainingStatus | None:
    """The status of a run, with ``lost`` for one whose process is gone; None if there is no readable file."""
    try:
        status = TrainingStatus.model_validate_json(read_text(path))
    except (OSError, ValueError, ValidationError):
        return None
    if status.state in {"starting", "running"} and not is_alive(status):
        status.state, status.eta = "lost", None
        status.message = "The process is gone; it can be resumed from its last state."
    return status


def is_alive(status: TrainingStatus) -> bool:
    """Whether the process that wrote a status is still there; on another machine, whether it wrote lately."""
    here = status.host in ("", socket.gethostname())
    if here and Path("/proc/self/stat").exists():
        ticks = process_start(status.pid)
        return ticks is not None and status.pid_started in (None, ticks)
    if here and os.name == "posix":  # Windows has no signal 0; there it would be Ctrl-C
        try:
            os.kill(status.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # it exists, but is not ours
    with suppress(ValueError):
        return time.time() - datetime.fromisoformat(status.updated).timestamp() < STALE
    return False


def process_start(pid: int) -> int | None:
    """When a process began, in ticks since the system did; None if it is dead or unknown."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])  # a zombie is dead


def add_point(curve: list[tuple[int, float]], step: int, value: float, stride: int = 1) -> int:
    """Add to a curve of at most :data:`POINTS`; the last point is always there, the others are thinned evenly.

    Returns the ``stride``, the least distance of two points, to give at the next call.
    """
    if len(curve) >= 2 and curve[-1][0] - curve[-2][0] < stride:
        curve.pop()
    curve.append((step, value))
    while len(curve) > POINTS:
        curve[:] = [*curve[:-1:2], curve[-1]]
        stride *= 2
    return stride


def now() -> str:
    """The time in ISO format, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Reporter:
    """Writes a status as a training goes on. Failing to write never stops the training.

    Args:
        path: the file; None writes nothing.
        progress: also called with every event.
        note: also called with every note.
    """

    def __init__(
        self, path: Path | None = None, progress: Progress = silent, note: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path, self._progress, self._note = path, progress, note
        self.status = TrainingStatus(
            started=now(), host=socket.gethostname(), pid=os.getpid(), pid_started=process_start(os.getpid())
        )
        self._stride = 1
        self._pace = Pace()
        self._written = -EVERY

    def begin(self, settings: Settings, output: Path, resume: bool = False) -> None:
        """Say what is trained; a resumed run takes over the curve and the samples of the one before."""
        earlier = read_status(self.path) if resume and self.path else None
        if earlier:
            self.status.curve, self.status.samples = earlier.curve, earlier.samples
        self.status.config, self.status.output = settings.model_dump(mode="json"), str(output)
        self.write()

    def progress(self, event: Event, /) -> None:
        """Take one event of the training and hand it on."""
        status, clock = self.status, time.monotonic()
        fresh = status.state != "running" or status.stage != event.stage
        status.state, status.stage, status.step, status.steps = "running", event.stage, event.done, event.total
        if fresh:
            self._pace = Pace()
        self._pace.add(event.done, clock)
        if event.stage == "train":
            if fresh:  # an earlier run may have gone farther than its last state
                status.curve = [point for point in status.curve if point[0] < event.done]
                status.samples = [sample for sample in status.samples if sample.step < event.done]
            if seconds := self._pace.seconds_per_step:
                status.eta = round(seconds * (event.total - event.done), 1)
            if "loss" in event.metrics:
                status.loss = float(event.metrics["loss"])
                self._stride = add_point(status.curve, event.done, status.loss, self._stride)
            if sample := event.metrics.get("sample"):
                status.samples.append(Sample(step=event.done, file=str(sample)))
                fresh = True
        else:
            status.eta = None
        if fresh or clock - self._written >= EVERY:
            self.write()
        self._progress(event)

    def note(self, text: str) -> None:
        """Take one note and hand it on."""
        self.status.notes.append(text)
        self._note(text)

    def end(self, state: State, message: str = "", fixes: Iterable[Fix] = ()) -> None:
        """Say how it ended."""
        self.status.state, self.status.message, self.status.eta = state, message, None
        self.status.fixes = list(fixes)
        self.write()

    def write(self) -> None:
        """Write the file now, if it can be written."""
        self._written = time.monotonic()
        self.status.updated = now()
        if self.path:
            with suppress(UserError, OSError):
                write_text(self.path, self.status.model_dump_json(indent=1) + "\n")


@contextmanager
def reporting(
    path: Path | None, progress: Progress = silent, note: Callable[[str], None] = lambda text: None
) -> Iterator[Reporter]:
    """A reporter that says how the block ended: done, failed, or stopped (:class:`..core.errors.Cancelled`, Ctrl-C)."""
    reporter = Reporter(path, progress, note)
    try:
        yield reporter
    except (Cancelled, KeyboardInterrupt) as stopped:
        reporter.end("stopped", str(stopped) or "Stopped.")
        raise
    except UserError as error:
        reporter.end("failed", error.message, error.fixes)
        raise
    except BaseException as error:
        reporter.end("failed", f"{type(error).__name__}: {reason(error)}.")
        raise
    reporter.end("done")
