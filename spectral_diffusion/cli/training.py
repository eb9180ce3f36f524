"""The verb that trains concepts, one or a batch of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.train import TrainConfig
from ..core.errors import UserError
from ..core.hooks import Hooks
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
    from ..training.multi_concept import BatchJob

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
    jobs: Annotated[int, typer.Option(min=1, help="Of several concepts, how many side by side.")] = 1,
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
    if len(folders) > 1 and (strange := [folder for folder in folders if not folder.is_dir()]):
        raise UserError(f"'{strange[0]}' is neither a photo folder nor a setting; settings are written key=value.")
    if "init_from_adapter" in flags and "method" not in flags:
        from ..adapters.formats.native import load_adapter

        flags["method"] = load_adapter(flags["init_from_adapter"]).method.name  # whose learning rates they are
    if joint:
        flags["joint_concepts"] = [str(folder) for folder in folders[1:]]
    if len(folders) > 1 and not joint:
        if status:
            raise UserError("Several concepts keep a status file each beside their adapters; leave out --status.")
        train_batch(folders, config, flags, overrides, resume, force, jobs)
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


def _is_own(word: str) -> bool:
    return word.partition("=")[0] in OWN


def train_batch(
    folders: list[Path],
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    resume: bool,
    force: bool,
    jobs: int,
) -> None:
    """Train several concepts, each in its own process."""
    from ..core.errors import Cancelled
    from ..training.multi_concept import batch_jobs, run_batch

    output = Path(flags.get("output") or "")
    if output == Path() or output.suffix == ".safetensors":
        raise UserError("Several concepts need a folder for their adapters: -o adapters/.")
    if jobs > 1 and any("overlap_weight" in word for word in (*overrides, *flags)):
        raise UserError("interference.overlap_weight keeps off the adapters that are done, so --jobs 1 is needed.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("accelerate launch trains one concept; of several, run --jobs side by side without it.")
    if own := [*(f"{name}={flags[name]}" for name in OWN if name in flags), *filter(_is_own, overrides)]:
        raise UserError(f"{own[0]} cannot apply to every concept; put it into the concept.yaml of its folder.")

    def settings(folder: Path, file: Path) -> TrainConfig:
        where = {"concept": str(folder), "output": str(file)}
        resolved: TrainConfig = resolve(TrainConfig, "train", config, {**flags, **where}, overrides)
        return resolved

    def command(job: BatchJob, file: Path) -> list[str]:
        options = ["-o", str(job.output), "--config", str(file), "--status", "auto"]
        goes_on = ["--resume"] * resume + ["--force"] * force
        return [sys.executable, "-m", __package__, "train", str(job.config.concept), *options, *goes_on]

    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            run_batch(
                batch_jobs(folders, output, settings),
                command,
                jobs,
                resume,
                force,
                Hooks(progress=progress, notify=echo, should_stop=should_stop),
            )
        except Cancelled as stopped:
            echo(str(stopped))
            raise typer.Exit(130) from stopped
    echo(f"Wrote {len(folders)} adapters into {output}/.")
