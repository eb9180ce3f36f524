"""Where a training of the queue runs: in a process of this computer, or as a job of the cluster."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import UserError
from .jobs import QueueJob, how_it_ended
from .sentences import in_app, rendered
from .workspace import Workspace

if TYPE_CHECKING:
    from ..batch.submission import Row

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Half of the cores, so that a browser and the pictures find some: a thread that another program delays delays all,
# which wait for it thousands of times in a step. Beside one busy program two threads took three times as long as one
# (docs/cost.md).
SHARED = {"OMP_NUM_THREADS": str(max(1, CORES // 2))}
LAUNCH = 120.0  # seconds within which a launched training must report its process, if a killed server did not
ASK_EVERY = 5.0  # seconds between two questions to the cluster's queue
CLUSTER = "slurm"  # the executor's name in a job's record


class Launcher(Protocol):
    """Starts trainings, and knows how they go."""

    def start(self, job: QueueJob, options: Sequence[str]) -> QueueJob:
        """Start a job with these options of ``train``; returns it with its record written.

        Raises:
            UserError, OSError: it cannot be started.
        """
        ...

    def ask(self, job: QueueJob) -> None:
        """Learn how a running job goes. It may take long, so it is called without the queue's lock."""
        ...

    def is_alive(self, job: QueueJob) -> bool:
        """Whether a running job has not ended, by what was learnt last."""
        ...

    def stop(self, job: QueueJob, at_once: bool = False) -> None:
        """Ask a running job to save its state and end; ``at_once`` one that was asked: it ends without saving."""
        ...

    def ended(self, job: QueueJob, workspace: Workspace) -> dict[str, Any]:
        """The changes of an ended job's record: its state and a message."""
        ...


