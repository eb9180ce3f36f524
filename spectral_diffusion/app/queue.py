"""The queue of trainings. Each runs in its own process, and its whole state is in the workspace.

So nothing depends on this process: after a page is reloaded or a server restarted, the next poll finds the running
training by its process and continues with the waiting ones.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from filelock import FileLock, Timeout

from ..config.settings import to_yaml
from ..core.errors import UserError
from ..core.files import atomic_folder, write_text
from .adapters import release_slot, workspace_adapters
from .concepts import concept_folder
from .disk import disk_errors_as_sentence
from .jobs import QueueJob, Record, moving, read_job, trim
from .launchers import CLUSTER, Here, Launcher, OnCluster
from .presets import train_settings
from .sentences import in_app, rendered
from .trash import keep
from .workspace import Workspace, pick, sentence_of, visible

BUSY, IDLE = (
    0.5,
    5.0,
)  # seconds between two polls of the thread: while a job runs, and otherwise
TRAIN = (sys.executable, "-m", "spectral_diffusion.cli", "train")


class Queue:
    """The trainings of one workspace. Any number of queues, in any number of processes, may manage them.

    Args:
        program: the training command; the photo folder and options of ``spectral-diffusion train`` are appended.
    """

    def __init__(self, workspace: Workspace, program: Sequence[str] = TRAIN) -> None:
        self.workspace, self.program = workspace, program
        self.trouble = ""  # why the queue cannot go on, such as a full disk
        self._silence = ""  # why it is not known how the cluster's jobs go
        self.launchers: dict[str, Launcher] = {"local": Here(program), CLUSTER: OnCluster()}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._wake = threading.Event()

    # --- reading -------------------------------------------------------------------------------------------------

    def jobs(self) -> list[QueueJob]:
        """All jobs: running, paused and waiting ones in order, then the others from the newest."""
        listed = [read_job(folder) for folder in visible(self.workspace.jobs) if folder.is_dir()]
        return sorted(listed, key=lambda job: (0, job.record.place) if job.active else (1, -job.record.created))

    def job(self, name: str | None) -> QueueJob:
        """A listed job.

        Raises:
            UserError: there is none of that id.
        """
        return pick(name, {job.id: job for job in self.jobs()}, "training", "start one")

    def resumable(self, job: QueueJob) -> bool:
        """Whether a job has a state on disk to resume from."""
        from ..training.run import state_path

        return state_path(job.output(self.workspace.adapters)).exists()

    # --- commands --------------------------------------------------------------------------------------------------

    def enqueue(
        self, concept: str | None, preset: str = "pocket", executor: str | None = "local", cluster: str | None = "",
        **changes: Any,
    ) -> tuple[str, str]:  # fmt: skip
        """Put a training at the end of the queue; returns its id and a message.

        Args:
            executor: ``slurm`` submits it to the cluster, beside what runs on this computer.
            cluster: what is asked of the cluster, such as ``partition=gpu minutes=90``.

        Raises:
            UserError: anything the user can fix.
        """
        from ..methods import get_method

        asked = self._asked_of_cluster(executor or "local", cluster or "")
        settings = train_settings(self.workspace, concept, preset, changes)
        get_method(settings.method)
        name = settings.output.stem
        with disk_errors_as_sentence("jobs"), self._locked():
            self._refuse_twin(name)
            now = time.time()
            stamp = datetime.fromtimestamp(now).strftime("%Y%m%d-%H%M%S-%f")[:-3]
            folder = self.workspace.jobs / f"{stamp}_{name}"
            record = Record(concept=name, preset=preset, steps=settings.steps, place=now, created=now, **asked)
            with atomic_folder(folder) as new:
                write_text(new / "job.yaml", to_yaml(settings))
                write_text(new / "job.json", record.model_dump_json(indent=1) + "\n")
        return folder.name, self._go(folder.name)

    def resume(self, name: str | None) -> str:
        """Resume a paused, stopped or failed job from its last state; a paused one runs next.

        Raises:
            UserError: the job is not resumable.
        """
        with disk_errors_as_sentence("jobs"), self._locked():
            job = self.job(name)
            if job.record.state == "running":
                raise UserError(f"The training of '{job.record.concept}' is running; resume it once it has stopped.")
            if job.record.state in {"waiting", "done"}:
                raise UserError(
                    f"The training of '{job.record.concept}' is {job.record.state}; there is nothing to resume."
                )
            job.config()  # raises if it is damaged
            self._refuse_twin(job.record.concept, job)
            waiting = [other.record.place for other in self.jobs() if other.record.state == "waiting"]
            first = job.record.state == "paused" and waiting
            job.write(state="waiting", wish="", message="", pid=0, place=min(waiting) - 1 if first else time.time())
        return self._go(job.id)

    def resume_concept(self, concept: str | None) -> tuple[str, str]:
        """Resume the newest unfinished training of a concept; returns its id and a message.

        Raises:
            UserError: there is none.
        """
        name = concept_folder(self.workspace, concept).name
        unfinished = {"paused", "stopped", "failed"}
        ids = [job.id for job in self.jobs() if job.record.concept == name and job.record.state in unfinished]
        if not ids:
            raise UserError(f"There is no stopped training of '{name}' to go on with; train without resume.")
        return ids[0], self.resume(ids[0])

    def stop(self, name: str | None, wish: str = "stop") -> str:
        """Stop a job and keep its state; the queue continues with the next. A second such request stops it at once.

        Args:
            wish: ``stop``, or ``pause``, which keeps the queue waiting until the job is resumed.

        Raises:
            UserError: it neither runs nor waits.
        """
        with disk_errors_as_sentence("jobs"), self._locked():
            job = self.job(name)
            concept, state = job.record.concept, job.record.state
            if state in {"waiting", "paused"} and wish == "stop":
                job.write(state="stopped", message="Taken out of the queue; Resume puts it back.")
                message = f"The training of '{concept}' is out of the queue."
            elif state == "running":
                again = job.record.wish == wish and job.record.executor == "local"
                job = job.write(wish=wish)
                try:
                    self._launcher(job).stop(job, at_once=again)
                except UserError:
                    job.write(wish="")  # nothing was stopped
                    raise
                if again and self.resumable(job):
                    message = "stops at once; Resume goes on from its last saved state"
                elif again:
                    message = "stops at once; Resume begins anew"
                elif job.steps_done or self.resumable(job):
                    message = "keeps its state and stops after the present step; Resume goes on from there"
                else:
                    message = "stops before its first step; Resume begins anew"
                queue = ", and the queue waits until then" if wish == "pause" else ""
                message = f"The training of '{concept}' {message}{queue}."
            else:
                raise UserError(f"The training of '{concept}' is {state}; only a running one can be paused.")
        self.start()
        return message

    def pause(self, name: str | None) -> str:
        """Stop a running job, keep its state, and block the queue until it is resumed.

        Raises:
            UserError: it is not running.
        """
        return self.stop(name, "pause")

    def remove(self, name: str | None, sure: bool = False) -> str:
        """Remove a job from the list. Its adapter stays.

        Raises:
            UserError: it is running, or an unfinished state would be deleted without ``sure``.
        """
        from ..training.run import state_path

        with disk_errors_as_sentence("jobs"), self._locked():
            job = self.job(name)
            concept, output = job.record.concept, job.output(self.workspace.adapters)
            if job.record.state == "running":
                raise UserError(f"The training of '{concept}' runs; stop it first.")
            unfinished = job.record.state != "done" and job.record.launches > 0
            if unfinished and self.resumable(job) and not sure:
                raise UserError(f"This deletes the unfinished training of '{concept}'; say that you are sure.")
            if unfinished:
                state_path(output).unlink(missing_ok=True)
                if concept not in workspace_adapters(self.workspace):
                    release_slot(self.workspace, concept)
            shutil.rmtree(job.folder)
        self.start()
        return f"Removed the training of '{concept}' from the list."

    def clear(self) -> str:
        """Remove all finished jobs from the list; their adapters stay."""
        done = [job.id for job in self.jobs() if job.record.state == "done"]
        for name in done:
            self.remove(name)
        return f"Removed {len(done)} finished training{'s' if len(done) != 1 else ''} from the list."

    # --- polling -------------------------------------------------------------------------------------------

    def tick(self, ask: bool = True) -> bool:
        """Record ended jobs and start the next; returns whether a job is running.

        Args:
            ask: ask the cluster for news, which may take a minute; else by what it said last.

        Raises:
            UserError: the workspace cannot be written.
        """
        if not self.workspace.jobs.is_dir():
            return False
        for job in self.jobs():
            if ask and job.record.state == "running":
                self._launcher(job).ask(job)
        with disk_errors_as_sentence("jobs"), self._locked():
            self._silence = ""
            for job in self.jobs():
                if job.record.state == "running":
                    self._look_after(job)
            jobs = self.jobs()
            submitted = [self._launched(job) for job in jobs if _waits(job, CLUSTER)]  # the cluster has its own queue
            states = {job.record.state for job in jobs if job.record.executor == "local"}
            if "paused" not in states and "running" not in states:  # else up to the first that starts
                submitted.append(any(self._launched(job) for job in jobs if _waits(job, "local")))
            return any(submitted) or "running" in {job.record.state for job in jobs}

    def start(self) -> None:
        """Poll the queue in a thread, which ends when nothing runs or waits; does nothing if it is running."""
        self._wake.set()
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                if not moving(self.jobs()):
                    return
                self._thread = threading.Thread(target=self._work, name="trainings", daemon=True)
                self._thread.start()

    def refresh(self) -> list[QueueJob]:
        """Poll the queue once and return the jobs; an error goes to ``trouble``."""
        asked_by_thread = self._thread not in (None, threading.current_thread()) and self._thread.is_alive()
        try:
            self.tick(ask=not asked_by_thread)
            self.trouble = self._silence
        except Exception as error:  # the list must be shown whatever is wrong
            self.trouble = sentence_of(error)
        return self.jobs()

    def _work(self) -> None:
        while moving(self.refresh()):
            running = any(job.record.state == "running" for job in self.jobs())
            self._wake.wait(BUSY if running else IDLE)
            self._wake.clear()

    def _go(self, name: str) -> str:
        """Start the queue, and return a message on a job's position."""
        jobs = self.refresh()
        self.start()
        job = self.job(name)
        if self.trouble and self.trouble != self._silence:
            raise UserError(self.trouble)
        if job.record.state == "failed":
            raise UserError(job.record.message)
        if job.record.state == "running":
            return f"The training of '{job.record.concept}' has started."
        before = [other.record.concept for other in jobs[: [other.id for other in jobs].index(name)]]
        local = [other for other in jobs if other.record.executor == "local"]
        paused = next((other.record.concept for other in local if other.record.state == "paused"), None)
        waiting = f"; the queue waits until the paused training of '{paused}' is resumed or stopped" if paused else ""
        return f"The training of '{job.record.concept}' waits for {len(before)} before it{waiting}."

    def _launched(self, job: QueueJob) -> bool:
        """Start a job's process; False if it cannot be started, with the reason in its record."""
        try:
            folder = job.config().concept
            if not folder.is_dir():
                raise UserError(
                    f"The photos of '{job.record.concept}' are gone (deleted or renamed); add them again in step 1."
                )
            output = job.output(self.workspace.adapters)
            done = output.exists()  # of an earlier training; --resume would keep it
            if done and not job.record.kept:
                keep(self.workspace, job.record.concept, [output])
                job = job.write(kept=True)
        except UserError as error:
            job.write(state="failed", message=rendered(error))
            return False
        # Written before the process starts, so that it is not started twice even if this one is killed here.
        job = job.write(
            state="running", wish="", message="", pid=0, pid_started=None, launched=time.time(),
            launches=job.record.launches + 1,
        )  # fmt: skip
        options = [str(folder), "--config", str(job.settings), "--status", str(job.status_file)]
        if job.record.launches > 1 and (self.resumable(job) or not done):
            options.append("--resume")
        try:
            self._launcher(job).start(job, options)
        except OSError as error:
            job.write(state="failed", message=f"The training cannot be started: {error.strerror or error}.")
            return False
        except UserError as error:
            if not isinstance(self._launcher(job), OnCluster):
                raise
            job.write(state="failed", message=in_app(rendered(error), self.workspace))
            return False
        return True

    def _look_after(self, job: QueueJob) -> None:
        """Adopt a running job, or record how it ended."""
        with suppress(OSError):
            trim(job.log)
        try:
            if self._launcher(job).is_alive(job):
                return
        except UserError as error:
            if job.record.executor == "local":
                raise
            self._silence = rendered(error)  # a cluster that does not answer must not stop what runs here
            return
        job = QueueJob(job.folder, job.record)  # re-read the status, which may be newer
        job.write(wish="", **self._launcher(job).ended(job, self.workspace))

    def _launcher(self, job: QueueJob) -> Launcher:
        return self.launchers[job.record.executor]

    def _asked_of_cluster(self, executor: str, cluster: str) -> dict[str, Any]:
        """The record's part on where a training runs.

        Raises:
            UserError: no such place, no cluster here, or nothing that can be asked of one.
        """
        if executor == "local":
            return {}
        if executor != CLUSTER:
            raise UserError(f"A training runs on local or {CLUSTER}, not on '{executor[:40]}'.")
        from ..batch.job import parse_cluster
        from ..batch.slurm import check_available

        check_available()
        parts = cluster.split()
        parse_cluster(parts)
        return {"executor": CLUSTER, "cluster": parts}

    def _refuse_twin(self, concept: str, job: QueueJob | None = None) -> None:
        """Refuse a second training of the same adapter; a new one replaces those that left no state.

        Raises:
            UserError: another one runs or waits, or has a state to resume from.
        """
        twins = [other for other in self.jobs() if other.record.concept == concept and other.record.state != "done"]
        twins = [other for other in twins if job is None or other.id != job.id]
        if active := next((other for other in twins if other.active), None):
            raise UserError(f"A training of '{concept}' is {active.record.state} already; see the list.")
        if job is None and twins:
            if unfinished := next((other for other in twins if other.record.launches and self.resumable(other)), None):
                steps = f"step {unfinished.steps_done} of {unfinished.record.steps}"
                raise UserError(
                    f"There is an unfinished training of '{concept}' ({steps}): "
                    "resume it, or remove it from the list and train anew."
                )
            for other in twins:
                shutil.rmtree(other.folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the queue against changes by other threads and processes."""
        self.workspace.jobs.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.workspace.jobs / ".lock", timeout=20):
                yield
        except Timeout as error:
            raise UserError("Another server on this workspace holds the queue; try again in a moment.") from error


def _waits(job: QueueJob, executor: str) -> bool:
    """Whether a job waits for this executor."""
    return job.record.state == "waiting" and job.record.executor == executor
