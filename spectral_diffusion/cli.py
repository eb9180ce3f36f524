"""The command line. Heavy imports happen inside the verbs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from .progress import Event

app = typer.Typer(
    name="spectral-diffusion",
    help="Several of your own things together in one picture, each still itself.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
slots_app = typer.Typer(help="Which columns of the spectrum belong to which concept.", no_args_is_help=True)
pocket_app = typer.Typer(help="The pocket base: where it lies, and how it is made.", no_args_is_help=True)
app.add_typer(slots_app, name="slots")
app.add_typer(pocket_app, name="pocket")

ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A YAML file, or a preset by name (pocket, sd15-12gb, …).")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any setting as key=value.", show_default=False)]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps …")]


@app.command()
def train(
    concept: Annotated[Path, typer.Argument(help="The folder with your photos.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The adapter to write (.safetensors).")] = None,
    base: Annotated[
        str | None, typer.Option(help="pocket, a diffusers folder, a hub id or a .safetensors file.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="spectral-additive, lora …")] = None,
    rank: Annotated[int | None, typer.Option(help="Columns (or LoRA rank) per concept.")] = None,
    slot: Annotated[str | None, typer.Option(help="next, a slot number, or columns such as 16:24.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen base: float32, float16, bfloat16.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state of a stopped run, if there is one.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Train one concept from a photo folder into an adapter in a slot of its own."""
    flags = given(
        concept=str(concept), output=_text(output), base=base, method=method, rank=rank, slot=slot, steps=steps,
        seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    from .config import TrainConfig

    settings = resolve(TrainConfig, "train", config, flags, overrides)
    from .training.loop import Stopped
    from .training.run import train_to_file

    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            train_to_file(settings, resume, progress, should_stop, note=say)
        except Stopped as stopped:
            say(str(stopped))
            raise typer.Exit(130) from stopped
    say(f"Wrote {settings.output}.")


@app.command()
def fuse(
    adapters: Annotated[list[str], typer.Argument(help="Adapter files; settings may follow as key=value.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The diffusers folder to write.")] = None,
    base: Annotated[str | None, typer.Option(help="Default: the base the adapters were trained on.")] = None,
    merge: Annotated[str | None, typer.Option(help="How to merge: spectral.")] = None,
    form: Annotated[str | None, typer.Option(help="sum, mean or paper.")] = None,
    strength: Annotated[list[str] | None, typer.Option(help="NAME=0.8; may be repeated.")] = None,
    allow_base: Annotated[bool, typer.Option("--allow-base", help="Accept a close relative of the base.")] = False,
    device: DeviceOption = None,
    config: ConfigOption = None,
) -> None:
    """Fuse several adapters into one checkpoint that stock diffusers opens."""
    files = [word for word in adapters if "=" not in word or Path(word).exists()]
    overrides = [word for word in adapters if word not in files]
    flags = given(
        adapters=files, output=_text(output), base=base, merge=merge, form=form, device=device,
        strength=numbers(strength, "--strength"), allow_base=allow_base or None,
    )  # fmt: skip
    from .config import FuseConfig

    settings = resolve(FuseConfig, "fuse", config, flags, overrides)
    from .fusion.recipe import fuse_to_folder

    with progress_bar() as progress:
        for warning in fuse_to_folder(settings, progress):
            say(f"Note: {warning}")
    say(f"Wrote {settings.output}/; open it with --base {settings.output} or StableDiffusionPipeline.from_pretrained.")


@app.command()
def generate(
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw; tokens such as <rex> name your concepts.")] = None,
    base: Annotated[
        str | None, typer.Option(help="pocket, a fused or diffusers folder, a hub id, a checkpoint.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="FILE or FILE=0.8; may be repeated.")] = None,
    sketch: Annotated[Path | None, typer.Option(help="A drawing that says where things are.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The picture to write (.png).")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures, with seeds seed, seed+1, …")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    allow_base: Annotated[bool, typer.Option("--allow-base", help="Accept a close relative of the base.")] = False,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    config: ConfigOption = None,
) -> None:
    """Make pictures from a prompt, with adapters or a fused folder, held to a sketch if you like."""
    flags = given(
        prompt=prompt, base=base, adapters=numbers(adapter, "--adapter"), sketch=_text(sketch), output=_text(output),
        seed=seed, count=count, width=width, height=height, device=device, dtype=dtype, allow_base=allow_base or None,
    )  # fmt: skip
    from .config import GenerateConfig, to_yaml

    settings = resolve(GenerateConfig, "generate", config, flags, overrides)
    from .files import write_text
    from .generation.pipeline import generate_to_file

    with progress_bar() as progress:
        paths = generate_to_file(settings, progress, note=say)
    write_text(settings.output.with_suffix(".yaml"), to_yaml(settings))
    say(f"Wrote {', '.join(map(str, paths))}.")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter, a fused folder or a picture.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what is in an adapter, a fused folder or a picture."""
    from .inspection import inspect_path

    found = inspect_path(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            if isinstance(value, dict):
                say(f"{key}:")
                for name, inner in value.items():
                    say(f"  {name}: {_plain(inner)}")
            else:
                say(f"{key}: {_plain(value)}")


@app.command()
def methods(
    arch: Annotated[str, typer.Option(help="sd15 or pocket.")] = "sd15",
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to count; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the methods and how many numbers each trains."""
    if any(r < 1 for r in rank or []):
        raise UserError("Rank must be at least 1.")
    from .architectures import RANKS, count_table
    from .methods import all_methods

    rows = count_table(arch, tuple(rank) if rank else RANKS)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, method in sorted(all_methods().items()):
        counts = ", ".join(f"r={row['rank']}: {row['trainable']:,}" for row in rows if row["method"] == name)
        say(f"{name}: {method.summary}\n  {counts}")


@slots_app.command("list")
def slots_list(
    folder: Annotated[Path, typer.Argument(help="The folder of the adapters.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show the ledger of a folder."""
    from .slots import LEDGER, Ledger

    path = folder if folder.suffix == ".json" else folder / LEDGER
    data = Ledger(path).read()
    if as_json:
        typer.echo(json.dumps({b: {n: [s.start, s.stop] for n, s in c.items()} for b, c in data.items()}, indent=2))
        return
    if not any(data.values()):
        say(f"No slots are taken in {path}.")
    for base, concepts in data.items():
        say(f"base {base[:12]}")
        for name, slot in sorted(concepts.items(), key=lambda item: item[1]):
            say(f"  {slot}  {name}")


@slots_app.command("release")
def slots_release(
    concept: Annotated[str, typer.Argument(help="The concept whose columns shall be free again.")],
    folder: Annotated[Path, typer.Argument(help="The folder of the adapters.")] = Path(),
) -> None:
    """Free a concept's columns."""
    from .slots import LEDGER, Ledger

    freed = Ledger(folder if folder.suffix == ".json" else folder / LEDGER).release(concept)
    say(f"Released {', '.join(map(str, freed))} of '{concept}'.")


@pocket_app.command("path")
def pocket_path() -> None:
    """Print the folder of the pocket base."""
    from . import pocket

    typer.echo(str(pocket.path()))


@pocket_app.command("pretrain")
def pocket_pretrain(
    work: Annotated[Path, typer.Option(help="Folder for artwork, checkpoints and the result; resumable.")] = Path(
        "pretraining"
    ),
    vae_minutes: Annotated[float, typer.Option(help="Minutes for the autoencoder.")] = 15,
    until: Annotated[int | None, typer.Option(help="Stop at this step.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Pretrain the pocket base from openly licensed artwork (hours on a CPU; goes on where it stopped)."""
    import torch

    from .pocket.workshop.art import icon_sets
    from .pocket.workshop.pretrain import train_base
    from .pocket.workshop.render import Renderer
    from .pocket.workshop.vae import train_vae

    torch.set_num_threads(threads)
    renderer = Renderer(icon_sets(work / "art"))
    if not (work / "vae").is_dir():
        train_vae(renderer, work, vae_minutes, report=say)
    train_base(renderer, work, until=until, report=say)
    say(f"The pipeline is in {work / 'pipeline'}.")


@pocket_app.command("concepts")
def pocket_concepts(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the photo folders.")] = Path(
        "concepts"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the artwork.")] = Path("pretraining"),
) -> None:
    """Draw the ready-made concept folders again."""
    from .pocket.workshop.art import icon_sets
    from .pocket.workshop.concepts import make_all
    from .pocket.workshop.render import Renderer

    make_all(Renderer(icon_sets(work / "art")), output)
    say(f"Wrote {output}/.")


@pocket_app.command("naming")
def pocket_naming(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the sheet, the names and the key.")],
    base: Annotated[str, typer.Option(help="The pocket base, or a folder of the same kind.")] = "pocket",
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 0,
) -> None:
    """Draw 32 unlabelled pictures to be named blindly from a list of 16 names."""
    from .pocket.workshop.naming import make_naming

    make_naming(output, base, seed)
    say(f"Wrote {output}/: name the pictures of sheet.png from names.txt, then look at key.json.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write everything.")] = Path("demo"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps per concept (default: the pocket preset's).")
    ] = None,
) -> None:
    """From two photo folders to one picture, on the pocket base."""
    from .demo import run_demo

    with progress_bar() as progress:
        sheet = run_demo(output, steps, progress, note=say)
    say(f"Done. Look at {sheet}; the adapters, the fused folder and the settings are beside it in {output}/.")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 7860,
    workspace: Annotated[Path, typer.Option(help="Folder for adapters and pictures.")] = Path("workspace"),
) -> None:
    """Open the app in a browser, on this machine only."""
    try:
        from .ui.app import build
    except ImportError as error:
        raise UserError("The UI needs gradio: pip install 'spectral-diffusion[ui]'.") from error
    from .ui.app import launch

    launch(build(workspace), port)


# --- shared by the verbs -------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line for the person."""
    typer.echo(text)


def given(**values: Any) -> dict[str, Any]:
    """The options that were really given."""
    return {name: value for name, value in values.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def numbers(pairs: list[str] | None, option: str) -> dict[str, float] | None:
    """``["a.safetensors=0.8", "b"]`` to ``{"a.safetensors": 0.8, "b": 1.0}``."""
    if not pairs:
        return None
    out = {}
    for pair in pairs:
        name, equals, text = pair.rpartition("=")
        if not equals or Path(pair).exists():
            name, text = pair, "1"
        try:
            out[name] = float(text)
        except ValueError as error:
            raise UserError(f"{option} '{pair}': '{text}' is not a number; write NAME=0.8.") from error
    return out


def resolve(model: Any, verb: str, config: str | None, flags: dict[str, Any], overrides: list[str] | None) -> Any:
    """Preset or file, then flags, then key=value. Without --config the pocket base brings its preset."""
    from .config import build, parse_overrides, read_yaml
    from .resources import preset

    changes = parse_overrides(overrides or [])
    chosen = config
    if chosen is None and _is_pocket(str(changes.get("base", flags.get("base", "pocket")))):
        chosen = "pocket"
    layer: dict[str, Any] = {}
    if chosen is not None:
        layer = read_yaml(preset(chosen))
        verbs = {"train", "fuse", "generate"}
        if layer and set(layer) <= verbs:
            layer = layer.get(verb) or {}
            if not isinstance(layer, dict):
                raise UserError(f"The part '{verb}' of {chosen} must hold key: value lines.")
    return build(model, layer, flags, changes, file=config or "")


def _is_pocket(base: str) -> bool:
    if base == "pocket":
        return True
    recipe = Path(base) / "recipe.json"
    try:
        return recipe.is_file() and json.loads(recipe.read_text()).get("base") == "pocket"
    except (ValueError, OSError, AttributeError):
        return False


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


def main() -> None:
    """Run the command line; what a person can mend is one sentence and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the libraries are imported
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
