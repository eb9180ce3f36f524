"""The verbs about files: export, import and inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import UserError
from ..core.hooks import Hooks
from .support import JsonOption, importing, plain, say, table_of


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
        from ..merging.export import ExportOptions
        from ..merging.export import export as write

    files = write(path, output, kind, ExportOptions(rank, dtype, picture, device), Hooks(notify=say))
    say(f"Wrote {', '.join(map(str, files))}.")


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


def inspect(
    paths: Annotated[list[Path], typer.Argument(help="An adapter, a fused folder, a picture; or several adapters.")],
    as_json: JsonOption = False,
    layers: Annotated[bool, typer.Option("--layers", help="Norms of every layer, not of blocks.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw who sits in which slot (.png).")] = None,
) -> None:
    """Say what is in an adapter, a fused folder or a picture, and how adapters get on together."""
    from ..inspection import inspect_paths, slot_picture

    found = inspect_paths(paths)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, layers)
    if picture is not None:
        from ..core.files import atomic
        from ..merging.manifest import adapters_in_fusion

        if found["kind"] == "picture" or picture.suffix.lower() != ".png":
            raise UserError("--picture draws the slots of adapters or a fused folder into a .png file.")
        drawn = slot_picture([adapter for path in paths for adapter in adapters_in_fusion(path)])
        with atomic(picture) as temporary:
            drawn.save(temporary, format="PNG")
        typer.echo(f"Wrote {picture}.", err=as_json)


def show(found: dict[str, Any], layers: bool) -> None:
    """What an inspection found as lines, and the norms by layer or by block as a table."""
    from ..inspection import blocks

    norms = found.get("layer_norms")
    for key, value in found.items():
        if key == "layer_norms":
            continue
        if key == "warnings":
            for warning in value:
                say(f"Warning: {warning}")
        elif isinstance(value, dict):
            say(f"{key}:")
            for name, inner in value.items():
                say(f"  {name}: {plain(inner)}")
        else:
            say(f"{key}: {plain(value)}")
    if norms:
        say("norms by layer:" if layers else "norms by block:")
        columns = norms if found["kind"] in {"fusion", "adapters"} else {found["concept"]: norms}
        say(table_of(columns if layers else {name: blocks(each) for name, each in columns.items()}))
