"""The jobs of a batch as an array of Slurm, by submitit.

submitit is imported inside the functions: it is an extra that only a cluster needs.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import Fix, UserError, reason
from .job import Batch, BatchFolder, Job
from .process import PAUSE, JobProcess

ARRAY = 1000  # jobs of an array at most; Slurm's own default allows 1,001
TIMEOUTS = 1000  # how often a job may run into its time limit and go on
GRACE = 90  # seconds before a time limit at which a job is asked to save its state
KILLED_WITHIN = 900.0  # seconds that Slurm takes at most, from asking a job to end to ending it
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED"}  # fmt: skip
AT_WORK = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
KEPT = {"partition", "account", "qos", "constraint", "comment", "exclude", "nodelist", "gres", "mail_type", "mail_user"}
MINUTES = 1440  # of a job of which nothing is known
ASKING = 60  # seconds that Slurm's commands may take


class Worker:
    """What runs on a node: one job of a batch, whose state is saved when Slurm needs the node or the time is over."""

    def __init__(self, output: str) -> None:
        """``output``: the folder of the batch."""
        self.output = output
        self.running: JobProcess | None = None

    def __call__(self, name: str) -> str:
        """Do a job; returns how it ended."""
        folder = BatchFolder(Path(self.output))
        batch = folder.read()
        job = batch.job(name)
        if folder.record(job).state == "done":  # the node failed between the last write and its report
            return "done"
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        # Slurm starts a job once, and again only when the earlier one is gone, whatever its record says.
        self.running = JobProcess(folder, job, batch.started_in, int(threads) if threads.isdecimal() else None)
        record = self.running.wait()
        if record.state == "stopped" and not self.running.asked:
            # Slurm's own signal came to it first: before preempting it, which is followed by starting it again, or
            # because somebody cancelled it. Both end this process too, and ending now would count as done.
            time.sleep(KILLED_WITHIN)
        return record.state

    def checkpoint(self, name: str) -> Any:
        """Called by submitit shortly before the time limit or preemption: save the state and be started again."""
        from submitit.helpers import DelayedSubmission

        process, self.running = self.running, None
        if process and process.running:
            process.stop()
            while process.running:
                time.sleep(PAUSE)
            process.finish()
        return DelayedSubmission(Worker(self.output), name)

    def __getstate__(self) -> dict[str, Any]:
        return {"output": self.output, "running": None}


def check_available() -> None:
    """Refuse where there is no Slurm or no submitit.

    Raises:
        UserError: so it is.
    """
    if find_spec("submitit") is None:
        raise UserError("Slurm needs the package submitit: pip install 'spectral-diffusion[cluster]'.")
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no Slurm here: the command sbatch is missing. Run this where jobs are submitted.",
            Fix("executor", "local"),
        )


def submit(
    folder: BatchFolder, batch: Batch, jobs: Sequence[Job], prepare: Job | None = None, finish: Job | None = None
) -> dict[str, str]:
    """Submit jobs as arrays, which wait for the end of ``prepare``, and for whose end ``finish`` waits.

    Returns:
        Names of jobs to their ids.

    Raises:
        UserError: Slurm refuses.
    """
    check_available()
    worker, ids = Worker(str(folder.output.resolve())), {}
    names = [job.name for job in jobs]
    try:
        dependency = None
        if prepare:
            [first] = _executor(folder, batch, 1).map_array(worker, [prepare.name])
            ids[prepare.name] = str(first.job_id)
            dependency = f"afterany:{first.job_id}"  # it only saves time: without it the jobs compute for themselves
        arrays = math.ceil(len(names) / ARRAY)
        at_once = math.ceil((batch.cluster.parallelism or len(names)) / max(1, arrays))  # of each array
        for start in range(0, len(names), ARRAY):
            part = names[start : start + ARRAY]
            executor = _executor(folder, batch, at_once, dependency)
            for name, submitted in zip(part, executor.map_array(worker, part), strict=True):
                ids[name] = str(submitted.job_id)
        if finish:
            before = sorted({ids[name].partition("_")[0] for name in names})
            executor = _executor(folder, batch, 1, ":".join(["afterany", *before]) if before else None)
            [last] = executor.map_array(worker, [finish.name])
            ids[finish.name] = str(last.job_id)
    except Exception as error:  # submitit raises what sbatch says, and errors of its own
        cancel(ids.values())
        raise UserError(f"Slurm did not take the batch: {_said(error)}.") from error
    return ids


def _executor(folder: BatchFolder, batch: Batch, at_once: int, dependency: str | None = None) -> Any:
    """A submitit executor with the batch's parameters."""
    import submitit

    cluster = batch.cluster
    executor = submitit.SlurmExecutor(folder.path / "slurm", max_num_timeout=TIMEOUTS)
    own = {key: value for key, value in cluster.parameters.items() if key in KEPT}
    other = {key.replace("_", "-"): value for key, value in cluster.parameters.items() if key not in KEPT}
    known = {
        "partition": cluster.partition, "mem": f"{math.ceil(1024 * cluster.memory_gb)}M" if cluster.memory_gb else None,
        "cpus_per_task": cluster.cpus, "gpus_per_node": cluster.gpus or None, "dependency": dependency,
    }  # fmt: skip
    executor.update_parameters(
        job_name=f"spectral-{folder.output.resolve().name}"[:60],
        time=cluster.minutes or MINUTES,
        array_parallelism=at_once,
        signal_delay_s=GRACE,
        stderr_to_stdout=True,
        setup=[f"cd {shlex.quote(batch.started_in)}"],
        additional_parameters={"requeue": True, **other},
        **own,
        **{key: value for key, value in known.items() if value is not None},
    )
    return executor


def states(ids: Sequence[str]) -> dict[str, str]:
    """Ids of jobs that the queue still knows to ``waiting`` or ``running``.

    Raises:
        UserError: the queue does not answer.
    """
    if not ids:
        return {}
    mains = ",".join(sorted({job_id.partition("_")[0] for job_id in ids}))
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={mains}", "--format=%A|%F_%K|%F|%T"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=ASKING)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"Slurm's queue does not answer: {reason(error)}.") from error
    if found.returncode and "Invalid job id" not in found.stderr:
        raise UserError(f"Slurm's queue does not answer: {found.stderr.strip().rpartition(chr(10))[2]}.")
    known = {}
    for line in found.stdout.splitlines():
        own, in_array, _, state = line.split("|")
        if state not in ENDED:
            known[own] = known[in_array] = "running" if state in AT_WORK else "waiting"
    return {job_id: known[job_id] for job_id in ids if job_id in known}


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs, whole arrays of them; those that are unknown are left out.

    Raises:
        UserError: Slurm does not answer.
    """
    arrays = sorted({job_id.partition("_")[0] for job_id in ids})
    if not arrays:
        return
    try:
        subprocess.run(["scancel", "--quiet", *arrays], capture_output=True, timeout=ASKING, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"Slurm does not take the jobs back: {reason(error)}.") from error


def _said(error: Exception) -> str:
    """The last line of what sbatch said."""
    text = getattr(error, "stderr", None) or str(error)
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
