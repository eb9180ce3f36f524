"""A training of the queue on disk: ``jobs/<id>/`` with its record, settings, status and log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from ..config.settings import build, read_yaml
from ..config.train import TrainConfig
from ..core.errors import USE, UserError
from ..core.files import read_text, write_text
from .sentences import in_app, rendered
from .workspace import STAGES, Workspace, duration, visible

if TYPE_CHECKING:
    from ..training.status import TrainingStatus

State = Literal["waiting", "running", "paused", "stopped", "done", "failed"]
LOG_LIMIT = 1_000_000  # bytes; of a longer log the end is kept
LOG_KEPT = 64_000
FRESH = 120.0  # seconds
FULL = 2_000_000  # bytes below which a disk counts as full
STAGE_TEXTS = {  # of the stages before the first step
    "": "starting",
    "prior images": "preparing, prior images",
    "predict": "preparing, targets of the prior images",
    "encode": "preparing, your photos",
}


class Record(BaseModel):
    """The queue's record of a job, ``job.json``. Everything else is in the status that the training writes."""

    concept: str
    preset: str = ""
    steps: int = 0
    state: State = "waiting"
    wish: Literal["", "pause", "stop"] = ""  # requested of a running job
    place: float = 0.0  # order in the queue; the lowest is next
    created: float = 0.0  # seconds since the epoch, as the next
    launched: float = 0.0
    launches: int = 0
    kept: bool = False  # whether the adapter that it replaces is in the trash
    pid: int = 0
    pid_started: int | None = None  # detects a reused pid
    message: str = ""
    executor: Literal["local", "slurm"] = "local"  # where it runs: in a process of this computer, or on the cluster
    cluster: list[str] = []  # what is asked of the cluster: partition=gpu, minutes=90, …
    place_in_cluster: str = ""  # how it goes there, as text


@dataclass(frozen=True)
class QueueJob:
    """A job's folder and its record."""

    folder: Path
    record: Record

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def settings(self) -> Path:
        """The resolved settings."""
        return self.folder / "job.yaml"

    @property
    def log(self) -> Path:
        """The training's output."""
        return self.folder / "log.txt"

    @property
    def status_file(self) -> Path:
        return self.folder / "status.json"

    @cached_property
    def status(self) -> TrainingStatus | None:
        """The training's own status; None if there is none, or it is unreadable."""
        if not self.status_file.is_file():
            return None
        from ..training.status import read_status  # imports torch, which an empty page does not need

        return read_status(self.status_file)

    @property
    def own_status(self) -> TrainingStatus | None:
        """The status, if it is of the last launch and not of an earlier one."""
        return self.status if self.status and 0 < self.status.pid == self.record.pid else None

    @property
    def alive(self) -> bool:
        """Whether the process of the last launch is alive."""
        from ..training.status import TrainingStatus, is_alive

        updated = self.status.updated if self.status else ""
        return self.record.pid > 0 and is_alive(
            TrainingStatus(pid=self.record.pid, pid_started=self.record.pid_started, updated=updated)
        )

    @property
    def active(self) -> bool:
        """Whether it runs, or will."""
        return self.record.state in {"waiting", "running", "paused"}

    @property
    def fresh(self) -> bool:
        """Whether its status is at most a few minutes old."""
        try:
            return self.status_file.stat().st_mtime > time.time() - FRESH
        except OSError:
            return False

    def output(self, adapters: Path) -> Path:
        """The adapter that it writes."""
        return adapters / f"{self.record.concept}.safetensors"

    @property
    def steps_done(self) -> int:
        """The number of finished training steps."""
        if self.status is None:
            return 0
        done = self.status.curve[-1][0] if self.status.curve else 0
        return max(done, self.status.step) if self.status.stage == "train" else done

    def config(self) -> TrainConfig:
        """The settings.

        Raises:
            UserError: the file is damaged.
        """
        return build(TrainConfig, read_yaml(self.settings), file=self.settings.name)

    def write(self, **changes: Any) -> QueueJob:
        """The job with a changed record, which is written.

        Raises:
            UserError: it cannot be.
        """
        record = self.record.model_copy(update=changes)
        write_text(self.folder / "job.json", record.model_dump_json(indent=1) + "\n")
        return QueueJob(self.folder, record)

    def as_json(self) -> dict[str, Any]:
        """The job as JSON for clients of the API."""
        status, record = self.status, self.record
        running = record.state == "running" and status is not None
        return {
            "id": self.id,
            "concept": record.concept,
            "preset": record.preset,
            "state": record.state,
            "wish": record.wish,
            "stage": status.stage if status and running else "",
            "step": self.steps_done,
            "steps": record.steps,
            "loss": status.loss if status else None,
            "eta": status.eta if status and running else None,
            "message": record.message,
            "adapter": record.concept if record.state == "done" else None,
            "executor": record.executor,
        }

    def line(self) -> str:
        """The job's state in one line."""
        record, status = self.record, self.status
        if record.state == "running" and record.wish:
            return "pausing …" if record.wish == "pause" else "stopping …"
        if record.state == "running":
            if record.executor == "slurm" and (status is None or record.place_in_cluster.startswith("waits")):
                return record.place_in_cluster or "submitted to the cluster"
            if status is None or (status.pid != record.pid and record.executor == "local"):
                return "starting"
            if status.stage != "train":
                text = STAGE_TEXTS.get(status.stage) or STAGES.get(status.stage, status.stage).lower()
                return f"{text}: {status.step} of {status.steps}" if status.steps else text
            left = f", {duration(status.eta)} left" if status.eta is not None else ""
            return f"step {status.step} of {status.steps}{left}"
        if record.state in {"paused", "stopped", "failed"} and self.steps_done:
            return f"{record.state} at step {self.steps_done} of {record.steps}"
        return record.state


