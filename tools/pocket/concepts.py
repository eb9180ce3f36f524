"""Make the ready-made concepts: photo folders of things that occur in no pretraining.

Each is the held-out (Noto) drawing of a class in two colours that no scene of the pocket world uses, laid
out in a pattern of its own; or a puppet with parts and colours that no other puppet has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import yaml
from PIL import Image, ImageFilter

from . import puppets
from .art import HELD_OUT
from .render import Array, Picture, Placed, Renderer, backdrop_canvas
from .world import CLASSES, SETTINGS, Backdrop, Thing

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a two-tone thing looks: class, drawing, two colours, where the second one goes."""

    noun: str
    first: Colour
    second: Colour
    pattern: str
    drawing: str = HELD_OUT


PATTERNS = ("halves", "stripes", "spots", "belt", "split")
MINT, PLUM, RUST, TEAL, GOLD, ROSE = (
    (150, 235, 190), (95, 25, 85), (190, 75, 30), (10, 140, 150), (255, 205, 70), (250, 110, 150),
)  # fmt: skip

CONCEPTS: dict[str, Look | puppets.Look] = {
    "inky": Look("octopus", (10, 160, 150), (255, 214, 60), "stripes"),
    "coral": Look("octopus", (255, 120, 95), (60, 20, 110), "split"),
    "brew": Look("teapot", (120, 15, 55), (150, 235, 190), "belt"),
    "posy": Look("teapot", (255, 200, 215), (20, 110, 125), "stripes"),
    "rex": Look("dog", (25, 45, 125), (255, 150, 110), "halves"),
    "fido": Look("dog", (190, 225, 40), (90, 30, 110), "spots"),
    "shelly": Look("turtle", (250, 80, 160), (40, 60, 70), "spots"),
    "misty": Look("cat", (150, 175, 215), (150, 20, 30), "belt"),
    "zippy": Look("car", (0, 200, 190), (230, 60, 130), "halves"),
    "bolt": puppets.Look(TEAL, RUST, GOLD, ROSE, "robot", 0.15, 0.11, 0.15, 0.1, "antenna", RUST, "horn"),
    "hero": puppets.Look(MINT, PLUM, (225, 175, 135), ROSE, "person", 0.14, 0.11, stripe=PLUM, extra="cape"),
    "bruno": puppets.Look(RUST, MINT, RUST, TEAL, "bear", 0.17, 0.13, 0.12, 0.1, "ears", None, "scarf"),
    "hoot": Look("owl", (60, 25, 110), (255, 190, 120), "spots"),
    "luna": Look("owl", (170, 235, 225), (170, 20, 70), "belt"),
    "moss": Look("mushroom", (215, 235, 90), (120, 20, 80), "halves"),
    "toad": Look("mushroom", (20, 90, 95), (255, 180, 195), "stripes"),
    "tusk": Look("elephant", (250, 140, 170), (30, 80, 90), "split"),
    "peck": Look("penguin", (200, 90, 30), (160, 240, 210), "stripes"),
    "rusty": Look("rabbit", (190, 85, 40), (120, 225, 220), "belt"),
    "pip": Look("backpack", (240, 120, 200), (50, 55, 120), "halves"),
    "gigi": Look("giraffe", (60, 190, 170), (120, 40, 110), "stripes"),
    "dabble": Look("duck", (125, 20, 90), (190, 240, 120), "halves"),
    "flit": Look("butterfly", (20, 80, 95), (255, 175, 120), "split"),
    "finn": Look("fish", (220, 250, 170), (150, 25, 60), "stripes"),
    "nip": Look("crab", (70, 60, 150), (150, 240, 225), "belt"),
    "pippin": Look("apple", (30, 170, 200), (255, 220, 130), "spots"),
    "comet": Look("rocket", (255, 180, 160), (20, 95, 95), "split"),
    "breeze": Look("sailboat", (110, 20, 40), (130, 225, 250), "halves"),
    "nook": Look("house", (190, 150, 255), (20, 90, 100), "belt"),
    "twang": Look("guitar", (40, 210, 130), (90, 20, 60), "split"),
    "dawdle": Look("snail", (255, 130, 100), (30, 60, 110), "stripes"),
    "spike": Look("cactus", (240, 90, 150), (250, 240, 150), "halves"),
    "ding": Look("bell", (25, 110, 140), (250, 150, 210), "stripes"),
    "regal": Look("crown", (100, 240, 200), (130, 30, 120), "spots"),
    "sugar": Look("cupcake", (85, 120, 20), (190, 170, 255), "split"),
    "rumble": Look("dinosaur", (200, 60, 90), (90, 220, 210), "belt"),
}


def noun_of(look: Look | puppets.Look) -> str:
    """The class noun of a look."""
    return look.noun if isinstance(look, Look) else look.kind


