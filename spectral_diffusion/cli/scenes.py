"""Scenes on the command line: files that hold one, and flags for its parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import exists
from .support import numbers

SOURCES = {".yaml", ".yml", ".png", ".txt"}


def source_of(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """The scene file among a verb's arguments, and the overrides.

    Raises:
        UserError: several files.
    """
    files = [
        argument
        for argument in arguments or []
        if Path(argument).suffix.lower() in SOURCES and ("=" not in argument or exists(argument))
    ]
    if len(files) > 1:
        raise UserError(f"One scene at a time: {' and '.join(files)} were given.")
    return (Path(files[0]) if files else None), [argument for argument in arguments or [] if argument not in files]


def base_in(config: str) -> str | None:
    """The base that a preset or a settings file names, if any."""
    base = generate_part(config).get("base")
    return str(base) if base else None


def generate_part(config: str | None) -> dict[str, Any]:
    """The ``generate`` settings of a preset or a settings file."""
    from ..config.settings import read_yaml
    from ..core.assets import preset

    settings = read_yaml(preset(config)) if config else {}
    part = settings.get("generate", settings)
    return part if isinstance(part, dict) else {}


@dataclass
class SceneSource:
    """The source of a scene: a file's settings, and for a picture the hashes of its sources.

    Attributes:
        placed: adapters named on the command line that replace the picture's own, wherever these were.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, str] | None = None
    placed: set[str] = field(default_factory=set)


def scene_source(
    path: Path, base: str | None, mapping: list[str] | None, layout: int = 1, adapters: Iterable[str] = ()
) -> SceneSource:
    """The settings in a scene file, a picture of this program or a Mix-of-Show region file.

    ``adapters`` are named on the command line; they may be the picture's own, moved elsewhere.

    Raises:
        UserError: it is none of these, or a mapping without a region file.
    """
    pairs = {}
    for pair in mapping or []:
        key, equals, noun = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--map '{pair}' is not understood; write '<token>'='a person'.")
        pairs[key.strip()] = noun.strip()
    if path.suffix.lower() == ".txt":
        from ..models.loading import native_size
        from ..scenes.mix_of_show import scene_of

        scene = scene_of(path, native_size(base or "pocket"), pairs, layout)
        return SceneSource({"base": base, **scene} if base else scene)
    if pairs:
        raise UserError("--map is for Mix-of-Show's region files (.txt).")
    if path.suffix.lower() == ".png":
        from ..scenes.png_metadata import find_again

        again = find_again(path, adapters)
        return SceneSource(again.settings, again.sources, again.placed)
    from ..scenes.scene import read_scene

    return SceneSource(read_scene(path))


def without_placed(
    acting: dict[str, Any] | None, typed: list[str] | None, source: SceneSource
) -> dict[str, Any] | None:
    """Adapters named on the command line, without those that are part of the picture already.

    These keep the picture's scale where ``--adapter`` was ``typed`` without one, and get the given one otherwise.
    """
    from ..scenes.scene import adapter_tables

    acting = acting or {}
    for adapters in adapter_tables(source.settings):
        given = source.placed & set(acting) & set(adapters) - set(typed or [])
        adapters.update({name: acting[name] for name in given})
    return {name: value for name, value in acting.items() if name not in source.placed} or None


def adapters_in(settings: dict[str, Any]) -> list[str]:
    """The adapters in a scene's settings, first those that act everywhere; malformed parts are skipped."""
    from ..scenes.scene import adapter_tables

    return [str(name) for adapters in adapter_tables(settings) for name in adapters]


def regions(texts: list[str] | None) -> list[dict[str, Any]] | None:
    """``["0,0,0.5,1:<rex> on the grass"]`` to region settings."""
    if not texts:
        return None
    out = []
    for text in texts:
        box, colon, prompt = text.partition(":")
        try:
            sides = [float(side) for side in box.split(",")]
        except ValueError:
            sides = []
        if not colon or len(sides) != 4 or not prompt.strip():
            raise UserError(f"--region '{text}' is not understood; write LEFT,TOP,RIGHT,BOTTOM:PROMPT with fractions.")
        out.append({"box": sides, "prompt": prompt.strip()})
    return out


def parse_adapter_scales(pairs: list[str] | None) -> dict[str, Any] | None:
    """``--adapter``: FILE, FILE=0.8, or FILE=unet:0.8,text_encoder:0.5 for single components."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        file, equals, text = pair.rpartition("=")
        if equals and ":" in text and not exists(pair):
            parts = (part.partition(":") for part in text.split(","))
            out[file] = numbers([f"{name.strip()}={value}" for name, _, value in parts], "--adapter")
        else:
            out |= numbers([pair], "--adapter") or {}
    return out or None


def conditions(sketches: list[str] | None, keyposes: list[str] | None) -> list[dict[str, Any]] | None:
    """``--sketch`` and ``--keypose`` as control image settings."""
    controls = [
        {"file": file, "kind": kind, "conditioning_scale": weight}
        for kind, files in (("sketch", sketches), ("keypose", keyposes))
        for file, weight in (numbers(files, f"--{kind}") or {}).items()
    ]
    return controls or None