def read_job(folder: Path) -> QueueJob:
    """Read a job; one with a damaged record counts as failed, with a message."""
    try:
        return QueueJob(folder, Record.model_validate_json(read_text(folder / "job.json")))
    except (OSError, ValueError, ValidationError):
        _, _, concept = folder.name.partition("_")
        message = "Its file job.json is missing or damaged, so it cannot go on; remove it and train again."
        return QueueJob(folder, Record(concept=concept or folder.name, state="failed", message=message))


def refuse_busy(workspace: Workspace, name: str) -> None:
    """Refuse to change a concept that is in training or queued.

    Raises:
        UserError: it is.
    """
    jobs = [read_job(folder).record for folder in visible(workspace.jobs) if folder.is_dir()]
    if any(job.concept == name and job.state in {"waiting", "running"} for job in jobs):
        raise UserError(f"'{name}' is in training or waits for it; stop that in step 2 first.")


def moving(jobs: Iterable[QueueJob]) -> bool:
    """Whether a job runs, or waits without a paused one before it."""
    jobs = list(jobs)
    states = {job.record.state for job in jobs}
    blocked = any(job.record.state == "paused" and job.record.executor == "local" for job in jobs)
    return "running" in states or ("waiting" in states and not blocked)


def how_it_ended(job: QueueJob, workspace: Workspace) -> dict[str, Any]:
    """The record's changes for a job whose process has ended: its state and a message."""
    from ..training.run import state_path

    output, record, status = job.output(workspace.adapters), job.record, job.own_status
    state = state_path(output)
    unwritten = status is None or status.state == "lost"  # the final status is missing
    if unwritten and output.exists() and output.stat().st_mtime >= record.launched and not state.exists():
        return {"state": "done", "message": ""}  # only the final status is missing
    goes_on = "Resume goes on from its last state" if state.exists() else "Resume begins anew"
    if status and status.state == "done":
        return {"state": "done", "message": ""}
    if record.wish or (status and status.state == "stopped"):
        return {"state": "paused" if record.wish == "pause" else "stopped", "message": f"{goes_on}."}
    if status and not unwritten:
        return {"state": "failed", "message": in_app(rendered(UserError(status.message, *status.fixes)), workspace)}
    if error := last_error(job.log):
        return {"state": "failed", "message": in_app(error, workspace)}
    if shutil.disk_usage(job.folder).free < FULL:
        reason = "The disk is full; free some space"
        return {"state": "failed", "message": f"{reason}, then {goes_on}."}
    reason = "The training's process ended without a message (killed, or out of memory)"
    if status is None and job.status_file.exists() and job.status is None:
        reason += ", and its status file is damaged"
    return {"state": "failed", "message": f"{reason}; {goes_on}."}


def trim(log: Path) -> None:
    """Cut a long log to its end; processes that append to it continue after that."""
    if not log.is_file() or log.stat().st_size <= LOG_LIMIT:
        return
    with log.open("r+b") as file:
        file.seek(-LOG_KEPT, 2)
        kept = file.read()
        file.seek(0)
        file.truncate()
        file.write(kept[kept.find(b"\n") + 1 :])


def last_error(log: Path) -> str:
    """The last error in a log without its fixes, which are for the command line; empty if there is none."""
    if not log.is_file():
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4000))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    message = next((line.removeprefix("Error: ") for line in reversed(lines) if line.startswith("Error: ")), "")
    return message.partition(f" {USE} ")[0]
