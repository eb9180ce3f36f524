"""The verb that trains a T2I-Adapter: sketches or keyposes for your own base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.control import ControlConfig
from ..core.hooks import Hooks
from .options import settings_flags
from .support import ConfigOption, Overrides, ResumeOption, echo, progress_bar, resolve, stop_signals


@settings_flags(ControlConfig, without={"folder"})
def train_control(
    folder: Annotated[
        Path, typer.Argument(help="Pictures, with their control images in sketch/ or keypose/, and captions.")
    ],
    overrides: Overrides = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Train a T2I-Adapter that makes a base's pictures follow sketches or keyposes."""
    from ..config.scene import ControlImage
    from ..core.errors import Cancelled
    from ..scenes.control import read_control_image
    from ..training.control_adapter import train_control as train

    settings = resolve(ControlConfig, "train-control", config, flags | {"folder": str(folder)}, overrides)
    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            hooks = Hooks(progress, echo, should_stop)
            train(
                settings,
                None,
                resume,
                hooks,
                lambda path: read_control_image(ControlImage(file=path, kind=settings.kind)).image,
            )
        except Cancelled as stopped:
            echo(str(stopped))
            raise typer.Exit(130) from stopped
    echo(f"Wrote {settings.output}/; a scene's control image takes it with adapter: {settings.output}.")
