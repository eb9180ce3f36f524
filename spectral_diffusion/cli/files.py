"""The verbs about files: export, import and inspect."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import UserError
from ..core.hooks import Hooks
from .support import JsonOption, as_text, echo, importing, table_of

FORMATS_HELP = (
    "A LoRA in the spelling of kohya, comfyui (the original code's layer names; as kohya for Stable Diffusion) or "
    "diffusers; or embedding, folder, checkpoint."
)


def export(
    path: Annotated[Path, typer.Argument(help="An adapter or a fused folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file or folder to write.")],
    kind: Annotated[str, typer.Option("--format", help=FORMATS_HELP)] = "kohya",
    rank: Annotated[int | None, typer.Option(help="A lower rank than the exact one; the error is printed.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 for LoRA files, float32 for the rest by default.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A sample picture for the model card.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps …")] = "auto",
) -> None:
    """Write an adapter or a fusion in the formats of diffusers, ComfyUI, A1111."""
    if rank is not None and rank < 1:
        raise UserError("Rank must be at least 1.")
    with importing():
        from ..merging.export import ExportOptions
        from ..merging.export import export as write

    files = write(path, output, kind, ExportOptions(rank, dtype, picture, device), Hooks(notify=echo))
    echo(f"Wrote {', '.join(map(str, files))}.")


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
    token_text = f", with the token {' and '.join(sorted(adapter.tokens))}" if adapter.tokens else ""
    echo(f"Wrote {output}: {len(adapter.layers)} layers at rank {adapter.rank}{token_text}.")


def push(
    path: Annotated[Path, typer.Argument(help="An adapter, a fused folder, or an exported file or folder.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the hub.")],
    license: Annotated[str, typer.Option(help="Its license, such as openrail++ or cc-by-4.0.")] = "",
    consent: Annotated[bool, typer.Option("--consent", help="You may share what it shows.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Only you see it.")] = False,
) -> None:
    """Publish on the Hugging Face hub with a model card, by the login of `hf auth login` or HF_TOKEN."""
    with importing():
        from ..hub import LICENSES, publish

    if sys.stdin.isatty():
        license = license or typer.prompt(f"Its license ({LICENSES})")
        consent = consent or typer.confirm("May you share what it shows (people and others' works agreed)?")
    echo(f"Published at {publish(path, repo_id, license, consent, private, hooks=Hooks(notify=echo))}.")


def inspect(
    paths: Annotated[list[Path], typer.Argument(help="An adapter, a fused folder, a picture; or several adapters.")],
    as_json: JsonOption = False,
    layers: Annotated[bool, typer.Option("--layers", help="Norms of every layer, not of blocks.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the map of slots (.png).")] = None,
) -> None:
    """Describe an adapter, a fused folder or a picture, and how much several adapters interfere."""
    from ..inspection import inspect_paths, slot_picture

    description = inspect_paths(paths)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        print_inspection(description, layers)
    if picture is not None:
        from ..core.files import atomic
        from ..merging.manifest import adapters_in_fusion

        if description["kind"] == "picture" or picture.suffix.lower() != ".png":
            raise UserError("--picture draws the slots of adapters or a fused folder into a .png file.")
        slot_map = slot_picture([adapter for path in paths for adapter in adapters_in_fusion(path)])
        with atomic(picture) as temporary:
            slot_map.save(temporary, format="PNG")
        typer.echo(f"Wrote {picture}.", err=as_json)


def print_inspection(description: dict[str, Any], layers: bool) -> None:
    """Print an inspection as lines, and the norms by layer or by block as a table."""
    from ..inspection import blocks

    norms = description.get("layer_norms")
    for key, value in description.items():
        if key == "layer_norms":
            continue
        if key == "warnings":
            for warning in value:
                echo(f"Warning: {warning}")
        elif isinstance(value, dict):
            echo(f"{key}:")
            for name, inner in value.items():
                echo(f"  {name}: {as_text(inner)}")
        else:
            echo(f"{key}: {as_text(value)}")
    if norms:
        echo("norms by layer:" if layers else "norms by block:")
        columns = norms if description["kind"] in {"fusion", "adapters"} else {description["concept"]: norms}
        echo(table_of(columns if layers else {name: blocks(each) for name, each in columns.items()}))
