"""The verb that measures adapters, fusions and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.hooks import Hooks
from .support import (
    ConfigOption,
    DeviceOption,
    files_and_settings,
    given,
    named_base,
    numbers,
    progress_bar,
    resolve,
    say,
    stop_signals,
    text_of,
)

if TYPE_CHECKING:
    from ..evaluation.summary import Evaluation


def evaluate(
    words: Annotated[
        list[str] | None, typer.Argument(help="Adapter files, or one fused folder; then key=value.", show_default=False)
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Photos of a concept, or a folder of them each; default: the training photos.")
    ] = None,
    others: Annotated[
        bool, typer.Option("--others", help="Further concepts in that folder can be mistaken for too.")
    ] = False,
    pictures: Annotated[Path | None, typer.Option(help="A folder of pictures made here, measured as they are.")] = None,
    scene: Annotated[list[str] | None, typer.Option(help="A scene file to draw and measure by region; repeat.")] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="pocket, or a CLIP or DINOv2 model by folder or hub id; repeat.")
    ] = None,
    strength: Annotated[list[str] | None, typer.Option(help="NAME=0.8 in the sum of adapters; repeat.")] = None,
    base: Annotated[str | None, typer.Option(help="Default: the base the adapters were trained on.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder of the report.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same pictures.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures per prompt.")] = None,
    allow_base: Annotated[bool, typer.Option("--allow-base", help="Accept a close relative of the base.")] = False,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    config: ConfigOption = None,
) -> None:
    """Measure what your concepts keep: identity, who is taken for whom, text, drift; a report with pictures."""
    files, overrides = files_and_settings(words or [])
    flags = given(
        adapters=files or None, references=text_of(references), others=others or None, pictures=text_of(pictures),
        scenes=scene, encoders=encoder, scales=numbers(strength, "--strength"), base=base, output=text_of(output),
        seed=seed, num_images=count, allow_base=allow_base or None, device=device, dtype=dtype,
    )  # fmt: skip
    from ..core.errors import Cancelled
    from ..evaluation.run import evaluate_to_folder
    from ..evaluation.settings import EvaluateConfig
    from ..scenes.scene import read_scene

    meant = named_base(files) if files else str(read_scene(Path(scene[0])).get("base", "pocket")) if scene else "pocket"
    settings = resolve(EvaluateConfig, "evaluate", config, flags, overrides, base=meant)
    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            found = evaluate_to_folder(settings, Hooks(progress=progress, notify=say, should_stop=should_stop))
        except Cancelled as stopped:
            say("Stopped; what is drawn is kept, run it again to go on.")
            raise typer.Exit(130) from stopped
    show(found)
    say(f"Wrote {settings.output}/evaluation.html, with .md, .json and a contact sheet (.png) beside it.")


def show(found: Evaluation) -> None:
    """The tables on the terminal, means only: the report has their intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..evaluation.measure import ALL, PHOTOS
    from ..evaluation.summary import FLOOR, matrix_rows, matrix_title, sentences, tables
    from ..evaluation.tables import cell_text

    console = Console(highlight=False)
    matrices = {
        f"Whose photos are nearest, shown as {matrix_title(matrix, found.encoders)}": matrix_rows(matrix)
        for matrix in found.confusion()
        if matrix["way"] not in (PHOTOS, FLOOR)
    }
    for title, rows in {**tables(found, intervals=False), **matrices}.items():
        console.print(Text(f"\n{title}", style="bold"))
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(rows[0]):
            table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            style = "bold" if row.get("concept") == ALL else ""
            table.add_row(*(Text(cell_text(value)) for value in row.values()), style=style)
        console.print(table)
    for sentence in sentences(found):
        say(sentence)
