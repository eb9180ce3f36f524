"""The verb that trains a T2I-Adapter: sketches or keyposes for a base of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.hooks import Hooks
from .support import (
    BaseOption,
    ConfigOption,
    DeviceOption,
    FrozenOption,
    Overrides,
    ResumeOption,
    StepsOption,
    given,
    progress_bar,
    resolve,
    say,
    stop_signals,
    text_of,
)


def train_control(
    folder: Annotated[
        Path, typer.Argument(help="Pictures, with their conditions in sketch/ or keypose/, and captions.")
    ],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The T2I-Adapter folder to write.")] = None,
    base: BaseOption = None,
    kind: Annotated[str | None, typer.Option(help="sketch or keypose.")] = None,
    steps: StepsOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    device: DeviceOption = None,
    dtype: FrozenOption = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
) -> None:
    """Train a T2I-Adapter that holds a base's pictures to sketches or keyposes."""
    flags = given(
        folder=str(folder), output=text_of(output), base=base, kind=kind, steps=steps, seed=seed,
        device=device, dtype=dtype,
    )  # fmt: skip
    from ..config.control import ControlConfig
    from ..core.errors import Cancelled
    from ..scenes.control import read_control_image
    from ..scenes.scene import ControlImage
    from ..training.control_adapter import train_control as train

    settings = resolve(ControlConfig, "train-control", config, flags, overrides)
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
