"""One job as a process: its log, its record, and how it ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from ..core.errors import UserError
from ..training.status import now, process_start, read_status
from .job import BatchFolder, Job, Record

PAUSE = 0.1  # seconds between two looks at a process
STOPPED = 130  # the exit code of a verb that was asked to stop
PROGRAM = (sys.executable, "-m", "spectral_diffusion")


class JobProcess:
    """A job that runs.

    Attributes:
        asked: whether :meth:`stop` was called.
    """

    def __init__(
        self,
        folder: BatchFolder,
        job: Job,
        started_in: str,
        threads: int | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """Start it.

        Args:
            started_in: the working folder.
            threads: how many of the processor's threads it should use, unless ``OMP_NUM_THREADS`` says so.
        """
        self.folder, self.job, self.asked = folder, job, False
        before = folder.record(job)
        environment = dict(os.environ)
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        folder.path.mkdir(parents=True, exist_ok=True)
        words = [*program, *job.words, *(job.again if before.starts else ())]
        with folder.log(job).open("ab" if before.starts else "wb") as log:
            # In a session of its own, so that Ctrl-C reaches it through us alone.
            self.process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True, cwd=started_in, preexec_fn=_ignore_user_signals if os.name == "posix" else None,
            )  # fmt: skip
            self.log_start = log.tell()
        self.record = Record(
            state="running", starts=before.starts + 1, host=socket.gethostname(), pid=self.process.pid,
            pid_started=process_start(self.process.pid), started=now(),
        )  # fmt: skip
        folder.write_record(job, self.record)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to save its state and end."""
        self.asked = True
        self.process.terminate()

    def wait(self) -> Record:
        """Its record after its end. Signals are handled between short pauses."""
        while self.running:
            time.sleep(PAUSE)
        return self.finish()

    def finish(self) -> Record:
        """Write how it ended, which must be so already, into its record."""
        record, job = self.record, self.job
        status = read_status(job.status) if job.status else None
        mine = status if status and status.pid == self.process.pid else None
        record.ended = now()
        code = self.process.wait()
        if code == 0:
            record.state, record.notes = "done", mine.notes if mine else []
        else:
            stopped = (mine and mine.state == "stopped") or code in (STOPPED, -signal.SIGTERM)
            record.state = "stopped" if stopped else "failed"
            record.message = self.last_line() or f"it ended with code {code}"
            if mine and mine.state in {"failed", "stopped"}:
                record.message, record.fixes = mine.message or record.message, list(mine.fixes)
        self.folder.write_record(job, record)
        return record

    def last_line(self) -> str:
        """The last thing that its process printed."""
        with self.folder.log(self.job).open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        return lines[-1].removeprefix("Error: ") if lines else ""


def _ignore_user_signals() -> None:
    """Slurm sends its signal before a time-out to every process of a job; it would end one that does not know it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def is_running_elsewhere(folder: BatchFolder, job: Job) -> str | None:
    """The number of the process that does a job right now, as a text; None if there is none."""
    record = folder.record(job)
    if record.state == "running":
        return str(record.pid)
    status = read_status(job.status) if job.status else None
    return str(status.pid) if status and status.state in {"starting", "running"} else None


def check_not_running(folder: BatchFolder, jobs: Sequence[Job]) -> None:
    """Refuse a batch of which a job runs already.

    Raises:
        UserError: one does.
    """
    for job in jobs:
        if pid := is_running_elsewhere(folder, job):
            what = f"{job.output} is being trained" if job.status else f"The job '{job.name}' is being done"
            raise UserError(f"{what} by process {pid} already; wait for it or stop it.")
