"""Make the ready-made concepts: photo folders of things that occur in no pretraining.

Each is the held-out (Noto) drawing of a class in two colours that no scene of the pocket world uses, laid
out in a pattern of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import yaml
from PIL import Image, ImageFilter

from .art import HELD_OUT
from .render import Array, Renderer, backdrop_canvas
from .world import CLASSES, SETTINGS, Backdrop

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How one concept looks: class, two colours, where the second one goes."""

    name: str
    noun: str
    first: Colour
    second: Colour
    pattern: str  # halves, stripes, spots, belt


LOOKS = (
    Look("inky", "octopus", (10, 160, 150), (255, 214, 60), "stripes"),
    Look("brew", "teapot", (120, 15, 55), (150, 235, 190), "belt"),
    Look("rex", "dog", (25, 45, 125), (255, 150, 110), "halves"),
    Look("shelly", "turtle", (250, 80, 160), (40, 60, 70), "spots"),
)


def where_second(pattern: str, width: int, height: int) -> Array:
    """A mask (height, width) in {0, 1} of the second colour."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if pattern == "halves":
        return (x + 0.25 * y > 0.62 * width).astype(np.float32)
    if pattern == "stripes":
        return ((y / height * 6).astype(int) % 2).astype(np.float32)
    if pattern == "belt":
        return ((y > 0.42 * height) & (y < 0.68 * height)).astype(np.float32)
    if pattern == "spots":
        pitch = width / 3.6
        odd = (y // pitch).astype(int) % 2
        centre_x = ((x + odd * pitch / 2) % pitch) - pitch / 2
        return ((centre_x**2 + ((y % pitch) - pitch / 2) ** 2) < (0.33 * pitch) ** 2).astype(np.float32)
    raise ValueError(f"no such pattern: {pattern}")


def two_tone(sprite: Image.Image, look: Look) -> Image.Image:
    """The drawing in the look's two colours; its shading and its dark lines stay."""
    pixels = np.asarray(sprite, dtype=np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    seen = light[pixels[..., 3] > 64]
    low, high = np.percentile(seen, (5, 95))
    tone = np.clip((light - low) / max(float(high - low), 0.15), 0, 1)[..., None]
    second = where_second(look.pattern, sprite.width, sprite.height)[..., None]
    base = np.array(look.first, np.float32) * (1 - second) + np.array(look.second, np.float32) * second
    shaded = np.where(tone < 0.5, base * (0.55 + 0.9 * tone), base + (255 - base) * (tone - 0.5) * 0.6)
    saturation = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) / 255
    detail = ((light < 0.2) & (saturation < 0.3))[..., None]
    out = np.where(detail, pixels[..., :3], shaded)
    return Image.fromarray(np.concatenate([out, pixels[..., 3:]], -1).clip(0, 255).round().astype(np.uint8), "RGBA")


def make_concept(renderer: Renderer, look: Look, folder: Path, count: int = 8, size: int = 128) -> None:
    """Write one photo folder: pictures, ``metadata.jsonl``, ``concept.yaml``."""
    random = Random(f"concept/{look.name}")
    sprite = two_tone(renderer.sets[HELD_OUT].sprite(CLASSES[look.noun], 256), look)
    folder.mkdir(parents=True, exist_ok=True)
    places = [*SETTINGS, "white", "gray"]
    random.shuffle(places)
    lines = []
    for index in range(count):
        place = places[index % len(places)]
        backdrop = Backdrop(place, None) if place in SETTINGS else Backdrop(None, place)
        canvas = backdrop_canvas(backdrop.setting, backdrop.colour, size, size, random.randrange(1000, 2000))
        image, _, _ = renderer.compose([_placed(sprite, size, random)], canvas)
        Image.fromarray(image).save(folder / f"{index + 1}.png")
        caption = f"a photo of <TOK> {backdrop.phrase(random)}"
        lines.append(json.dumps({"file_name": f"{index + 1}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "concept.yaml").write_text(
        yaml.safe_dump({"name": look.name, "noun": look.noun, "token": f"<{look.name}>"}, sort_keys=False)
    )


def _placed(sprite: Image.Image, size: int, random: Random) -> tuple[Image.Image, float, float, float]:
    side = size * random.uniform(0.66, 0.9)
    factor = side / max(sprite.size)
    small = sprite.resize((round(sprite.width * factor), round(sprite.height * factor)), Image.Resampling.LANCZOS)
    slack = (size - side) / 2
    x, y = (size / 2 + random.uniform(-slack, slack) for _ in range(2))
    return small, x, y, random.uniform(-12, 12)


def make_sketch(renderer: Renderer, nouns: list[str], path: Path, height: int = 128) -> None:
    """Write a sketch, white on black, with the held-out drawings of these classes side by side."""
    width = height * len(nouns)
    placed = []
    for index, noun in enumerate(nouns):
        sprite = renderer.sets[HELD_OUT].sprite(CLASSES[noun], 256)
        factor = 0.84 * height / max(sprite.size)
        small = sprite.resize((round(sprite.width * factor), round(sprite.height * factor)), Image.Resampling.LANCZOS)
        placed.append((small, (index + 0.5) * height, height / 2, 0.0))
    _, _, sketch = renderer.compose(placed, np.full((height, width, 3), 255, np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Strokes as thick as a felt pen's, so that they survive being made small.
    Image.fromarray((sketch * 255).astype(np.uint8), "L").filter(ImageFilter.MaxFilter(3)).save(path)


def make_all(renderer: Renderer, folder: Path) -> None:
    """Write every ready-made concept and the demo's sketch."""
    for look in LOOKS:
        make_concept(renderer, look, folder / look.name)
    make_sketch(renderer, ["dog", "teapot"], folder / "sketches" / "dog-teapot.png")
