"""The verb that measures adapters, fusions and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.evaluate import EvaluateConfig
from ..core.hooks import Hooks
from .executors import ClusterOption, ExecutorOption, submit_jobs, this_command
from .options import settings_flags
from .support import (
    ConfigOption,
    StrengthOption,
    echo,
    files_and_settings,
    given,
    named_base,
    numbers,
    progress_bar,
    resolve,
    stop_signals,
)

if TYPE_CHECKING:
    from ..evaluation.summary import Evaluation


@settings_flags(
    EvaluateConfig,
    without={"adapters", "scales"},
    names={
        "num_images": "--count",
        "scenes": "--scene",
        "encoders": "--encoder",
        "prompts": "--prompt",
        "prior_prompts": "--prior-prompt",
    },
)
def evaluate(
    words: Annotated[
        list[str] | None, typer.Argument(help="Adapter files, or one fused folder; then key=value.", show_default=False)
    ] = None,
    strength: StrengthOption = None,
    config: ConfigOption = None,
    executor: ExecutorOption = None,
    cluster: ClusterOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Measure what your concepts keep: identity, who is taken for whom, text, drift; a report with pictures."""
    files, overrides = files_and_settings(words or [])
    flags |= given(adapters=files or None, scales=numbers(strength, "--strength"))
    from ..core.errors import Cancelled
    from ..evaluation.run import evaluate_to_folder
    from ..scenes.scene import read_scene

    scenes = flags.get("scenes")
    meant = "pocket"
    if files:
        meant = named_base(files)
    elif scenes:
        meant = str(read_scene(Path(scenes[0])).get("base", meant))
    settings = resolve(EvaluateConfig, "evaluate", config, flags, overrides, base=meant)
    if executor:
        from ..batch.job import Job

        output: Path = settings.output
        submit_jobs(output, [Job(name="evaluate", arguments=tuple(this_command()))], executor, cluster, None)
        return
    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            evaluation = evaluate_to_folder(settings, Hooks(progress=progress, notify=echo, should_stop=should_stop))
        except Cancelled as stopped:
            echo("Stopped; finished pictures are kept, run it again to go on.")
            raise typer.Exit(130) from stopped
    print_tables(evaluation)
    echo(f"Wrote {settings.output}/evaluation.html, with .md, .json and a contact sheet (.png) beside it.")


def print_tables(evaluation: Evaluation) -> None:
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
        f"Whose photos are nearest, shown as {matrix_title(matrix, evaluation.encoders)}": matrix_rows(matrix)
        for matrix in evaluation.confusion()
        if matrix["way"] not in (PHOTOS, FLOOR)
    }
    for title, rows in {**tables(evaluation, intervals=False), **matrices}.items():
        console.print(Text(f"\n{title}", style="bold"))
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(rows[0]):
            table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            style = "bold" if row.get("concept") == ALL else ""
            table.add_row(*(Text(cell_text(value)) for value in row.values()), style=style)
        console.print(table)
    for sentence in sentences(evaluation):
        echo(sentence)
