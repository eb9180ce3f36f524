"""The verb that trains concepts, one or a batch of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UserError
from ..core.hooks import Hooks
from .support import (
    BaseOption,
    ConfigOption,
    DeviceOption,
    FrozenOption,
    ResumeOption,
    StepsOption,
    files_and_settings,
    given,
    importing,
    progress_bar,
    resolve,
    say,
    stop_signals,
    text_of,
)

if TYPE_CHECKING:
    from ..training.multi_concept import BatchJob

OWN = ("name", "token", "class_noun")  # settings that no two concepts can share


def train(
    words: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Folders with your photos; then any setting as key=value.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The adapter (.safetensors); a folder for several concepts.")
    ] = None,
    base: BaseOption = None,
    method: Annotated[str | None, typer.Option(help="spectral-additive, lora …")] = None,
    rank: Annotated[int | None, typer.Option(help="Columns (or LoRA rank) per concept.")] = None,
    budget: Annotated[str | None, typer.Option(help="The largest rank that trains no more numbers: 200k, 2m.")] = None,
    slot: Annotated[
        str | None, typer.Option(help="next, a number, columns (16:24 or 1,5,9), sampled, random, bottom.")
    ] = None,
    steps: StepsOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    device: DeviceOption = None,
    dtype: FrozenOption = None,
    resume: ResumeOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume with other settings; else replace what --resume would go on with.")
    ] = False,
    continue_from: Annotated[
        Path | None, typer.Option("--continue", help="Go on from a spectral-rotation adapter's turned columns.")
    ] = None,
    status: Annotated[
        Path | None, typer.Option(help="Keep a status file (.json); 'auto' puts it beside the output.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Of several concepts, how many side by side.")] = 1,
    config: ConfigOption = None,
) -> None:
    """Train concepts from photo folders into adapters, each in a slot of its own."""
    files, overrides = files_and_settings(words)
    folders = [Path(file) for file in files]
    if not folders:
        raise UserError("Which photos? Name a folder with them before the settings.")
    if len(folders) > 1 and (strange := [folder for folder in folders if not folder.is_dir()]):
        raise UserError(f"'{strange[0]}' is no folder with photos, and no setting either; those are written key=value.")
    if continue_from and not method:
        from ..adapters.formats.native import load_adapter

        method = load_adapter(continue_from).method.name  # whose learning rates they are
    flags = given(
        base=base, method=method, rank=rank, param_budget=budget, slot=slot, steps=steps, seed=seed, device=device,
        dtype=dtype, init_from_adapter=text_of(continue_from),
    )  # fmt: skip
    if len(folders) > 1:
        if status:
            raise UserError("Several concepts keep a status file each beside their adapters; leave out --status.")
        train_batch(folders, output, config, flags, overrides, resume, force, jobs)
    else:
        flags |= given(concept=str(folders[0]), output=text_of(output))
        train_one(output, config, flags, overrides, resume, force, status)


def train_one(
    output: Path | None,
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    resume: bool,
    force: bool,
    status: Path | None,
) -> None:
    """Train one concept in this process."""
    with importing():
        from ..config.train import TrainConfig
        from ..core.errors import Cancelled
        from ..core.hooks import silent
        from ..training.distributed import is_main_process
        from ..training.output import is_done
        from ..training.run import train_to_file
        from ..training.status import reporting, status_path

    beside = status == Path("auto")
    if beside:
        status = status_path(output) if output else None
    tell = say if is_main_process() else lambda text: None  # of several processes one speaks
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


def train_batch(
    folders: list[Path],
    output: Path | None,
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    resume: bool,
    force: bool,
    jobs: int,
) -> None:
    """Train several concepts, each in a process of its own."""
    from ..config.train import TrainConfig
    from ..core.errors import Cancelled
    from ..training.multi_concept import batch_jobs, run_batch

    if output is None or output.suffix == ".safetensors":
        raise UserError("Several concepts need a folder for their adapters: -o adapters/.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("accelerate launch trains one concept; of several, run --jobs side by side without it.")
    if own := [word for word in overrides if word.partition("=")[0] in OWN]:
        raise UserError(f"{own[0]} cannot be every concept's; put it into the concept.yaml of its folder.")

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
                Hooks(progress=progress, notify=say, should_stop=should_stop),
            )
        except Cancelled as stopped:
            say(str(stopped))
            raise typer.Exit(130) from stopped
    say(f"Wrote {len(folders)} adapters into {output}/.")
