"""The verb that trains concepts, one or a batch of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..config.train import TrainConfig
from ..core.errors import UserError
from ..core.hooks import Hooks
from ..core.hub import is_dataset
from .executors import (
    ClusterOption,
    ExecutorOption,
    Executors,
    ParallelOption,
    check_executor,
    cluster_of,
    submit_batch,
    submit_jobs,
    this_command,
)
from .options import settings_flags
from .support import (
    ConfigOption,
    ResumeOption,
    echo,
    files_and_settings,
    importing,
    progress_bar,
    resolve,
    stop_signals,
)

if TYPE_CHECKING:
    from ..batch.concepts import Training
    from ..batch.job import Batch

OWN = ("name", "token", "class_noun")  # settings that concepts cannot share


@settings_flags(
    TrainConfig,
    without={"concept", "joint_concepts"},
    names={"param_budget": "--budget", "init_from_adapter": "--continue"},
    types={"param_budget": str},  # 200k, 2m
)
def train(
    words: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Folders with your photos; then any setting as key=value.")
    ],
    resume: ResumeOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume with other settings; else replace what --resume would go on with.")
    ] = False,
    status: Annotated[
        Path | None, typer.Option(help="Keep a status file (.json); 'auto' puts it beside the output.")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Train all the folders into one adapter instead of one each.")
    ] = False,
    executor: ExecutorOption = None,
    jobs: ParallelOption = None,
    cluster: ClusterOption = None,
    config: ConfigOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Train concepts from photo folders into adapters, each in a slot of its own.

    -o is the adapter (.safetensors), or a folder for several concepts that are not trained jointly.
    """
    files, overrides = files_and_settings(words)
    folders = [Path(file) for file in files]
    if not folders:
        raise UserError("No photo folder is given; name one before the settings.")
    strange = [folder for folder in folders if not (folder.is_dir() or is_dataset(folder))]
    if len(folders) > 1 and strange:
        raise UserError(f"'{strange[0]}' is neither a photo folder nor a setting; settings are written key=value.")
    if joint:
        flags["joint_concepts"] = [str(folder) for folder in folders[1:]]
    if len(folders) > 1 and not joint:
        if status:
            raise UserError("Several concepts keep a status file each beside their adapters; leave out --status.")
        where = Where(executor or Executors.local, jobs, cluster)
        train_batch(folders, config, flags, overrides, resume, force, where)
    elif executor:
        settings = resolve(TrainConfig, "train", config, flags | {"concept": str(folders[0])}, overrides)
        submit_single(settings, status, Where(executor, jobs, cluster))
    else:
        train_single(config, flags | {"concept": str(folders[0])}, overrides, resume, force, status)


def train_single(
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    resume: bool,
    force: bool,
    status: Path | None,
) -> None:
    """Train one concept in this process."""
    with importing():
        from ..core.errors import Cancelled
        from ..core.hooks import silent
        from ..training.distributed import is_main_process
        from ..training.output import is_done
        from ..training.run import train_to_file
        from ..training.status import reporting, status_path

    beside = status == Path("auto")
    if beside:
        status = status_path(Path(flags["output"])) if "output" in flags else None
    tell = echo if is_main_process() else lambda text: None  # only the main process prints
    with progress_bar() as bar, stop_signals() as should_stop:
        try:
            with reporting(
                status if is_main_process() else None, bar if is_main_process() else silent, tell
            ) as reporter:
                settings = resolve(TrainConfig, "train", config, flags, overrides)
                if beside and is_main_process():
                    reporter.path = status_path(settings.output)
                reporter.begin(settings, settings.output, resume)
                done = resume and is_done(settings, force)
                train_to_file(
                    settings,
                    resume,
                    Hooks(progress=reporter.progress, notify=reporter.note, should_stop=should_stop),
                    force=force,
                )
        except Cancelled as stopped:
            tell(str(stopped))
            raise typer.Exit(130) from stopped
    if not done:
        tell(f"Wrote {settings.output}.")


def submit_single(settings: TrainConfig, status: Path | None, where: Where) -> None:
    """Submit the training of one adapter."""
    from ..batch.concepts import training_job
    from ..batch.job import job_name

    given = None if status == Path("auto") else status
    arguments = [*this_command(["--status"]), "--status", str(given or "auto")]
    job = training_job(job_name(settings.output.stem), arguments, settings.output, given)
    submit_jobs(settings.output.parent, [job], where.executor, where.cluster, where.jobs)


class Where(NamedTuple):
    """Where a batch runs."""

    executor: Executors
    jobs: int | None
    cluster: list[str] | None


def _is_own(word: str) -> bool:
    return word.partition("=")[0] in OWN


def train_batch(
    folders: list[Path],
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    resume: bool,
    force: bool,
    where: Where,
) -> None:
    """Train several concepts, each in its own process."""
    from ..batch.job import BatchFolder

    output = Path(flags.get("output") or "")
    if output == Path() or output.suffix == ".safetensors":
        raise UserError("Several concepts need a folder for their adapters: -o adapters/.")
    at_once = (where.jobs or 1) > 1 or where.executor is not Executors.local
    if at_once and any("overlap_weight" in word for word in (*overrides, *flags)):
        raise UserError("interference.overlap_weight keeps off the adapters that are done, so --jobs 1 is needed.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("accelerate launch trains one concept; of several, run --jobs side by side without it.")
    if own := [*(f"{name}={flags[name]}" for name in OWN if name in flags), *filter(_is_own, overrides)]:
        raise UserError(f"{own[0]} cannot apply to every concept; put it into the concept.yaml of its folder.")
    check_executor(where.executor)
    cluster_of(where.cluster, where.jobs)  # a wrong one is refused before any work
    with importing():
        from ..batch.concepts import trainings, without_done

    def settings(folder: Path, file: Path) -> TrainConfig:
        paths = {"concept": str(folder), "output": str(file)}
        resolved: TrainConfig = resolve(TrainConfig, "train", config, {**flags, **paths}, overrides)
        return resolved

    batch = trainings(folders, output, settings)
    if resume:
        batch = without_done(batch, force, Hooks(notify=echo))
    if batch:
        submit_batch(BatchFolder(output), batch_of(batch, output, resume, force, where))
    if where.executor is Executors.local:
        echo(f"Wrote {len(folders)} adapters into {output}/.")


def batch_of(trainings: Sequence[Training], output: Path, resume: bool, force: bool, where: Where) -> Batch:
    """The batch of several trainings, their slots reserved."""
    from ..batch.concepts import training_jobs, with_slots, write_configs
    from ..batch.estimate import needed
    from ..batch.job import PREPARE, Batch, BatchFolder, Job
    from ..batch.submission import check_idle

    folder = BatchFolder(output)
    jobs = training_jobs(folder, trainings, resume, force)
    check_idle(folder, jobs)
    settled, base = with_slots(trainings, resume)
    write_configs(folder, settled)
    cluster = cluster_of(where.cluster, where.jobs)
    prepare = None
    if where.executor is not Executors.local:
        cluster = cluster.filled(needed(settled[0].config, base))
    if where.executor is Executors.slurm:
        prepare = Job(name=PREPARE, arguments=("batch", "prepare", str(output)))
    return Batch(executor=where.executor.value, cluster=cluster, prepare=prepare, jobs=jobs)
