"""The verbs of the command line. Heavy imports happen inside them, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import UserError
from ..core.files import is_folder
from ..core.hooks import Hooks
from .doctor import doctor
from .evaluation import evaluate
from .experiments import experiment
from .pocket import pocket_app
from .scenes import (
    SceneSource,
    adapters_in,
    base_in,
    conditions,
    extract_app,
    generate_part,
    parse_adapter_scales,
    placed_apart,
    regions,
    scene_source,
    source_of,
)
from .support import (
    ConfigOption,
    DeviceOption,
    files_and_settings,
    given,
    importing,
    named_base,
    numbers,
    plain,
    progress_bar,
    resolve,
    say,
    stop_signals,
    table_of,
    text_of,
)
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
slots_app = typer.Typer(help="Which columns of the spectrum belong to which concept.", no_args_is_help=True)
app.add_typer(slots_app, name="slots")
app.add_typer(pocket_app, name="pocket")
app.add_typer(extract_app, name="extract")
app.command()(train)
app.command()(evaluate)
app.command()(experiment)
app.command()(ui)
app.command()(doctor)
app.command("train-control")(train_control)


@app.command()
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter files, or fused folders for what is inside; then key=value.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The diffusers folder to write.")] = None,
    base: Annotated[str | None, typer.Option(help="Default: the base the adapters were trained on.")] = None,
    merge: Annotated[str | None, typer.Option(help="How to merge; `merges` lists them.")] = None,
    form: Annotated[str | None, typer.Option(help="sum, mean or paper.")] = None,
    strength: Annotated[
        list[str] | None, typer.Option(help="NAME=0.8, or NAME.text_encoder=0.5; may be repeated.")
    ] = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="One more adapter for a fused folder; may be repeated.")
    ] = None,
    allow_base: Annotated[bool, typer.Option("--allow-base", help="Accept a close relative of the base.")] = False,
    device: DeviceOption = None,
    config: ConfigOption = None,
) -> None:
    """Fuse several adapters into one checkpoint that stock diffusers opens."""
    files, overrides = files_and_settings(adapters)
    files += [str(path) for path in add or []]
    flags = given(
        adapters=files, output=text_of(output), base=base, merge=merge, device=device,
        options={"form": form} if form else None, scales=numbers(strength, "--strength"), allow_base=allow_base or None,
    )  # fmt: skip
    with importing():
        from ..adapters.formats.reading import is_foreign
        from ..config.fuse import FuseConfig
        from ..merging.fuse import fuse_to_folder
        from ..merging.unfuse import settings_of

    folders = [path for path in map(Path, files) if is_folder(path) and not is_foreign(path)]
    before: dict[str, Any] = {}  # the settings of the fusions that are added to
    for folder in folders:
        held = settings_of(folder, [folder], Path("fused")).model_dump(mode="json", exclude={"output", "adapters"})
        before = {**held, **before, "scales": {**held["scales"], **before.get("scales", {})}}
    if before and config:
        raise UserError(f"{folders[0]} is added to with its own settings; give others as key=value, not with --config.")
    if before:
        flags = {**before, **flags, "scales": {**before["scales"], **flags.get("scales", {})}}
    settings = resolve(FuseConfig, "fuse", config, flags, overrides, base=named_base(files, overrides))
    with progress_bar() as progress:
        for warning in fuse_to_folder(settings, Hooks(progress=progress, notify=say)):
            say(f"Note: {warning}")
    say(f"Wrote {settings.output}/; open it with --base {settings.output} or StableDiffusionPipeline.from_pretrained.")


@app.command()
def tune(
    adapters: Annotated[list[str], typer.Argument(help="Adapter files; settings of fuse may follow as key=value.")],
    base: Annotated[str | None, typer.Option(help="Default: the base the adapters were trained on.")] = None,
    merge: Annotated[str | None, typer.Option(help="Which merge to tune.")] = None,
    strengths: Annotated[str, typer.Option(help="Strengths to try.")] = "0.5,0.65,0.8,0.9,1.0",
    anchors: Annotated[str, typer.Option(help="Anchors to try, for gradient and ssr.")] = "",
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    config: ConfigOption = None,
) -> None:
    """Find the strength (and anchor) of a fusion on held-out prompts; use other concepts than those you report."""
    files, overrides = files_and_settings(adapters)
    flags = given(adapters=files, output="tuned", base=base, merge=merge, device=device)
    from ..config.fuse import FuseConfig

    settings = resolve(FuseConfig, "fuse", config, flags, overrides, base=named_base(files, overrides))
    try:
        tries = [[float(part) for part in text.split(",") if part.strip()] for text in (strengths, anchors)]
    except ValueError as error:
        raise UserError("--strengths and --anchors are numbers with commas between, such as 0.5,0.8,1.") from error
    from ..merging.manifest import adapters_in_fusion
    from ..merging.search import search_scales as find
    from ..models.base import load_base

    loaded = [adapter for file in files for adapter in adapters_in_fusion(Path(file))]
    on = load_base(settings.base or loaded[0].base, settings.device)
    with progress_bar() as progress:
        found = find(on, loaded, settings, tries[0], tries[1], Hooks(progress=progress))
    if as_json:
        typer.echo(json.dumps([{**vars(one), "score": one.score} for one in found], indent=2))
        return
    for one in found:
        say(f"strength {one.strength:g}, anchor {one.anchor:g}: concepts off {one.concepts:.3f}, drift {one.drift:.3f}")
    best = found[0]
    each = {one.name: best.strength * settings.scales.get(one.name, 1.0) for one in loaded}
    names = " ".join(f"--strength {name}={value:g}" for name, value in each.items())
    words = " ".join([*overrides, f"calibration.prior_weight={best.anchor:g}"])
    where = f" --base {base}" if base else ""
    say(f"Best: fuse {' '.join(files)}{where} --merge {settings.merge} {names} {words}")


@app.command()
def unfuse(
    folder: Annotated[Path, typer.Argument(help="A fused folder.")],
    remove: Annotated[list[str], typer.Option(help="A concept to take out; may be repeated.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    subtract: Annotated[
        bool, typer.Option("--subtract", help="Without the base: subtract, and say how exact.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
) -> None:
    """Take concepts out of a fused folder again: the same bits as if they had never been in."""
    from ..merging.unfuse import unfuse as take_out

    with progress_bar() as progress:
        take_out(folder, remove, output, subtract, base, device, Hooks(progress, say))
    say(f"Wrote {output}/.")


@app.command()
def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A scene (.yaml), a picture made here (.png), a region file (.txt); then key=value."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw; tokens such as <rex> name your concepts.")] = None,
    base: Annotated[
        str | None, typer.Option(help="pocket, a fused or diffusers folder, a hub id, a checkpoint.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="FILE, FILE=0.8 or FILE=unet:0.8,text_encoder:0.5; repeat.")
    ] = None,
    sketch: Annotated[list[str] | None, typer.Option(help="A drawing that says where things are: FILE[=0.8].")] = None,
    keypose: Annotated[list[str] | None, typer.Option(help="A skeleton, drawn or as keypoints: FILE[=0.8].")] = None,
    region: Annotated[list[str] | None, typer.Option(help='"0,0,0.5,1:PROMPT", a box in fractions; repeat.')] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="'<token>'='a person', in a region file.")] = None,
    layout: Annotated[int, typer.Option(min=1, help="Which of a region file's layouts.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The picture to write (.png).")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    count: Annotated[int | None, typer.Option(help="How many pictures, with seeds seed, seed+1, …")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out pictures that are there already.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a scene file and stop.")] = False,
    allow_base: Annotated[bool, typer.Option("--allow-base", help="Accept a close relative of the base.")] = False,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    config: ConfigOption = None,
) -> None:
    """Draw a scene: a prompt, adapters or a fused folder, regions, sketches and keyposes."""
    with importing():
        from ..config.settings import parse_overrides, to_yaml
        from ..core.errors import Cancelled
        from ..core.files import refuse_overwriting_settings, write_settings
        from ..core.machine import heading
        from ..scenes.generate import generate_to_file
        from ..scenes.scene import Scene

    if schema:
        typer.echo(json.dumps(Scene.model_json_schema(), indent=2))
        return

    source, overrides = source_of(words)
    named = base or next((word[5:] for word in overrides if word.startswith("base=")), None)
    named = named or (base_in(config) if config else None)
    acting = parse_adapter_scales(adapter)
    drawn = source is not None and source.suffix.lower() == ".png"
    if not named and acting and not drawn:
        named = base = named_base(list(acting)) or None  # the one that they were trained on
    meant = [*(acting or {}), *adapters_in(parse_overrides(overrides))]
    found = scene_source(source, named, mapping, layout, meant) if source else SceneSource()
    held, acting = found.settings, placed_apart(acting, adapter, found)
    if not named and "base" not in held:
        settings_of = [parse_overrides(overrides), held, generate_part(config)]
        base = named_base([name for one in settings_of for name in adapters_in(one)]) or None
    flags = given(
        prompt=prompt, base=base, adapters=acting, regions=regions(region),
        controls=conditions(sketch, keypose), output=text_of(output), seed=seed, num_images=count, width=width,
        height=height, device=device, dtype=dtype, allow_base=allow_base or None,
    )  # fmt: skip
    changed = {word.partition("=")[0] for word in overrides} & {"seed", "num_images", "seeds"}
    if held and (changed or seed is not None or count is not None):  # they replace those a picture was drawn with
        held = {key: value for key, value in held.items() if key not in {"seeds", "only_seed"}}
    settings = resolve(Scene, "generate", config, flags, overrides, held, str(source or ""))
    beside = settings.output.with_suffix(".yaml")
    own = any(Path(one).resolve() == beside.resolve() for one in (source, config) if one)  # and stays as it is
    if not own:
        refuse_overwriting_settings(beside)
    with progress_bar() as progress, stop_signals() as should_stop:
        try:
            paths = generate_to_file(
                settings,
                Hooks(progress=progress, notify=say, should_stop=should_stop),
                resume=resume,
                expected=found.made_from,
            )
        except Cancelled as stopped:
            say("Stopped; what is drawn is kept, --resume goes on from there.")
            raise typer.Exit(130) from stopped
    if not own:
        write_settings(beside, heading() + to_yaml(settings))
    shown = [*paths[:1], f"{len(paths) - 1} pictures beside it"] if len(paths) > 9 else paths
    say(f"Wrote {', '.join(map(str, shown))}.")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="An adapter or a fused folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file or folder to write.")],
    kind: Annotated[str, typer.Option("--format", help="kohya, diffusers, embedding, folder or checkpoint.")] = "kohya",
    rank: Annotated[int | None, typer.Option(help="A lower rank than the exact one; the error is told.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 for LoRA files, float32 for the rest by default.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A sample picture for the model card.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
) -> None:
    """Write an adapter or a fusion in the formats of diffusers, ComfyUI, A1111."""
    if rank is not None and rank < 1:
        raise UserError("Rank must be at least 1.")
    with importing():
        from ..merging.export import export as write

    files = write(path, output, kind, rank, dtype, picture, device, hooks=Hooks(notify=say))
    say(f"Wrote {', '.join(map(str, files))}.")


@app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(help="A LoRA file of another program, or PEFT's or diffusers' folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The adapter to write (.safetensors).")],
    base: Annotated[str, typer.Option(help="The base it was made for.")],
    name: Annotated[str | None, typer.Option(help="What to call it; default: the file's name.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
) -> None:
    """Make an adapter of another program's LoRA file, to fuse it with your own."""
    with importing():
        from ..adapters.formats.import_lora import import_lora

    adapter = import_lora(path, output, base, name, device)
    words = f", with the token {' and '.join(sorted(adapter.tokens))}" if adapter.tokens else ""
    say(f"Wrote {output}: {len(adapter.layers)} layers at rank {adapter.rank}{words}.")


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="An adapter, a fused folder, a picture; or several adapters.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Norms of every layer, not of blocks.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw who sits in which slot (.png).")] = None,
) -> None:
    """Say what is in an adapter, a fused folder or a picture, and how adapters get on together."""
    from ..inspection import blocks, inspect_paths, slot_picture

    found = inspect_paths(paths)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        norms = found.pop("layer_norms", {})
        several = found["kind"] in {"fusion", "adapters"}
        for key, value in found.items():
            if isinstance(value, dict):
                say(f"{key}:")
                for name, inner in value.items():
                    say(f"  {name}: {plain(inner)}")
            elif key == "warnings":
                for warning in value:
                    say(f"Warning: {warning}")
            else:
                say(f"{key}: {plain(value)}")
        if norms:
            say("norms by layer:" if layers else "norms by block:")
            columns = norms if several else {found["concept"]: norms}
            say(table_of(columns if layers else {name: blocks(each) for name, each in columns.items()}))
    if picture is not None:
        from ..core.files import atomic
        from ..merging.manifest import adapters_in_fusion

        if found["kind"] == "picture" or picture.suffix.lower() != ".png":
            raise UserError("--picture draws the slots of adapters or a fused folder into a .png file.")
        drawn = slot_picture([adapter for path in paths for adapter in adapters_in_fusion(path)])
        with atomic(picture) as temporary:
            drawn.save(temporary, format="PNG")
        typer.echo(f"Wrote {picture}.", err=as_json)


