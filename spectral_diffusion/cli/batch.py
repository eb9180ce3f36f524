"""The verbs that show, run, restart and cancel the jobs of a batch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import UserError
from ..core.hooks import brief_duration
from .executors import job_hooks
from .support import JsonOption, echo

if TYPE_CHECKING:
    from ..batch.submission import Row

batch_app = typer.Typer(
    help="Many jobs: the state of a batch that train, experiment, evaluate or board wrote with --executor.",
    no_args_is_help=True,
)
WHOLE = "0/1"  # the share that is everything
FolderArgument = Annotated[Path, typer.Argument(help="The folder that the batch writes to (-o).")]


@batch_app.command("status")
def batch_status(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Show how every job goes, and why some failed."""
    from ..batch.job import BatchFolder
    from ..batch.submission import rows

    place, silent = BatchFolder(folder), ""
    place.read()  # or say that there is none
    try:
        found = rows(place)
    except UserError as error:
        found, silent = rows(place, ask=False), f"{error.message} The table shows what the jobs themselves wrote."
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    print_rows(found)
    if silent:
        echo(silent)
    counts = Counter(row.state for row in found)
    echo(", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    if any(row.state in ("failed", "lost", "stopped") for row in found):
        echo(f"spectral-diffusion batch restart {folder} starts those again that failed, were lost or stopped.")


def print_rows(found: list[Row]) -> None:
    """The table on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from . import speller

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "state", "step", "time", "starts", "machine", ""):
        table.add_column(name, overflow="fold")
    for row in found:
        step = f"{row.step}/{row.steps}" if row.steps else ""
        time = f"{brief_duration(row.eta)} left" if row.eta else brief_duration(row.seconds) if row.seconds else ""
        message = UserError(row.message, *row.fixes).render(speller(["train"])) if row.fixes else row.message
        cells = (row.name, row.state, step, time, str(row.starts or ""), row.host, message)
        table.add_row(*map(Text, cells))
    Console(highlight=False).print(table)


@batch_app.command("run")
def batch_run(
    folder: FolderArgument,
    shard: Annotated[
        str, typer.Option(help="Only the share i/n of the jobs, such as 0/4: for machines without a common queue.")
    ] = WHOLE,
    jobs: Annotated[int, typer.Option(min=1, help="How many jobs side by side.")] = 1,
) -> None:
    """Do the jobs of a batch that are not done, on this machine."""
    from ..batch.job import BatchFolder
    from ..batch.submission import check_runs_here, run_here, share

    place = BatchFolder(folder)
    batch = place.read()
    check_runs_here(place, batch)
    left = {job.name for job in place.unfinished(batch)}
    mine = [job for job in share(batch, shard) if job.name in left]
    if shard == WHOLE and batch.finish and batch.finish.name in left:
        mine.append(batch.finish)
    with job_hooks() as hooks:
        run_here(place, batch, mine, jobs, hooks)
    echo(f"Did {len(mine)} of {len(batch.every)} jobs; the others were done, or are other machines'.")
    if batch.finish and batch.finish not in mine and batch.finish.name in left:
        echo(f"When all are done, spectral-diffusion batch run {folder} does the last one.")


@batch_app.command("restart")
def batch_restart(folder: FolderArgument) -> None:
    """Start every job again that failed, was lost or stopped; each goes on from its saved state."""
    from ..batch.job import BatchFolder
    from ..batch.submission import restart

    with job_hooks() as hooks:
        names = restart(BatchFolder(folder), hooks)
    echo(f"Started again: {', '.join(names)}." if names else "Nothing is to be started again.")


@batch_app.command("cancel")
def batch_cancel(folder: FolderArgument) -> None:
    """Take a batch's jobs from the cluster; running ones save their states."""
    from ..batch.job import BatchFolder
    from ..batch.submission import cancel

    echo(f"Cancelled {cancel(BatchFolder(folder))} jobs.")


@batch_app.command("prepare")
def batch_prepare(folder: FolderArgument) -> None:
    """Compute what all trainings of a batch share: the base's spectrum and prior images."""
    from ..batch.job import BatchFolder
    from ..batch.prepare import prepare

    place = BatchFolder(folder)
    with job_hooks() as hooks:
        prepare(place, place.read(), hooks)
    echo("The spectra and prior images that the batch shares are in the cache.")


@batch_app.command("kubernetes")
def batch_kubernetes(
    folder: FolderArgument,
    image: Annotated[str, typer.Option(help="The container image with this program.")],
    claim: Annotated[str, typer.Option(help="A PersistentVolumeClaim that every pod can write.")],
    pods: Annotated[int | None, typer.Option(min=1, help="How many pods share the jobs; default: one per job.")] = None,
    queue: Annotated[str | None, typer.Option(help="A local queue of Kueue.")] = None,
    mount: Annotated[str | None, typer.Option(help="Where the claim is mounted; default: the present folder.")] = None,
) -> None:
    """Print the batch as an Indexed Job for kubectl apply -f -; write it with --executor manual first."""
    from ..batch.job import BatchFolder
    from ..batch.kubernetes import Pods, as_yaml, manifest

    batch = BatchFolder(folder)
    typer.echo(as_yaml(manifest(batch, batch.read(), Pods(image, claim, pods, queue, mount))), nl=False)
