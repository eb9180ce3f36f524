"""The verb that trains a T2I-Adapter: sketches or keyposes for a base of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.control import ControlConfig
from ..core.hooks import Hooks
from .options import settings_flags
from .support import ConfigOption, Overrides, ResumeOption, progress_bar, resolve, say, stop_signals


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
    """Train a T2I-Adapter that holds a base's pictures to sketches or keyposes."""
    from ..config.scene import ControlImage
    from ..core.errors import Cancelled
    from ..scenes.control import read_control_image
    from ..training.control_adapter import train_control as train

    settings = resolve(ControlConfig, "train-control", config, flags | {"folder": str(folder)}, overrides)
    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            hooks = Hooks(progress, say, should_stop)
            train(
                settings,
                None,
                resume,
                hooks,
                lambda path: read_control_image(ControlImage(file=path, kind=settings.kind)).image,
            )
        except Cancelled as stopped:
            say(str(stopped))
            raise typer.Exit(130) from stopped
    say(f"Wrote {settings.output}/; a scene's condition takes it with adapter: {settings.output}.")
