"""What the verbs share: settings from flags, a progress bar, stop signals."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..files import is_there

if TYPE_CHECKING:
    from ..progress import Event


BaseOption = Annotated[str | None, typer.Option(help="pocket, a diffusers folder, a hub id or a .safetensors file.")]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A YAML file, or a preset by name (pocket, sd15-12gb, …).")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps …")]
FrozenOption = Annotated[str | None, typer.Option(help="Of the frozen base: float32, float16, bfloat16.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any setting as key=value.", show_default=False)]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the state of a stopped run, if there is one.")]
StepsOption = Annotated[int | None, typer.Option(help="Training steps.")]


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and its like without searching for garbage meanwhile, which takes a quarter of that time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay, so that later searches leave them out
        gc.enable()


def files_and_settings(words: list[str]) -> tuple[list[str], list[str]]:
    """A verb's words: names of files and folders, and settings as key=value that are no such name."""
    files = [word for word in words if "=" not in word or is_there(word)]
    return files, [word for word in words if word not in files]


def say(text: str) -> None:
    """One line for the person."""
    typer.echo(text)


def given(**values: Any) -> dict[str, Any]:
    """The options that were really given."""
    return {name: value for name, value in values.items() if value is not None}


def text_of(path: Path | None) -> str | None:
    """A path option as a setting."""
    return None if path is None else str(path)


def plain(value: Any) -> str:
    """A JSON-able value for a person's eyes."""
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
        if not equals or is_there(pair):
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
    held: dict[str, Any] | None = None,
    source: str = "",
    base: str = "pocket",
) -> Any:
    """Preset or file, then what a scene held (read from ``source``), then flags, then key=value.

    Without --config the pocket base brings its preset; ``base`` is what is meant where no setting says so.
    """
    from ..config import build, parse_overrides, read_yaml
    from ..resources import preset, preset_of

    changes = parse_overrides(overrides or [])
    chosen = config or preset_of(str(changes.get("base", flags.get("base", (held or {}).get("base", base)))))
    layer: dict[str, Any] = {}
    if chosen is not None:
        layer = read_yaml(preset(chosen))
        verbs = {"train", "fuse", "generate", "train-condition", "evaluate"}
        if layer and set(layer) <= verbs:
            if verb == "train" and verb not in layer:
                raise UserError(f"{chosen} is a preset for {', '.join(layer)}; choose another for train with --config.")
            layer = layer.get(verb) or {}
            if not isinstance(layer, dict):
                raise UserError(f"The part '{verb}' of {chosen} must hold key: value lines.")
    if held:
        return build(model, held, {k: v for k, v in layer.items() if k not in held}, flags, changes, file=source)
    return build(model, layer, flags, changes, file=config or "")


def named_base(files: list[str], overrides: list[str] | None = None) -> str:
    """The base that the first of these adapters or fused folders names; empty where all are LoRAs of other programs.

    Raises:
        UserError: one is missing or damaged.
    """
    from ..config import parse_overrides
    from ..formats.reading import is_foreign
    from ..fusion.folder import base_of

    written = parse_overrides(overrides or []).get("adapters") or []
    paths = map(Path, files or (written if isinstance(written, list) else [written]))
    first = next((path for path in paths if not is_foreign(path)), None)
    return base_of(first) if first else ""


@contextmanager
def progress_bar() -> Iterator[Callable[[Event], None]]:
    """A bar per stage with the time that is left."""
    from rich.console import Console
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total, figures="")
            figures = " ".join(f"{k} {v:.4f}" for k, v in event.figures.items() if isinstance(v, float))
            bar.update(tasks[event.stage], completed=event.done, total=event.total, figures=figures)
            if event.done >= event.total:
                tasks.pop(event.stage)

        yield show


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask the loop to save and stop; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
