"""Several concepts, each trained by a process of its own into one folder: side by side, and resumable."""

from __future__ import annotations

import os
import subprocess
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.settings import to_yaml
from ..config.train import TrainConfig
from ..core.errors import Cancelled, Fix, UserError
from ..core.files import write_text
from ..core.hooks import QUIET, Event, Hooks
from ..data.folder import describe
from .output import is_done
from .status import read_status, status_path

PAUSE = 0.1  # seconds between two looks at the processes

Command = Callable[["BatchJob", Path], Sequence[str]]  # a job and its settings file to the words of a process
Process = subprocess.Popen[bytes]


@dataclass
class BatchJob:
    """One concept of a batch."""

    config: TrainConfig
    state: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    message: str = ""
    fixes: Sequence[Fix] = ()

    @property
    def output(self) -> Path:
        return self.config.output

    @property
    def name(self) -> str:
        return self.output.stem

    @property
    def log(self) -> Path:
        """Where the process's own words go."""
        return self.output.with_name(f"{self.name}.log")


def batch_jobs(folders: Sequence[Path], output: Path, settings: Callable[[Path, Path], TrainConfig]) -> list[BatchJob]:
    """A job per photo folder, writing ``<output>/<folder's name>.safetensors``.

    Args:
        settings: a photo folder and its output to the settings.

    Raises:
        UserError: two folders of one name or token, or an output that is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; several concepts go into a folder.", Fix("output", so="to name one"))
    names = [unicodedata.normalize("NFC", folder.resolve().name) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two of the folders are called '{name}', and their adapters would be too; rename one.")
    jobs = [
        BatchJob(settings(folder, output / f"{name}.safetensors")) for folder, name in zip(folders, names, strict=True)
    ]
    check_tokens(jobs)
    return jobs


def check_tokens(jobs: Sequence[BatchJob]) -> None:
    """Refuse two concepts whose token is one word, which could never be used together.

    Raises:
        UserError: there are two.
    """
    owners: dict[str, str] = {}
    for job in jobs:
        config = job.config
        try:
            token = describe(config.concept, config.name, config.token, config.class_noun).token
        except UserError:  # what is wrong with one folder is told by its own training
            continue
        owner = owners.setdefault(token.lower(), job.name)
        if owner != job.name:
            raise UserError(
                f"'{owner}' and '{job.name}' have one token, {token}; give one of them another in its concept.yaml "
                "(token: <name>)."
            )


def run_batch(
    jobs: Sequence[BatchJob],
    command: Command,
    side_by_side: int = 1,
    resume: bool = False,
    force: bool = False,
    hooks: Hooks = QUIET,
) -> None:
    """Train all jobs, ``side_by_side`` at once, each with its status file beside its output.

    Slots are given in the order of the jobs, whatever their number at once. A job that fails does not stop the others.

    Args:
        command: what to run for a job; it must keep the status file, and stop with its state saved on SIGTERM.
        resume: leave out what is done, and go on with what was stopped.

    Raises:
        Cancelled: ``should_stop`` said so; the states are saved.
        UserError: some failed, with a sentence of each; or one is being trained by another process.
    """
    for job in jobs:
        status = read_status(status_path(job.output))
        if status and status.state in {"starting", "running"}:
            raise UserError(f"{job.output} is being trained by process {status.pid} already; wait for it or stop it.")
        if resume and is_done(job.config, force):
            job.state = "done"
            hooks.notify(f"{job.name} is done already.")
    BatchRunner(jobs, command, side_by_side, hooks).run()
    raise_unfinished(jobs)


class BatchRunner:
    """Runs the waiting jobs of a batch as processes and records in each job how its process ended."""

    def __init__(self, jobs: Sequence[BatchJob], command: Command, side_by_side: int, hooks: Hooks) -> None:
        self.jobs, self.command, self.side_by_side, self.hooks = jobs, command, side_by_side, hooks
        self.running: list[tuple[BatchJob, Process]] = []
        self.stopping = False

    def run(self) -> None:
        """Start and watch processes until no job waits or runs; an exception terminates them."""
        try:
            while self.running or any(job.state == "waiting" for job in self.jobs):
                if self.hooks.should_stop() and not self.stopping:
                    self.stop()
                self.start_next()
                self.watch()
                time.sleep(PAUSE)
        finally:
            self.terminate()

    def stop(self) -> None:
        """Start no further job, and ask the running ones to save their states."""
        self.stopping = True
        for job in self.jobs:
            if job.state == "waiting":
                job.state = "stopped"
        self.terminate()

    def start_next(self) -> None:
        """Start the first waiting job if there is room and every running one has its slot."""
        waiting = next((job for job in self.jobs if job.state == "waiting"), None)
        has_room = len(self.running) < self.side_by_side
        if waiting and has_room and all(has_its_slot(job, process) for job, process in self.running):
            self.running.append((waiting, start(waiting, self.command, self.side_by_side)))
            waiting.state = "running"

    def watch(self) -> None:
        """Report the progress of the running jobs, and the end of those whose process has ended."""
        for job, process in self.running:
            if process.poll() is not None:
                for note in finish(job, process.returncode):
                    self.hooks.notify(f"{job.name}: {note}")
                self.hooks.notify(f"{job.name}: {job.message or job.state}")
            elif (status := read_status(status_path(job.output))) and status.steps:
                metrics = {} if status.loss is None else {"loss": status.loss}
                self.hooks.progress(Event(job.name, status.step, status.steps, metrics))
        self.running = [(job, process) for job, process in self.running if job.state == "running"]

    def terminate(self) -> None:
        """Send SIGTERM to every running process."""
        for _, process in self.running:
            process.terminate()


def raise_unfinished(jobs: Sequence[BatchJob]) -> None:
    """Report the jobs of a batch that are not done.

    Raises:
        Cancelled: some were stopped.
        UserError: some failed.
    """
    done = sum(job.state == "done" for job in jobs)
    if any(job.state == "stopped" for job in jobs):
        raise Cancelled(f"Stopped with {done} of {len(jobs)} concepts done; they can be resumed.")
    failed = [job for job in jobs if job.state == "failed"]
    if failed:
        reasons = "; ".join(f"{job.name} ({job.message.rstrip('.')})" for job in failed)
        fixes = dict.fromkeys(fix for job in failed for fix in job.fixes)
        raise UserError(f"{len(failed)} of {len(jobs)} concepts failed, the others are done: {reasons}.", *fixes)


def start(job: BatchJob, command: Command, side_by_side: int) -> Process:
    """Start a job's process; it shares the cores with the others."""
    settings = settings_file(job)
    write_text(settings, to_yaml(job.config))
    environment = dict(os.environ)
    if side_by_side > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // side_by_side)))
    with job.log.open("wb") as log:  # in a session of its own, so that Ctrl-C reaches it through us alone
        return subprocess.Popen(
            command(job, settings), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip


def settings_file(job: BatchJob) -> Path:
    """Where the settings of a running job lie."""
    return job.output.with_name(f".{job.name}.settings.yaml")


def has_its_slot(job: BatchJob, process: Process) -> bool:
    """Whether a process has come so far that it has reserved its slot, or has ended."""
    status = read_status(status_path(job.output))
    return process.poll() is not None or bool(status and status.pid == process.pid and status.state != "starting")


def finish(job: BatchJob, code: int) -> list[str]:
    """Say how a job's process ended, and tidy up after it; returns the notes of a training that is done."""
    status = read_status(status_path(job.output))
    settings_file(job).unlink(missing_ok=True)
    if code == 0:
        job.state, job.message = "done", ""
        job.log.unlink(missing_ok=True)
        return status.notes if status else []
    job.state = "stopped" if status and status.state == "stopped" else "failed"
    lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    if status and status.state != "lost":
        job.message, job.fixes = status.message, status.fixes
    job.message = job.message or (lines[-1] if lines else f"it ended with code {code}")
    return []
