"""The jobs of a batch as processes on this machine, some side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ..core.errors import Cancelled, UserError
from ..core.hooks import QUIET, Event, Hooks
from ..training.status import read_status
from .job import Batch, BatchFolder, Job, Record
from .process import PAUSE, PROGRAM, JobProcess, check_not_running


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
        Cancelled: ``hooks.should_stop`` said so; the running ones were asked to save their states.
        UserError: some failed, with a sentence of each; or one runs already.
    """
    check_not_running(folder, jobs)
    pool = _Pool(folder, batch, jobs, side_by_side, hooks, program)
    try:
        pool.run()
    finally:
        pool.terminate()
    raise_unfinished(folder, batch, jobs)


class _Pool:
    """The processes of :func:`run_jobs`."""

    def __init__(
        self, folder: BatchFolder, batch: Batch, jobs: Sequence[Job], side_by_side: int, hooks: Hooks,
        program: Sequence[str],
    ) -> None:  # fmt: skip
        self.folder, self.batch, self.hooks, self.program = folder, batch, hooks, program
        self.waiting, self.side_by_side = list(jobs), side_by_side
        self.running: list[JobProcess] = []
        self.stopping = False

    def run(self) -> None:
        """Start and watch processes until no job waits or runs."""
        while self.running or self.waiting:
            if self.hooks.should_stop() and not self.stopping:
                self.stop()
            while self.waiting and len(self.running) < self.side_by_side:
                self.start(self.waiting.pop(0))
            self.watch()
            if self.running:
                time.sleep(PAUSE)

    def start(self, job: Job) -> None:
        """Start a job's process; it shares the cores with the others."""
        threads = max(1, (os.cpu_count() or 1) // self.side_by_side) if self.side_by_side > 1 else None
        self.running.append(JobProcess(self.folder, job, self.batch.started_in, threads, self.program))

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


def raise_unfinished(folder: BatchFolder, batch: Batch, jobs: Sequence[Job]) -> None:
    """Report the jobs that are not done.

    Raises:
        Cancelled: some were stopped, or wait.
        UserError: some failed.
    """
    found: dict[str, Record] = {job.name: folder.record(job) for job in jobs}
    done = sum(folder.record(job).state == "done" for job in batch.jobs)
    if any(record.state in {"stopped", "waiting"} for record in found.values()):
        raise Cancelled(f"Stopped with {done} of {len(batch.jobs)} jobs done; they can be resumed.")
    failed = {name: record for name, record in found.items() if record.state != "done"}
    if failed:
        reasons = "; ".join(f"{name} ({record.message.rstrip('.')})" for name, record in failed.items())
        fixes = dict.fromkeys(fix for record in failed.values() for fix in record.fixes)
        raise UserError(f"{len(failed)} of {len(batch.jobs)} jobs failed, the others are done: {reasons}.", *fixes)
