"""Options and helpers of the verbs whose work can be a batch of jobs, here or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.hooks import Hooks
from .support import echo, progress_bar, stop_signals

if TYPE_CHECKING:
    from ..batch.job import Batch, BatchFolder, Cluster, Job


class Executors(str, Enum):
    """Where jobs run."""

    local = "local"
    slurm = "slurm"
    manual = "manual"


ExecutorOption = Annotated[
    Executors | None,
    typer.Option(
        "--executor", help="Where the jobs run: local (here), slurm, or manual (only write them; see batch run)."
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option("--jobs", "--array-parallelism", min=1, help="How many jobs at once; default here: 1."),
]
ClusterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cluster",
        metavar="KEY=VALUE",
        help="Asked of the cluster: partition, memory_gb, minutes, cpus, gpus, or any option of sbatch. Repeat for "
        "more; default: estimates.",
    ),
]
OWN = ("--executor", "--jobs", "--array-parallelism", "--cluster")  # options that a job's own command line lacks


def this_command(drop: Sequence[str] = ()) -> list[str]:
    """This command line without the program and the options of executors.

    Args:
        drop: further options with one value that are left out.
    """
    arguments = iter(sys.argv[1:])
    out: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in (*OWN, *drop):
            if not equals:
                next(arguments, None)
        elif argument == "--":  # all that follows is no option
            return [*out, argument, *arguments]
        else:
            out.append(argument)
    return out


def cluster_of(pairs: list[str] | None, parallelism: int | None) -> Cluster:
    """What the options ask of the cluster."""
    from ..batch.job import parse_cluster

    return parse_cluster(pairs or [], parallelism)


@contextmanager
def job_hooks() -> Iterator[Hooks]:
    """The hooks of a verb that runs jobs; one that is stopped ends with the exit code of that."""
    from ..core.errors import Cancelled

    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            yield Hooks(progress=progress, notify=echo, should_stop=should_stop)
        except Cancelled as stopped:
            echo(str(stopped))
            raise typer.Exit(130) from stopped


def submit_batch(folder: BatchFolder, batch: Batch) -> None:
    """Run a batch here, or submit it and say how to follow it."""
    from ..batch.submission import submit

    with job_hooks() as hooks:
        submit(folder, batch, hooks)
    count = f"{len(batch.jobs)} job" + "s" * (len(batch.jobs) != 1)
    if batch.executor == "slurm":
        echo(f"Submitted {count}. spectral-diffusion batch status {folder.output} shows how they go.")
    elif batch.executor == "manual":
        echo(f"Wrote {count} into {folder.file}. spectral-diffusion batch run {folder.output} does them.")


def submit_jobs(
    output: Path, jobs: Sequence[Job], executor: Executors, cluster: list[str] | None, parallelism: int | None
) -> None:
    """Submit jobs that need nothing beforehand."""
    from ..batch.job import Batch, BatchFolder

    batch = Batch(executor=executor.value, cluster=cluster_of(cluster, parallelism), jobs=list(jobs))
    submit_batch(BatchFolder(output), batch)


def check_executor(executor: Executors) -> None:
    """Refuse Slurm where it is missing, before anything else is done.

    Raises:
        UserError: it is.
    """
    if executor is Executors.slurm:
        from ..batch.slurm import check_available

        check_available()
