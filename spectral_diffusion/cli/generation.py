"""The verb that generates scenes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.scene import Scene
from ..config.settings import parse_overrides, to_yaml
from ..core.hooks import Hooks
from .options import settings_flags
from .scenes import (
    SceneSource,
    adapters_in,
    base_in,
    conditions,
    generate_part,
    parse_adapter_scales,
    regions,
    scene_source,
    source_of,
    without_placed,
)
from .support import ConfigOption, echo, given, importing, named_base, progress_bar, resolve, stop_signals

SEEDS = {"seed", "num_images", "seeds"}


@dataclass(frozen=True)
class SceneRequest:
    """The command line's arguments about a scene."""

    source: Path | None
    overrides: list[str]
    flags: Mapping[str, Any]
    adapter: list[str] | None
    mapping: list[str] | None
    layout: int
    config: str | None

    def resolved(self) -> tuple[SceneSource, dict[str, Any]]:
        """The scene's source file, and the flags with the base and the adapters resolved."""
        written = parse_overrides(self.overrides)
        base = self.flags.get("base") or written.get("base") or (base_in(self.config) if self.config else None)
        flags = dict(self.flags)
        acting = parse_adapter_scales(self.adapter)
        from_picture = self.source is not None and self.source.suffix.lower() == ".png"
        if not base and acting and not from_picture:
            base = named_base(list(acting)) or None  # the base they were trained on
            flags |= given(base=base)
        names = [*(acting or {}), *adapters_in(written)]
        source = scene_source(self.source, base, self.mapping, self.layout, names) if self.source else SceneSource()
        if not base and "base" not in source.settings:
            layers = [written, source.settings, generate_part(self.config)]
            flags |= given(base=named_base([name for layer in layers for name in adapters_in(layer)]) or None)
        flags |= given(adapters=without_placed(acting, self.adapter, source))
        if SEEDS & (set(written) | set(flags)):  # they replace the picture's own
            source.settings = {
                key: value for key, value in source.settings.items() if key not in ("seeds", "only_seed")
            }
        return source, flags


@settings_flags(Scene, without={"only_seed"}, names={"num_images": "--count"})
def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A scene (.yaml), a picture made here (.png), a region file (.txt); then key=value."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="FILE, FILE=0.8 or FILE=unet:0.8,text_encoder:0.5. Repeat for more."),
    ] = None,
    sketch: Annotated[
        list[str] | None, typer.Option(help="A drawing that says where things are: FILE[=0.8]. Repeat for more.")
    ] = None,
    keypose: Annotated[
        list[str] | None, typer.Option(help="A skeleton, drawn or as keypoints: FILE[=0.8]. Repeat for more.")
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(help='"0,0,0.5,1:PROMPT", a box in fractions. Repeat for more.')
    ] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="'<token>'='a person', in a region file.")] = None,
    layout: Annotated[int, typer.Option(min=1, help="Which of a region file's layouts.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out pictures that are there already.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a scene file and stop.")] = False,
    config: ConfigOption = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Draw a scene: a prompt, adapters or a fused folder, regions, sketches and keyposes."""
    if schema:
        typer.echo(json.dumps(Scene.model_json_schema(), indent=2))
        return
    with importing():
        from ..core.errors import Cancelled
        from ..core.machine import heading
        from ..core.outputs import refuse_overwriting_settings, write_settings
        from ..scenes.generate import generate_to_file

    source, overrides = source_of(words)
    flags |= given(regions=regions(region), controls=conditions(sketch, keypose))
    request = SceneRequest(source, overrides, flags, adapter, mapping, layout, config)
    scene, flags = request.resolved()
    settings = resolve(Scene, "generate", config, flags, overrides, scene.settings, str(source or ""))
    beside = settings.output.with_suffix(".yaml")
    own = any(Path(path).resolve() == beside.resolve() for path in (source, config) if path)  # and stays unchanged
    if not own:
        refuse_overwriting_settings(beside)
    with progress_bar() as progress, stop_signals() as should_stop:
        hooks = Hooks(progress=progress, notify=echo, should_stop=should_stop)
        try:
            paths = generate_to_file(settings, hooks, resume=resume, expected=scene.made_from)
        except Cancelled as stopped:
            echo("Stopped; finished pictures are kept, --resume goes on from there.")
            raise typer.Exit(130) from stopped
    if not own:
        write_settings(beside, heading() + to_yaml(settings))
    shown = [*paths[:1], f"{len(paths) - 1} pictures beside it"] if len(paths) > 9 else paths
    echo(f"Wrote {', '.join(map(str, shown))}.")
