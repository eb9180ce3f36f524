"""Styles of whole pictures: how lines, tiles, palette and paper change a scene of the pocket world.

No scene of the pretraining has one. The ready-made styles are concepts of the class ``style``; the random ones
train the encoders that judge them, and never come near the ready-made ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import yaml
from PIL import Image, ImageFilter

from .render import Array, Picture, Renderer, WorldConfig

Colour = tuple[int, int, int]
LINES = ("none", "hatch", "cross", "rows", "dots", "grid", "outline")
SCENES = WorldConfig(classes=40, counts=(1.0,), scale=(0.68, 0.9), natural=0.25, second_drawing=0.3)


@dataclass(frozen=True)
class Style:
    """What happens to a picture, in this order.

    Attributes:
        tile: side of the squares that share one colour, in pixels of 128; 0 for none.
        levels: brightnesses that are left; 0 for all.
        shadow, light: black and white become these colours.
        colour: how much of the picture's own colours stay, 0…1.5.
        lines: which lines are drawn over it, ``pitch`` pixels of 128 apart; outlines are as thick as half of it.
        ink: the lines' colour, drawn with ``strength``; in shadows alone if ``shaded``.
    """

    tile: int = 0
    levels: int = 0
    shadow: Colour = (0, 0, 0)
    light: Colour = (255, 255, 255)
    colour: float = 1.0
    lines: str = "none"
    pitch: float = 8.0
    ink: Colour = (20, 20, 30)
    strength: float = 0.8
    shaded: bool = False


STYLES: dict[str, Style] = {
    "poster": Style(
        levels=3, shadow=(30, 20, 80), light=(255, 215, 225), colour=1.2, lines="outline", pitch=3, ink=(20, 10, 60),
        strength=1.0,
    ),
    "bands": Style(
        shadow=(60, 25, 30), light=(255, 240, 200), colour=0.9, lines="hatch", pitch=20, ink=(255, 235, 190),
        strength=0.75,
    ),
}  # fmt: skip
# Settings are chosen on it; it may be like what the encoders of styles were trained on.
TUNING_STYLES: dict[str, Style] = {
    "beads": Style(
        shadow=(20, 45, 60), light=(235, 250, 255), colour=1.0, lines="dots", pitch=16, ink=(245, 250, 235),
        strength=0.75,
    ),
}  # fmt: skip
READY_MADE = STYLES | TUNING_STYLES


def styled(image: Array, style: Style) -> Array:
    """A picture (height, width, 3) uint8 in a style."""
    unit = image.shape[0] / 128
    soft = Image.fromarray(image).filter(ImageFilter.GaussianBlur(unit)) if style.levels else Image.fromarray(image)
    pixels: Array = np.asarray(soft, dtype=np.float32)  # without the backdrops' grain, which few levels would show
    if style.tile:
        pixels = tiled(pixels, round(style.tile * unit))
    gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    tone = gray / 255
    if style.levels:
        tone = np.round(tone * (style.levels - 1)) / (style.levels - 1)
    shadow, light = np.array(style.shadow, np.float32), np.array(style.light, np.float32)
    own = pixels - gray[..., None]
    pixels = shadow + (light - shadow) * tone[..., None] + style.colour * own
    drawn = style.strength * where_lines(image, style, unit)
    if style.shaded:
        drawn = drawn * np.clip(1.35 - 1.5 * gray / 255, 0.12, 1)
    pixels = pixels * (1 - drawn[..., None]) + np.array(style.ink, np.float32) * drawn[..., None]
    return np.clip(pixels, 0, 255).round().astype(np.uint8)


def tiled(pixels: Array, side: int) -> Array:
    """Squares of ``side`` pixels of their mean colour."""
    height, width = pixels.shape[:2]
    rows, columns = -(-height // side), -(-width // side)
    padded = np.pad(pixels, ((0, rows * side - height), (0, columns * side - width), (0, 0)), mode="edge")
    means = padded.reshape(rows, side, columns, side, 3).mean((1, 3), keepdims=True)
    whole = np.broadcast_to(means, (rows, side, columns, side, 3)).reshape(rows * side, columns * side, 3)
    return np.ascontiguousarray(whole[:height, :width])


def where_lines(image: Array, style: Style, unit: float) -> Array:
    """Where the style's lines are, (height, width) in 0…1."""
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pitch = style.pitch * unit

    def stripes(across: Array, share: float = 0.36) -> Array:
        distance = np.abs((across / pitch) % 1 - 0.5) * pitch
        return np.clip(share * pitch / 2 + 0.5 - distance, 0, 1)

    if style.lines == "none":
        return np.zeros((height, width), np.float32)
    if style.lines == "outline":
        framed = Image.fromarray(np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge"))
        edges = framed.filter(ImageFilter.GaussianBlur(unit)).convert("L").filter(ImageFilter.FIND_EDGES)
        thick = edges.filter(ImageFilter.MaxFilter(2 * round(pitch / 4) + 1))
        return np.clip(np.asarray(thick, np.float32)[2:-2, 2:-2] / 24 - 0.5, 0, 1)
    if style.lines == "rows":
        return stripes(y)
    if style.lines == "hatch":
        return stripes((x + y) / 2**0.5)
    if style.lines == "cross":
        return np.maximum(stripes((x + y) / 2**0.5, 0.25), stripes((x - y) / 2**0.5, 0.25))
    if style.lines == "grid":
        return np.maximum(stripes(x + pitch / 2, 0.14), stripes(y + pitch / 2, 0.14))
    if style.lines == "dots":
        odd = (y // pitch) % 2
        dx, dy = (x + odd * pitch / 2) % pitch - pitch / 2, y % pitch - pitch / 2
        return np.clip(0.33 * pitch + 0.5 - np.sqrt(dx**2 + dy**2), 0, 1)
    raise ValueError(f"no such lines: {style.lines}")


def random_colour(random: Random, low: int, high: int) -> Colour:
    return random.randrange(low, high), random.randrange(low, high), random.randrange(low, high)


def random_style(random: Random) -> Style:
    """Any style but those near a ready-made one."""
    while True:
        style = Style(
            tile=random.choice((0, 0, 0, 0, 6, 8, 10, 12)),
            levels=random.choice((0, 0, 0, 2, 3, 4)),
            shadow=random_colour(random, 0, 110) if random.random() < 0.6 else (0, 0, 0),
            light=random_colour(random, 150, 256) if random.random() < 0.6 else (255, 255, 255),
            colour=random.choice((0.0, 0.35, 0.7, 1.0, 1.0, 1.3)),
            lines=random.choice(LINES),
            pitch=random.choice((10, 13, 16, 20, 24)),
            ink=random_colour(random, 0, 256),
            strength=random.uniform(0.5, 1.0),
            shaded=random.random() < 0.4,
        )
        if not any(alike(style, other) for other in STYLES.values()):
            return style


def alike(style: Style, other: Style) -> bool:
    """Whether the same lines are about as far apart and as bright: too near to a ready-made style for training."""
    same_lines = style.lines == other.lines and (style.lines == "outline" or abs(style.pitch - other.pitch) <= 4)
    return same_lines and abs(sum(style.ink) - sum(other.ink)) < 250


def near_miss(style: Style, random: Random, any_of: bool = False) -> Style:
    """The same style but for one thing; with ``any_of`` it may be near a ready-made one."""
    while True:
        other = random_style(random)
        seen = ("pitch", "ink", "lines") if style.lines != "none" else ("lines",)
        name = random.choice(("tile", "levels", "shadow", "light", "colour", *seen))
        changed = replace(style, **{name: getattr(other, name)})
        if changed != style and (any_of or not any(alike(changed, ready) for ready in STYLES.values())):
            return changed


def style_views(renderer: Renderer, style: Style, random: Random, count: int, size: int = 128) -> Iterator[Picture]:
    """Scenes of the pocket world in a style, captioned as such."""
    for _ in range(count):
        picture = renderer.scene(random, SCENES, size, size)
        yield replace(picture, image=styled(picture.image, style), caption=f"{picture.caption}, in <TOK> style")


def make_style(renderer: Renderer, name: str, folder: Path, count: int = 16) -> None:
    """Write one style's folder: pictures, ``metadata.jsonl``, ``concept.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, picture in enumerate(style_views(renderer, READY_MADE[name], Random(f"style/{name}"), count)):
        Image.fromarray(picture.image).save(folder / f"{index + 1:02}.png")
        lines.append(json.dumps({"file_name": f"{index + 1:02}.png", "text": picture.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    about = {"name": name, "noun": "style", "token": f"<{name}>"}
    (folder / "concept.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
