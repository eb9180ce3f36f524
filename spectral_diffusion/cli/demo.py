"""The verb that goes from two photo folders to one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.hooks import Hooks
from .support import echo, progress_bar


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
