"""A batch: its jobs, what it asks of a cluster, and the files that say how each job goes."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..core.errors import Fix, UserError, reason
from ..core.files import read_text, write_text
from ..training.status import TrainingStatus, is_alive, now

FOLDER = "batch"  # beside what the jobs write
FILE = "batch.json"
PREPARE = "prepare"  # the job that computes what the others share
SILENT = 300.0  # seconds without a word after which a job on another machine counts as lost
NAME = re.compile(r"[^\w.-]+")

Executor = Literal["local", "slurm", "manual"]
State = Literal["waiting", "running", "done", "failed", "stopped", "lost"]


class Job(BaseModel, frozen=True):
    """One job: a command line of this program."""

    name: str
    arguments: tuple[str, ...]  # after the program's name
    output: str = ""
    status: Path | None = None  # a training's status file
    state: Path | None = None  # a training's saved state; once this job has written it, it goes on from there


class Cluster(BaseModel):
    """What a job asks of the cluster. ``None`` leaves it to the estimate, else to the cluster."""

    partition: str | None = None
    memory_gb: float | None = Field(None, gt=0)
    minutes: int | None = Field(None, gt=0)
    cpus: int | None = Field(None, gt=0)
    gpus: int | None = Field(None, ge=0)
    parallelism: int | None = Field(None, gt=0)  # how many at once
    parameters: dict[str, str] = {}  # of sbatch, as they are

    def filled(self, other: Cluster) -> Cluster:
        """With the values of ``other`` where it has none."""
        own = self.model_dump(exclude_none=True)
        return Cluster(**{**other.model_dump(exclude_none=True), **own})


class Batch(BaseModel):
    """The content of ``batch.json``."""

    version: Literal[1] = 1
    created: str = Field(default_factory=now)
    started_in: str = Field(default_factory=lambda: str(Path.cwd()))  # where the jobs' relative paths are meant
    executor: Executor = "local"
    cluster: Cluster = Cluster()
    jobs: list[Job] = []
    prepare: Job | None = None  # before all others
    finish: Job | None = None  # after all others
    ids: dict[str, str] = {}  # of the jobs that were submitted to a cluster

    @property
    def every(self) -> list[Job]:
        """All jobs, in the order in which they are done."""
        return [*([self.prepare] if self.prepare else []), *self.jobs, *([self.finish] if self.finish else [])]

    def job(self, name: str) -> Job:
        """A job by its name.

        Raises:
            UserError: there is none.
        """
        for job in self.every:
            if job.name == name:
                return job
        raise UserError(f"The batch has no job '{name}'; it has {', '.join(job.name for job in self.jobs[:10])}.")


class Record(BaseModel):
    """How a job goes, as ``<name>.job.json`` in the batch's folder says; written by the process that starts it."""

    state: State = "waiting"
    message: str = ""  # one sentence on how it ended
    fixes: list[Fix] = []
    notes: list[str] = []
    starts: int = 0
    first_start: float = 0.0  # seconds since 1970
    host: str = ""
    pid: int = 0
    pid_started: int | None = None
    started: str = ""  # ISO times
    updated: str = ""
    ended: str = ""

    @property
    def seconds(self) -> float | None:
        """Of the last start, if it has ended."""
        if not (self.started and self.ended):
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)).total_seconds()


class BatchFolder:
    """The folder with a batch's file, records, logs and settings."""

    def __init__(self, output: Path) -> None:
        """``output``: the folder that the jobs write to."""
        self.output = Path(output)
        self.path = self.output / FOLDER

    def log(self, job: Job) -> Path:
        """Where everything is that the job's process prints."""
        return self.path / f"{job.name}.log"

    def settings(self, job: Job | str) -> Path:
        """Where the settings of a job are kept."""
        return self.path / f"{job if isinstance(job, str) else job.name}.settings.yaml"

    def record_path(self, job: Job) -> Path:
        return self.path / f"{job.name}.job.json"

    @property
    def file(self) -> Path:
        return self.path / FILE

    def read(self) -> Batch:
        """The batch.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if not self.file.is_file():
            raise UserError(f"{self.output} holds no batch: there is no {self.file}.")
        try:
            return Batch.model_validate_json(read_text(self.file))
        except (OSError, ValueError, ValidationError) as error:
            raise UserError(f"{self.file} is damaged ({reason(error)}); submit the batch again.") from error

    def write(self, batch: Batch) -> None:
        """Write the batch's file."""
        write_text(self.file, batch.model_dump_json(indent=1) + "\n")

    def record(self, job: Job) -> Record:
        """How a job goes: waiting without a file, and lost if its process is gone without a word."""
        try:
            record = Record.model_validate_json(read_text(self.record_path(job)))
        except (OSError, ValueError, ValidationError):
            return Record()
        if record.state == "running" and not self._is_alive(record):
            record.state, record.message = "lost", "Its process is gone; it can be started again."
        return record

    @staticmethod
    def _is_alive(record: Record) -> bool:
        if record.host != socket.gethostname():
            return age(record.updated) < SILENT
        return is_alive(TrainingStatus(pid=record.pid, pid_started=record.pid_started, updated=record.updated))

    def write_record(self, job: Job, record: Record) -> None:
        """Write a job's record."""
        record.updated = now()
        write_text(self.record_path(job), record.model_dump_json(indent=1) + "\n")

    def unfinished(self, batch: Batch) -> list[Job]:
        """The jobs that are neither done nor running, the last one of the batch included."""
        jobs = [*batch.jobs, *([batch.finish] if batch.finish else [])]
        return [job for job in jobs if self.record(job).state not in {"done", "running"}]


def age(moment: str) -> float:
    """Seconds since an ISO time; endless for none."""
    try:
        return time.time() - datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return float("inf")


def job_name(text: str) -> str:
    """A text as a job's name, which is a file's too."""
    return NAME.sub("-", text).strip("-.") or "job"


def parse_cluster(pairs: Sequence[str], parallelism: int | None = None) -> Cluster:
    """``KEY=VALUE`` texts: partition, memory_gb, minutes, cpus, gpus, and any parameter of sbatch.

    Raises:
        UserError: not of that form, or no such number.
    """
    values: dict[str, Any] = {"parameters": {}}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value or "\n" in pair:
            raise UserError(
                f"What a cluster is asked for is written KEY=VALUE, such as partition=gpu or minutes=90, not '{pair}'."
            )
        if key in Cluster.model_fields and key not in ("parameters", "parallelism"):
            values[key] = value
        else:
            values["parameters"][key.replace("-", "_")] = value
    if parallelism:
        values["parallelism"] = parallelism
    try:
        return Cluster(**values)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": ("",), "msg": str(error)}
        raise UserError(f"The cluster's {first['loc'][0]}={values.get(first['loc'][0])}: {first['msg']}.") from error