def where_second(pattern: str, width: int, height: int) -> Array:
    """A mask (height, width) in {0, 1} of the second colour."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if pattern == "halves":
        return (x + 0.25 * y > 0.62 * width).astype(np.float32)
    if pattern == "stripes":
        return ((y / height * 6).astype(int) % 2).astype(np.float32)
    if pattern == "belt":
        return ((y > 0.42 * height) & (y < 0.68 * height)).astype(np.float32)
    if pattern == "split":
        return (y - 0.3 * x > 0.34 * height).astype(np.float32)
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


def make_concept(renderer: Renderer, name: str, folder: Path, count: int = 8, size: int = 128) -> None:
    """Write one photo folder: pictures, ``metadata.jsonl``, ``concept.yaml``."""
    look = CONCEPTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, picture in enumerate(views(renderer, look, Random(f"concept/{name}"), count, size)):
        Image.fromarray(picture.image).save(folder / f"{index + 1}.png")
        lines.append(json.dumps({"file_name": f"{index + 1}.png", "text": picture.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "concept.yaml").write_text(
        yaml.safe_dump({"name": name, "noun": noun_of(look), "token": f"<{name}>"}, sort_keys=False)
    )


def views(
    renderer: Renderer,
    look: Look | puppets.Look,
    random: Random,
    count: int,
    size: int,
    scale: tuple[float, float] = (0.66, 0.9),
) -> Iterator[Picture]:
    """True pictures of a look in varied settings, scales, angles and (puppets) poses."""
    sprite = drawn(renderer, look)
    places = [*SETTINGS, "white", "gray"]
    random.shuffle(places)
    for index in range(count):
        place = places[index % len(places)]
        backdrop = Backdrop(place, None) if place in SETTINGS else Backdrop(None, place)
        canvas = backdrop_canvas(backdrop.setting, backdrop.colour, size, size, random.randrange(1000, 1200))
        placed = place_view(look, sprite, size * random.uniform(*scale), size, random)
        image, mask, sketch = renderer.compose([placed], canvas)
        people = [] if placed.keypoints is None else [placed.keypoints + placed.corner()]
        caption = f"a photo of <TOK> {backdrop.phrase(random)}"
        yield Picture(image, mask, sketch, people, caption, (Thing(noun_of(look), None),), backdrop)


def drawn(renderer: Renderer, look: Look | puppets.Look) -> Image.Image | None:
    """The sprite of a two-tone thing; puppets are drawn anew for every pose."""
    if not isinstance(look, Look):
        return None
    size = 256 if look.drawing == HELD_OUT else 112
    return two_tone(renderer.sets[look.drawing].sprite(CLASSES[look.noun], size), look)


def place_view(look: Look | puppets.Look, sprite: Image.Image | None, side: float, size: int, random: Random) -> Placed:
    """A look, ``side`` pixels long, somewhere in a square of ``size`` pixels."""
    keypoints, angle = None, 0.0
    if sprite is None:
        assert isinstance(look, puppets.Look)
        pose = puppets.random_pose(random, random.choice(list(puppets.POSES)))
        small, keypoints = puppets.draw_figure(pose, look, round(side))
    else:
        factor = side / max(sprite.size)
        small = sprite.resize((round(sprite.width * factor), round(sprite.height * factor)), Image.Resampling.LANCZOS)
        angle = random.uniform(-12, 12)
    slack = (size - side) / 2
    x, y = (size / 2 + random.uniform(-slack, slack) for _ in range(2))
    return Placed(small, x, y, angle, keypoints)


def make_sketch(renderer: Renderer, nouns: list[str], path: Path, height: int = 128) -> None:
    """Write a sketch, white on black, with the held-out drawings of these classes side by side."""
    width = height * len(nouns)
    placed = []
    for index, noun in enumerate(nouns):
        sprite = renderer.sets[HELD_OUT].sprite(CLASSES[noun], 256)
        factor = 0.84 * height / max(sprite.size)
        small = sprite.resize((round(sprite.width * factor), round(sprite.height * factor)), Image.Resampling.LANCZOS)
        placed.append(Placed(small, (index + 0.5) * height, height / 2))
    _, _, sketch = renderer.compose(placed, np.full((height, width, 3), 255, np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Strokes as thick as a felt pen's, so that they survive being made small.
    Image.fromarray((sketch * 255).astype(np.uint8), "L").filter(ImageFilter.MaxFilter(3)).save(path)


def make_all(renderer: Renderer, folder: Path) -> None:
    """Write every ready-made concept, a sketch of every class among them, and the demo's sketch."""
    for name in CONCEPTS:
        make_concept(renderer, name, folder / name)
    for noun in sorted({look.noun for look in CONCEPTS.values() if isinstance(look, Look)}):
        make_sketch(renderer, [noun], folder / "sketches" / f"{noun}.png")
    make_sketch(renderer, ["dog", "teapot"], folder / "sketches" / "dog-teapot.png")
