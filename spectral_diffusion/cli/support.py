"""Shared by the verbs: settings from flags, a progress bar, stop signals."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UserError
from ..core.files import exists
from ..core.hooks import Pace, brief_duration

if TYPE_CHECKING:
    from ..core.hooks import Event


ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A YAML file, or a preset by name (pocket, sd15-12gb, …).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any setting as key=value.", show_default=False)]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the state of a stopped run, if there is one.")]
StrengthOption = Annotated[list[str] | None, typer.Option(help="NAME=0.8, or NAME.text_encoder=0.5. Repeat for more.")]


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and other large libraries without garbage collection, which takes a quarter of that time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay, so later collections skip them
        gc.enable()


def files_and_settings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A verb's arguments: names of files and folders, and settings as key=value that are no such name."""
    files = [argument for argument in arguments if "=" not in argument or exists(argument)]
    return files, [argument for argument in arguments if argument not in files]


def echo(text: str) -> None:
    """Print one line."""
    typer.echo(text)


def given(**values: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def as_text(value: Any) -> str:
    """A JSON-able value as readable text."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def table_of(columns: dict[str, dict[str, float]]) -> str:
    """Numbers by column and row as text; a dash where a column has no such row."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    first = max([len(name) for name in rows] or [0])
    widths = {name: max(len(name), 8) for name in columns}
    lines = [" " * (first + 2) + "  ".join(f"{name:>{widths[name]}}" for name in columns)]
    for row in rows:
        cells = [f"{columns[n][row]:>{w}.4f}" if row in columns[n] else f"{'–':>{w}}" for n, w in widths.items()]
        lines.append(f"  {row:<{first}}" + "  ".join(cells))
    return "\n".join(lines)


def numbers(pairs: list[str] | None, option: str) -> dict[str, float] | None:
    """``["a.safetensors=0.8", "b"]`` to ``{"a.safetensors": 0.8, "b": 1.0}``."""
    if not pairs:
        return None
    out = {}
    for pair in pairs:
        name, equals, text = pair.rpartition("=")
        if not equals or exists(pair):
            name, text = pair, "1"
        try:
            out[name] = float(text)
        except ValueError as error:
            raise UserError(f"{option} '{pair}': '{text}' is not a number; write NAME=0.8.") from error
    return out


def resolve(
    model: Any,
    verb: str,
    config: str | None,
    flags: dict[str, Any],
    overrides: list[str] | None,
    scene_settings: dict[str, Any] | None = None,
    source: str = "",
    base: str = "pocket",
) -> Any:
    """Preset or file, then a scene's settings (read from ``source``), then flags, then key=value.

    See :func:`..config.presets.settings_for`; ``base`` is the default base.
    """
    from ..config.presets import settings_for
    from ..config.settings import parse_overrides

    changes = parse_overrides(overrides or [])
    return settings_for(
        model, verb, flags, changes, config=config, scene_settings=scene_settings, source=source, base=base
    )


def named_base(files: list[str], overrides: list[str] | None = None) -> str:
    """The base of the first of these adapters or fused folders; empty if all are LoRAs of other programs.

    Raises:
        UserError: one is missing or damaged.
    """
    from ..adapters.formats.reading import is_foreign
    from ..config.settings import parse_overrides
    from ..merging.manifest import base_name_of

    written = parse_overrides(overrides or []).get("adapters") or []
    paths = map(Path, files or (written if isinstance(written, list) else [written]))
    first = next((path for path in paths if not is_foreign(path)), None)
    return base_name_of(first) if first else ""


@contextmanager
def progress_bar() -> Iterator[Callable[[Event], None]]:
    """A bar per stage with the remaining time; without a terminal a line from time to time."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(lambda line: typer.echo(line, err=True))
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total, figures="")
            figures = " ".join(f"{k} {v:.4f}" for k, v in event.metrics.items() if isinstance(v, float))
            bar.update(tasks[event.stage], completed=event.done, total=event.total, figures=figures)
            if event.done >= event.total:
                tasks.pop(event.stage)

        yield show


class ProgressLines:
    """Progress for a log file: a line with step, rate and time left at most every ``every`` seconds.

    Args:
        write: takes a line.
        clock: returns seconds; for tests.
    """

    def __init__(
        self, write: Callable[[str], None], every: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._every, self._clock = write, every, clock
        self._pace = Pace()
        self._stage, self._last = "", clock()

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if event.stage != self._stage:
            self._stage, self._pace = event.stage, Pace()
        self._pace.add(event.done, now)
        if now - self._last < self._every:
            return
        self._last = now
        parts = [f"{event.stage} {event.done}/{event.total}"]
        if seconds := self._pace.seconds_per_step:
            rate = f"{seconds:.2f} s/step" if seconds >= 0.1 else f"{1 / seconds:.0f} steps/s"
            parts += [rate, f"{brief_duration(seconds * (event.total - event.done))} left"]
        parts += [f"{key} {value:.4f}" for key, value in event.metrics.items() if isinstance(value, float)]
        self._write(", ".join(parts))


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM make the loop save and stop; a second SIGINT stops at once.

    A cluster may send SIGTERM several times, and means the same each time.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
