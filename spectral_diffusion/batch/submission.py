"""A batch from its jobs to its end here, or into a cluster's queue; its table; and its restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import Fix, UserError
from ..core.hooks import QUIET, Hooks
from ..core.locks import locked
from ..training.status import read_status
from . import slurm
from .job import Batch, BatchFolder, Job, Record, State
from .local import run_jobs
from .process import check_not_running

WAIT = 20.0  # seconds for the batch's lock
LOCK = ".lock"


@dataclass(frozen=True)
class Row:
    """One job in the table."""

    name: str
    state: State
    step: int
    steps: int
    eta: float | None  # seconds
    starts: int
    host: str
    seconds: float | None
    message: str
    fixes: tuple[Fix, ...] = ()


def submit(folder: BatchFolder, batch: Batch, hooks: Hooks = QUIET) -> None:
    """Write a batch and run its jobs here, or put them into the cluster's queue.

    An earlier batch of the folder is replaced; what it made stays.

    Raises:
        UserError: a job runs already, some failed here, or the cluster refuses.
        Cancelled: see :func:`.local.run_jobs`.
    """
    if batch.executor == "slurm":
        slurm.check_available()
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path / LOCK, WAIT):
        check_idle(folder, batch.every)
        for job in batch.every:
            folder.write_record(job, Record())
        folder.write(batch)
        _queue(folder, batch, batch.jobs, batch.prepare, batch.finish)
    if batch.executor == "local":
        run_here(folder, batch, batch.every, batch.cluster.parallelism or 1, hooks)


def run_here(
    folder: BatchFolder, batch: Batch, jobs: Sequence[Job], side_by_side: int = 1, hooks: Hooks = QUIET
) -> None:
    """Run jobs on this machine: the first and the last of the batch, if they are among them, by themselves.

    Raises:
        Cancelled, UserError: see :func:`.local.run_jobs`.
    """
    alone = (batch.prepare, batch.finish)
    between = [job for job in jobs if job not in alone]
    for part in ([j for j in jobs if j == batch.prepare], between, [j for j in jobs if j == batch.finish]):
        if part:
            run_jobs(folder, batch, part, side_by_side, hooks)


def check_idle(folder: BatchFolder, jobs: Sequence[Job]) -> None:
    """Refuse to replace a batch that a cluster still works on or that waits to be run, and jobs that run.

    Raises:
        UserError: so it is.
    """
    names = {job.name for job in jobs}
    try:
        before = folder.read() if folder.file.is_file() else Batch()
    except UserError:  # a damaged one says nothing
        before = Batch()
    remove = f"remove {folder.path}, which forgets them"
    if busy := list(queued(before)):
        raise UserError(
            f"The cluster still works on {len(busy)} jobs of {folder.output}, such as {busy[0]}; wait for them, cancel "
            f"them (spectral-diffusion batch cancel {folder.output}), or {remove}."
        )
    left = [job.name for job in folder.unfinished(before) if job.name not in names]
    if before.executor == "manual" and left:
        raise UserError(
            f"{folder.output} holds a batch with {len(left)} jobs that are not done, such as {left[0]}; do them "
            f"(spectral-diffusion batch run {folder.output}), or {remove}."
        )
    # Of jobs that were in a queue it knows better than their records whether they run.
    check_not_running(folder, [job for job in jobs if job.name not in before.ids])


def _queue(
    folder: BatchFolder, batch: Batch, jobs: Sequence[Job], prepare: Job | None = None, finish: Job | None = None
) -> None:
    if batch.executor == "slurm":
        batch.ids |= slurm.submit(folder, batch, jobs, prepare, finish)
        folder.write(batch)


def queued(batch: Batch) -> dict[str, str]:
    """Names of jobs that the cluster's queue knows to ``waiting`` or ``running``.

    Raises:
        UserError: the queue does not answer.
    """
    if batch.executor != "slurm" or not batch.ids:
        return {}
    known = slurm.states(list(batch.ids.values()))
    return {name: known[job_id] for name, job_id in batch.ids.items() if job_id in known}


def rows(folder: BatchFolder, ask: bool = True) -> list[Row]:
    """The table of a batch.

    Args:
        ask: the cluster's queue, if the batch is in one; else the jobs' own records are all there is.

    Raises:
        UserError: there is no batch, or the cluster's queue does not answer.
    """
    batch = folder.read()
    in_queue = queued(batch) if ask and batch.executor == "slurm" else None
    return [_row(folder, batch, job, in_queue) for job in batch.every]


def _row(folder: BatchFolder, batch: Batch, job: Job, in_queue: Mapping[str, str] | None) -> Row:
    record = folder.record(job)
    state, message = _state(batch, job, record, in_queue)
    status = read_status(job.status) if job.status and record.starts else None
    step, steps = (status.step, status.steps) if status and status.stage == "train" else (0, 0)
    eta = status.eta if status and state == "running" else None
    fixes = tuple(record.fixes) if state == "failed" else ()
    return Row(job.name, state, step, steps, eta, record.starts, record.host, record.seconds, message, fixes)


def _state(batch: Batch, job: Job, record: Record, in_queue: Mapping[str, str] | None) -> tuple[State, str]:
    """The state of a job by its record and the queue (if there is one), which each know a part."""
    if record.state == "done" or in_queue is None:
        return record.state, record.message
    if in_queue.get(job.name) == "waiting":
        return "waiting", "It was stopped and will go on." if record.starts else ""
    if in_queue.get(job.name) == "running":
        return "running", ""
    if record.state in ("running", "lost") or (record.state == "waiting" and job.name in batch.ids):
        return "lost", "The cluster ended it, perhaps as memory was short; its log may say more."
    return record.state, record.message


def restart(folder: BatchFolder, hooks: Hooks = QUIET) -> list[str]:
    """Start every job again that failed, was stopped or was lost; they go on from their saved states.

    Returns:
        The names of the jobs.

    Raises:
        UserError: there is no batch, it is one without an executor, or as :func:`submit`.
    """
    folder.read()  # or say that there is none
    with locked(folder.path / LOCK, WAIT):
        batch = folder.read()
        if batch.executor == "manual":
            raise UserError(
                f"The batch of {folder.output} has no executor: spectral-diffusion batch run {folder.output} does what "
                "is not done."
            )
        ended = {
            row.name
            for row in rows(folder)
            if row.state in ("failed", "stopped", "lost")
            # Or it never came into the queue, or its turn here had not come.
            or (row.state == "waiting" and row.name not in batch.ids)
        }
        jobs = [job for job in batch.every if job.name in ended]
        if batch.executor != "slurm":
            check_not_running(folder, jobs)
        for job in jobs:
            folder.write_record(job, folder.record(job).model_copy(update={"state": "waiting", "message": ""}))
        if jobs:
            first = batch.prepare if batch.prepare in jobs else None
            last = batch.finish if batch.finish in jobs else None
            _queue(folder, batch, [job for job in jobs if job not in (first, last)], first, last)
    if jobs and batch.executor == "local":
        run_here(folder, batch, jobs, batch.cluster.parallelism or 1, hooks)
    return [job.name for job in jobs]


def cancel(folder: BatchFolder) -> int:
    """Take the waiting and running jobs of a batch from the cluster; running ones save their states first.

    Returns:
        How many.

    Raises:
        UserError: there is no batch, or it is not one of a cluster.
    """
    folder.read()  # or say that there is none
    with locked(folder.path / LOCK, WAIT):
        batch = folder.read()
        if batch.executor != "slurm":
            raise UserError(
                f"The batch of {folder.output} was not submitted to a cluster; stop its process with Ctrl-C."
            )
        left = queued(batch)
        slurm.cancel(batch.ids[name] for name in left)
        for name, state in left.items():
            if state == "waiting":
                job = batch.job(name)
                stopped = {"state": "stopped", "message": "It was cancelled."}
                folder.write_record(job, folder.record(job).model_copy(update=stopped))
        return len(left)


def share(batch: Batch, shard: str) -> list[Job]:
    """The jobs of the share ``i/n``: those whose number leaves the remainder i, counted from 0.

    Raises:
        UserError: not such a text.
    """
    part, slash, whole = shard.partition("/")
    if not (slash and part.isdecimal() and whole.isdecimal() and int(part) < int(whole)):
        raise UserError(f"A share is i/n with i from 0 to n − 1, such as 0/4, not '{shard}'.")
    return batch.jobs[int(part) :: int(whole)]


def check_runs_here(folder: BatchFolder, batch: Batch) -> None:
    """Refuse to do the jobs of a batch here that a cluster's queue will do.

    Raises:
        UserError: so it is.
    """
    if batch.executor == "slurm" and (left := queued(batch)):
        raise UserError(
            f"{len(left)} jobs of {folder.output} are in Slurm's queue; cancel them first: spectral-diffusion batch "
            f"cancel {folder.output}."
        )
