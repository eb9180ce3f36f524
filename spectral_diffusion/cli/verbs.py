"""The verbs of the command line. Heavy imports happen inside them, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config.control import ControlConfig
from ..config.fuse import FuseConfig
from ..config.train import TrainConfig
from ..core.hooks import Hooks
from .batch import batch_app
from .board import board_app
from .doctor import doctor
from .evaluation import evaluate
from .experiments import experiment
from .extract import extract_app
from .files import export, import_file, inspect
from .fusion import fuse, tune, unfuse
from .generation import generate
from .listings import merges, methods
from .options import nested_help
from .pocket import pocket_app
from .slots import slots_app
from .support import echo, progress_bar
from .train_control import train_control
from .training import train
from .ui import ui

app = typer.Typer(
    name="spectral-diffusion",
    help="Several of your own things together in one picture, each still itself.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write everything.")] = Path("demo"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps per concept (default: the pocket preset's).")
    ] = None,
) -> None:
    """From two photo folders to one picture, on the pocket base."""
    from ..demo import run_demo

    with progress_bar() as progress:
        sheet = run_demo(output, steps, Hooks(progress=progress, notify=echo))
    echo(f"Done. Look at {sheet}; the adapters, the fused folder and the settings are beside it in {output}/.")


app.command(epilog=nested_help(TrainConfig))(train)
app.command(epilog=nested_help(FuseConfig))(fuse)
app.command(epilog=nested_help(FuseConfig))(tune)
app.command()(unfuse)
app.command()(generate)
app.command()(evaluate)
app.command()(export)
app.command("import")(import_file)
app.command()(inspect)
app.command()(methods)
app.command()(merges)
app.add_typer(board_app, name="board")
app.add_typer(batch_app, name="batch")
app.add_typer(slots_app, name="slots")
app.add_typer(extract_app, name="extract")
app.command("train-control", epilog=nested_help(ControlConfig))(train_control)
app.command()(experiment)
app.add_typer(pocket_app, name="pocket")
app.command()(demo)
app.command()(ui)
app.command()(doctor)