class Here:
    """A process of its own for every training, which outlives the server.

    Args:
        program: the training command, to which the photo folder and options are appended.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self.program = program
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, job: QueueJob, options: Sequence[str]) -> QueueJob:
        """See :class:`Launcher`."""
        from ..training.status import process_start

        with job.log.open("ab") as log:
            child = subprocess.Popen(
                [*self.program, *options], env={**SHARED, **os.environ}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        try:
            return job.write(pid=child.pid, pid_started=process_start(child.pid))
        except UserError:
            child.kill()  # an unrecorded process must not run
            raise

    def ask(self, job: QueueJob) -> None:
        """See :class:`Launcher`; a process of this computer is looked at without delay."""

    def is_alive(self, job: QueueJob) -> bool:
        """See :class:`Launcher`."""
        self._children = [child for child in self._children if child.poll() is None]
        if job.alive:
            return True
        if job.record.pid:
            return False
        # The launching server was killed before it recorded the process.
        if job.status and job.status.state in {"starting", "running"}:
            job.write(pid=job.status.pid, pid_started=job.status.pid_started)
            return True
        return time.time() - job.record.launched < LAUNCH

    def stop(self, job: QueueJob, at_once: bool = False) -> None:
        """See :class:`Launcher`."""
        if job.alive:
            with suppress(ProcessLookupError):
                os.kill(job.record.pid, signal.SIGINT if at_once and os.name == "posix" else signal.SIGTERM)

    def ended(self, job: QueueJob, workspace: Workspace) -> dict[str, Any]:
        """See :class:`Launcher`."""
        return how_it_ended(job, workspace)


class OnCluster:
    """A job of Slurm for every training, as ``train --executor slurm`` submits it.

    The workspace must be on a disk that the nodes share.
    """

    def __init__(self) -> None:
        # By job and launch, which another server may have made: when it was asked, and the answer, which is None for a
        # job that the cluster has not taken.
        self._answers: dict[tuple[str, int], tuple[float, Row | UserError | None]] = {}
        self._asking = threading.Lock()

    def start(self, job: QueueJob, options: Sequence[str]) -> QueueJob:
        """See :class:`Launcher`."""
        from ..batch.concepts import training_job
        from ..batch.estimate import needed
        from ..batch.job import Batch, BatchFolder, parse_cluster
        from ..batch.submission import submit

        config = job.config()
        task = training_job(job.record.concept, ["train", *options], config.output, job.status_file)
        asked = parse_cluster(job.record.cluster).filled(needed(config, None))
        batch = Batch(executor="slurm", cluster=asked, jobs=[task])
        submit(BatchFolder(job.folder), batch)
        return job

    def ask(self, job: QueueJob) -> None:
        """See :class:`Launcher`; while one thread waits for the cluster, the others use the last answer."""
        from ..batch.job import BatchFolder
        from ..batch.submission import rows

        key = job.id, job.record.launches
        asked, _ = self._answers.get(key, (-math.inf, None))
        if time.monotonic() - asked <= ASK_EVERY or not self._asking.acquire(blocking=False):
            return
        folder = BatchFolder(job.folder)
        try:
            answer: Row | None = None
            if folder.file.is_file():
                batch = folder.read()
                # One of an earlier launch says nothing of this one, nor one that a killed server did not submit.
                if datetime.fromisoformat(batch.created).timestamp() >= int(job.record.launched) and batch.ids:
                    [answer] = rows(folder)
            self._answers[key] = time.monotonic(), answer
        except UserError as error:
            self._answers[key] = time.monotonic(), error
        finally:
            self._asking.release()

    def row(self, job: QueueJob) -> Row | None:
        """What the cluster last said of a job; None if it has not taken it, or was not asked yet.

        Raises:
            UserError: the cluster did not answer.
        """
        _, answer = self._answers.get((job.id, job.record.launches), (0.0, None))
        if isinstance(answer, UserError):
            raise answer
        return answer

    def is_alive(self, job: QueueJob) -> bool:
        """See :class:`Launcher`.

        Raises:
            UserError: the cluster did not answer.
        """
        if (job.id, job.record.launches) not in self._answers:
            return True  # until it is known
        row = self.row(job)
        if row is None:  # the launching server was killed before the cluster took it
            return time.time() - job.record.launched < LAUNCH
        if row.state in {"waiting", "running"}:
            at = "waits in the cluster's queue" if row.state == "waiting" else f"runs on {row.host or 'the cluster'}"
            if job.record.place_in_cluster != at:
                job.write(place_in_cluster=at)
            return True
        return False

    def stop(self, job: QueueJob, at_once: bool = False) -> None:
        """See :class:`Launcher`; on a cluster nothing is ended at once: it kills what does not stop in its time.

        Raises:
            UserError: the cluster does not answer.
        """
        from ..batch.job import BatchFolder
        from ..batch.submission import cancel

        folder = BatchFolder(job.folder)
        if folder.file.is_file():
            cancel(folder)
        key = job.id, job.record.launches
        if key in self._answers:  # outdated now
            self._answers[key] = -math.inf, self._answers[key][1]

    def ended(self, job: QueueJob, workspace: Workspace) -> dict[str, Any]:
        """See :class:`Launcher`."""
        from ..training.run import state_path

        row, saved = self.row(job), state_path(job.output(workspace.adapters)).exists()
        goes_on = "Resume goes on from its last state" if saved else "Resume begins anew"
        if row is not None and row.state == "done":
            return {"state": "done", "message": ""}
        if job.record.wish or (row is not None and row.state == "stopped"):
            return {"state": "paused" if job.record.wish == "pause" else "stopped", "message": f"{goes_on}."}
        reason = rendered(UserError(row.message, *row.fixes)) if row else "The cluster did not take it."
        return {"state": "failed", "message": f"{in_app(reason, workspace)} {goes_on}."}


def cluster_is_here() -> bool:
    """Whether jobs can be submitted to a cluster from this computer."""
    return shutil.which("sbatch") is not None and find_spec("submitit") is not None