@app.command()
def methods(
    arch: Annotated[str, typer.Option(help="sd15, sdxl or pocket.")] = "sd15",
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to count; may be repeated.")] = None,
    targets: Annotated[str, typer.Option(help="attention, feed-forward, conv … joined by +.")] = "attention",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the methods, what multiplies their learning rates, and how many numbers each trains."""
    if any(r < 1 for r in rank or []):
        raise UserError("Rank must be at least 1.")
    from ..methods import all_methods
    from ..models.architectures import RANKS, count_table

    rows = count_table(arch, tuple(rank) if rank else RANKS, targets)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, method in sorted(all_methods().items()):
        counts = ", ".join(f"r={row['rank']}: {row['trainable']:,}" for row in rows if row["method"] == name)
        say(f"{name}: {method.summary}\n  learning rate ×{method.lr_scale:g}; {counts}")


@app.command()
def merges(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the merges, their papers, and their own settings (options.NAME)."""
    from ..merging.merges import all_merges

    found = all_merges()
    if as_json:
        rows = [
            {"name": name, "summary": merge.summary, "paper": merge.paper, "options": merge.options.model_json_schema()}
            for name, merge in found.items()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, merge in found.items():
        say(f"{name}: {merge.summary}" + (f" ({merge.paper})" if merge.paper else ""))
        for option, field in merge.options.model_fields.items():
            say(f"  options.{option}={field.default}  {field.description}")


@slots_app.command("list")
def slots_list(
    folder: Annotated[Path, typer.Argument(help="The folder of the adapters.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show the ledger of a folder."""
    from ..slots.ledger import LEDGER, ROWS, Ledger

    paths = [folder] if folder.suffix == ".json" else [folder / LEDGER, folder / ROWS]
    ledgers = {path: data for path in paths if any((data := Ledger(path).read()).values())}
    if as_json:
        found = {b: {n: str(s) for n, s in c.items()} for data in ledgers.values() for b, c in data.items()}
        typer.echo(json.dumps(found, indent=2))
        return
    if not ledgers:
        say(f"No slots are taken in {paths[0]}.")
    for path, data in ledgers.items():
        for base, concepts in data.items():
            say(f"base {base[:12]}" + (" (rows of the orthogonal basis)" if path.name == ROWS else ""))
            for name, slot in sorted(concepts.items(), key=lambda item: item[1]):
                say(f"  {slot}  {name}")


@slots_app.command("release")
def slots_release(
    concept: Annotated[str, typer.Argument(help="The concept whose columns shall be free again.")],
    folder: Annotated[Path, typer.Argument(help="The folder of the adapters.")] = Path(),
) -> None:
    """Free a concept's columns."""
    from ..slots.ledger import LEDGER, ROWS, Ledger

    paths = [folder] if folder.suffix == ".json" else [folder / LEDGER, folder / ROWS]
    holding = [path for path in paths if any(concept in c for c in Ledger(path).read().values())]
    freed = [slot for path in holding or paths[:1] for slot in Ledger(path).release(concept)]
    say(f"Released {', '.join(map(str, freed))} of '{concept}'.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write everything.")] = Path("demo"),
    steps: Annotated[
        int | None, typer.Option(help="Training steps per concept (default: the pocket preset's).")
    ] = None,
) -> None:
    """From two photo folders to one picture, on the pocket base."""
    from ..demo import run_demo

    with progress_bar() as progress:
        sheet = run_demo(output, steps, Hooks(progress=progress, notify=say))
    say(f"Done. Look at {sheet}; the adapters, the fused folder and the settings are beside it in {output}/.")
