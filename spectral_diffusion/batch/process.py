"""One job as a process: its log, its record, and how it ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from ..core.errors import UserError
from ..core.locks import locked
from ..training.status import now, process_start, read_status
from .job import BatchFolder, Job, Record

PAUSE = 0.1  # seconds between two looks at a process
HEARTBEAT = 60.0  # seconds between two words of a job that runs
CLOCKS = 5.0  # seconds by which the clocks of two machines may differ
WAIT = 20.0  # seconds for the lock under which a job is taken
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
        command = [*program, *job.arguments, *(["--resume"] if has_own_state(job, before) else [])]
        with folder.log(job).open("ab" if before.starts else "wb") as log:
            self.log_start = log.tell()
            # In a session of its own, so that Ctrl-C reaches it through us alone.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True, cwd=started_in, preexec_fn=_ignore_user_signals if os.name == "posix" else None,
            )  # fmt: skip
        self.record = Record(
            state="running", starts=before.starts + 1, first_start=before.first_start or time.time(),
            host=socket.gethostname(), pid=self.process.pid, pid_started=process_start(self.process.pid), started=now(),
        )  # fmt: skip
        self.write()

    def write(self) -> None:
        """Write its record now."""
        self.folder.write_record(self.job, self.record)
        self._written = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it has not ended; from time to time its record says so too."""
        if self.process.poll() is not None:
            return False
        if time.monotonic() - self._written > HEARTBEAT:
            with suppress(UserError, OSError):  # a full disk stops no training
                self.write()
        return True

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
            record.message = killed(code) or self.last_line() or f"it ended with code {code}"
            if mine and mine.state in {"failed", "stopped"}:
                record.message, record.fixes = mine.message or record.message, list(mine.fixes)
        self.write()
        return record

    def last_line(self) -> str:
        """The last thing that its process printed."""
        with self.folder.log(self.job).open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        return lines[-1].removeprefix("Error: ") if lines else ""


def has_own_state(job: Job, before: Record) -> bool:
    """Whether an earlier start of this job has saved a state; one that is older is another training's."""
    try:
        written = job.state.stat().st_mtime if job.state else 0.0
    except OSError:
        return False
    return before.starts > 0 and written >= before.first_start - CLOCKS


def killed(code: int) -> str:
    """The sentence for a process that a signal ended; empty for one that ended by itself."""
    if code >= 0 or code == -signal.SIGTERM:
        return ""
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f"It was ended by {name}" + (", perhaps as memory was short." if name == "SIGKILL" else ".")
    return f"It was ended by signal {-code}."


def start(
    folder: BatchFolder, job: Job, started_in: str, threads: int | None = None, program: Sequence[str] = PROGRAM
) -> JobProcess | None:
    """Start a job unless it is done or runs, by whomever; None if so."""
    with locked(folder.path / f".{job.name}.lock", WAIT):
        if folder.record(job).state == "done" or is_running(folder, job):
            return None
        return JobProcess(folder, job, started_in, threads, program)


def _ignore_user_signals() -> None:
    """Slurm sends its signal before a time-out to every process of a job; it would end one that does not know it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def is_running(folder: BatchFolder, job: Job) -> int:
    """The number of the process that does a job right now; 0 if there is none."""
    record = folder.record(job)
    if record.state == "running":
        return record.pid
    if record.starts:  # and it has ended: what its status says is old
        return 0
    status = read_status(job.status) if job.status else None
    return status.pid if status and status.state in {"starting", "running"} else 0


def check_not_running(folder: BatchFolder, jobs: Sequence[Job]) -> None:
    """Refuse a batch of which a job runs already.

    Raises:
        UserError: one does.
    """
    for job in jobs:
        if pid := is_running(folder, job):
            what = f"{job.output} is being trained" if job.status else f"The job '{job.name}' is being done"
            raise UserError(f"{what} by process {pid} already; wait for it or stop it.")
