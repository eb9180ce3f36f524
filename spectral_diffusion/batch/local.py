"""The jobs of a batch as processes on this machine, some side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ..core.errors import Cancelled, UserError
from ..core.hooks import QUIET, Event, Hooks
from ..training.status import read_status
from .job import Batch, BatchFolder, Job, Record
from .process import PAUSE, PROGRAM, JobProcess, check_not_running, start


def run_jobs(
    folder: BatchFolder,
    batch: Batch,
    jobs: Sequence[Job],
    side_by_side: int = 1,
    hooks: Hooks = QUIET,
    program: Sequence[str] = PROGRAM,
) -> None:
    """Run jobs in their order, ``side_by_side`` at once. One that fails does not stop the others.

    Args:
        program: the words before a job's own.

    Raises:
        Cancelled: ``hooks.should_stop`` said so; the running ones were asked to save their states. Or another process
            has taken some.
        UserError: some failed, with a sentence of each; or one runs already.
    """
    check_not_running(folder, jobs)
    pool = _Pool(folder, batch, min(side_by_side, max(1, len(jobs))), hooks, program)
    try:
        pool.run(jobs)
    finally:
        pool.terminate()
    raise_unfinished(folder, jobs)


class _Pool:
    """The processes of :func:`run_jobs`."""

    def __init__(
        self, folder: BatchFolder, batch: Batch, side_by_side: int, hooks: Hooks, program: Sequence[str]
    ) -> None:
        self.folder, self.batch, self.hooks, self.program = folder, batch, hooks, program
        self.side_by_side = side_by_side
        self.waiting: list[Job] = []
        self.running: list[JobProcess] = []
        self.stopping = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Start and watch processes until no job waits or runs."""
        self.waiting = list(jobs)
        while self.running or self.waiting:
            if self.hooks.should_stop() and not self.stopping:
                self.stop()
            while self.waiting and len(self.running) < self.side_by_side:
                self.start(self.waiting.pop(0))
            self.watch()
            if self.running:
                time.sleep(PAUSE)

    def start(self, job: Job) -> None:
        """Start a job's process, which shares the cores with the others, unless another machine has taken the job."""
        threads = max(1, (os.cpu_count() or 1) // self.side_by_side) if self.side_by_side > 1 else None
        process = start(self.folder, job, self.batch.started_in, threads, self.program)
        if process:
            self.running.append(process)
        else:
            self.hooks.notify(f"{job.name} is done, or runs elsewhere.")

    def stop(self) -> None:
        """Start no further job, and ask the running ones to save their states."""
        self.stopping, self.waiting = True, []
        self.terminate()

    def watch(self) -> None:
        """Report the progress of the running jobs, and the end of those whose process has ended."""
        ended = [process for process in self.running if not process.running]
        self.running = [process for process in self.running if process not in ended]
        for process in ended:
            record, name = process.finish(), process.job.name
            for note in record.notes:
                self.hooks.notify(f"{name}: {note}")
            self.hooks.notify(f"{name}: {record.message or record.state}")
        for process in self.running:
            if process.job.status and (status := read_status(process.job.status)) and status.steps:
                metrics = {} if status.loss is None else {"loss": status.loss}
                self.hooks.progress(Event(process.job.name, status.step, status.steps, metrics))

    def terminate(self) -> None:
        """Ask every running process to end."""
        for process in self.running:
            process.stop()


def raise_unfinished(folder: BatchFolder, jobs: Sequence[Job]) -> None:
    """Report the jobs that are not done.

    Raises:
        Cancelled: some were stopped, wait, or are done by another process.
        UserError: some failed.
    """
    found: dict[str, Record] = {job.name: folder.record(job) for job in jobs}
    done = sum(record.state == "done" for record in found.values())
    if any(record.state in {"stopped", "waiting"} for record in found.values()):
        raise Cancelled(f"Stopped with {done} of {len(jobs)} jobs done; they can be resumed.")
    if elsewhere := [name for name, record in found.items() if record.state == "running"]:
        raise Cancelled(f"Another process does {', '.join(elsewhere)}; look again later.")
    failed = {name: record for name, record in found.items() if record.state != "done"}
    if failed:
        reasons = "; ".join(f"{name} ({record.message.rstrip('.')})" for name, record in failed.items())
        fixes = dict.fromkeys(fix for record in failed.values() for fix in record.fixes)
        others = ", the others are done" if done else ""
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed{others}: {reasons}.", *fixes)
