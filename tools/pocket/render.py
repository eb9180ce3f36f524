"""Draw scenes of the pocket world: tinted sprites on backdrops, with captions, masks and sketches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from . import puppets
from .art import PRETRAINING, IconSet
from .backdrops import backdrop_canvas
from .world import CLASSES, COLOURS, PLAIN, SETTINGS, Backdrop, Thing, caption

Array = np.ndarray


@dataclass
class Picture:
    """A rendered scene.

    ``image`` (H, W, 3) uint8; ``mask`` (H, W) and ``sketch`` (H, W) in 0…1; ``people``: OpenPose keypoints
    (18, 2) in pixels, one array per puppet.
    """

    image: Array
    mask: Array
    sketch: Array
    people: list[Array]
    caption: str
    things: tuple[Thing, ...]
    backdrop: Backdrop


@dataclass(frozen=True)
class WorldConfig:
    """How varied the drawn world is."""

    classes: int = 24
    familiar: int = 0  # classes known from earlier stages; the later ones are drawn twice as often (0: all alike)
    counts: tuple[float, ...] = (0.7, 0.3)  # share of square scenes with one, two, three, four things
    wide_counts: tuple[float, ...] = (0.0, 1.0)  # the same for 128×64
    scale: tuple[float, float] = (0.74, 0.9)  # height or width of a single thing over the picture's
    shift: float = 0.06  # jitter of position, as a share of the free room's side
    rotate: float = 6.0  # degrees
    mirror: float = 0.0
    natural: float = 0.12  # share of things in their drawing's own colours
    plain: float = 0.3  # share of plain backdrops
    drawings: tuple[str, ...] = PRETRAINING
    second_drawing: float = 0.35  # share of things that take the second drawing of their class
    puppets: float = 0.0  # share of things that are puppets


@dataclass
class Placed:
    """A sprite with the place of its centre in pixels and, of a puppet, its keypoints in the sprite's pixels."""

    sprite: Image.Image
    x: float
    y: float
    angle: float = 0.0
    keypoints: Array | None = None

    def corner(self) -> Array:
        """The picture's x and y of the (unturned) sprite's top left."""
        return np.array([self.x - self.sprite.width / 2, self.y - self.sprite.height / 2])


def tint(sprite: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The sprite in one named colour: its shading stays, small near-black and near-white details too."""
    pixels = np.asarray(sprite, dtype=np.float32)
    rgb, alpha = pixels[..., :3] / 255, pixels[..., 3:]
    light = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    seen = light[alpha[..., 0] > 64]
    low, high = np.percentile(seen, (4, 96)) if seen.size else (0.0, 1.0)
    tone = np.clip((light - low) / max(high - low, 0.15), 0, 1)[..., None]
    base = np.array(colour, dtype=np.float32) / 255
    dark, pale = base * 0.45, base + (1 - base) * 0.5
    shaded = np.where(tone < 0.5, dark + (base - dark) * tone * 2, base + (pale - base) * (tone * 2 - 1))
    saturation = rgb.max(-1) - rgb.min(-1)
    detail = ((light < 0.16) & (saturation < 0.25))[..., None]
    out = np.where(detail, rgb, shaded) * 255
    return Image.fromarray(np.concatenate([out, alpha], -1).round().astype(np.uint8), "RGBA")


def outline(alpha: Array, light: Array) -> Array:
    """Edges of one drawn thing in 0…1: its silhouette and the strong inner lines."""

    def gradient(plane: Array) -> Array:
        padded = np.pad(plane, 1, mode="edge")
        across = padded[1:-1, 2:] - padded[1:-1, :-2]
        down = padded[2:, 1:-1] - padded[:-2, 1:-1]
        return np.sqrt(across**2 + down**2)

    inner = np.clip(gradient(light * alpha + 0.5 * (1 - alpha)) * 1.6 - 0.25, 0, 1) * (alpha > 0.9)
    return np.clip(np.maximum(np.clip(gradient(alpha) * 1.2 - 0.2, 0, 1), inner), 0, 1)


def random_things(random: Random, world: WorldConfig, wide: bool) -> tuple[list[Thing], Backdrop]:
    """What a random scene shows, from left to right, and where."""
    counts = world.wide_counts if wide else world.counts
    count = random.choices(range(1, len(counts) + 1), counts)[0]
    nouns = list(CLASSES)[: world.classes]
    if world.familiar:
        nouns += nouns[world.familiar :]
    if random.random() < world.plain:
        backdrop = Backdrop(None, random.choice(list(PLAIN)))
    else:
        backdrop = Backdrop(random.choice(list(SETTINGS)), None)
    things = []
    for _ in range(count):
        puppet = random.random() < world.puppets
        colour = None if random.random() < world.natural and not puppet else random.choice(list(COLOURS))
        while colour and colour == backdrop.colour:
            colour = random.choice(list(COLOURS))
        if puppet:
            pose = random.choice(list(puppets.POSES)) if random.random() < 0.5 else ""
            things.append(Thing(random.choice(puppets.NOUNS), colour, pose))
        else:
            things.append(Thing(random.choice(nouns), colour))
    return things, backdrop


@dataclass
class Renderer:
    """Draws random or given scenes. Sprites are rasterised and tinted once."""

    sets: dict[str, IconSet]
    _sprites: dict[tuple[str, str, str | None], Image.Image] = field(default_factory=dict)

    def sprite(self, noun: str, drawing: str, colour: str | None) -> Image.Image:
        key = (noun, drawing, colour)
        if key not in self._sprites:
            if colour is None:
                self._sprites[key] = self.sets[drawing].sprite(CLASSES[noun])
            else:
                self._sprites[key] = tint(self.sprite(noun, drawing, None), COLOURS[colour])
        return self._sprites[key]

    def compose(self, placed: Sequence[Placed], canvas: Array) -> tuple[Array, Array, Array]:
        """Paste sprites in order onto a backdrop: image uint8, mask and sketch in 0…1."""
        height, width = canvas.shape[:2]
        image = canvas.copy()
        mask = np.zeros((height, width), np.float32)
        sketch = np.zeros((height, width), np.float32)
        for thing in placed:
            layer = Image.new("RGBA", (width, height))
            turned = thing.sprite
            if thing.angle:
                turned = turned.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
            layer.paste(turned, (round(thing.x - turned.width / 2), round(thing.y - turned.height / 2)))
            pixels = np.asarray(layer, dtype=np.float32)
            alpha = pixels[..., 3] / 255
            light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
            image = image * (1 - alpha[..., None]) + pixels[..., :3] * alpha[..., None]
            mask = np.maximum(mask, alpha)
            sketch = np.maximum(sketch * (1 - alpha), outline(alpha, light))
        return np.clip(image, 0, 255).round().astype(np.uint8), mask, sketch

    def backdrop(self, backdrop: Backdrop, width: int, height: int, random: Random) -> Array:
        """A drawn backdrop (height, width, 3) without things."""
        canvas = backdrop_canvas(backdrop.setting, backdrop.colour, width, height, random.randrange(24))
        return canvas[:, ::-1] if random.random() < 0.5 else canvas

    def scene(self, random: Random, world: WorldConfig, width: int = 64, height: int = 64) -> Picture:
        """One random scene of the world with its caption."""
        things, backdrop = random_things(random, world, width > height)
        return self.render(random, world, things, backdrop, width, height)

    def render(
        self,
        random: Random,
        world: WorldConfig,
        things: Sequence[Thing],
        backdrop: Backdrop,
        width: int = 64,
        height: int = 64,
    ) -> Picture:
        """A picture of these things from left to right, with a caption."""
        count = len(things)
        placed = [self._place(random, world, thing, i, count, width, height) for i, thing in enumerate(things)]
        random.shuffle(placed)
        image, mask, sketch = self.compose(placed, self.backdrop(backdrop, width, height, random))
        people = [thing.keypoints + thing.corner() for thing in placed if thing.keypoints is not None]
        return Picture(image, mask, sketch, people, caption(things, backdrop, random), tuple(things), backdrop)

    def _place(
        self, random: Random, world: WorldConfig, thing: Thing, index: int, count: int, width: int, height: int
    ) -> Placed:
        room = width / count
        side = min(room * (1.0 if count == 1 else 1.06), height) * random.uniform(*world.scale)
        keypoints = None
        if thing.noun in puppets.NOUNS:
            assert thing.colour
            look = puppets.random_look(random, thing.noun, COLOURS[thing.colour])
            sprite, keypoints = puppets.draw_figure(puppets.random_pose(random, thing.pose), look, round(side * 1.04))
            if (over := sprite.width / (1.15 * side)) > 1:
                size = (round(sprite.width / over), round(sprite.height / over))
                sprite, keypoints = sprite.resize(size, Image.Resampling.BILINEAR), keypoints / over
        else:
            second = len(world.drawings) > 1 and random.random() < world.second_drawing
            sprite = self.sprite(thing.noun, world.drawings[1 if second else 0], thing.colour)
            factor = side / max(sprite.size)
            sprite = sprite.resize(
                (max(2, round(sprite.width * factor)), max(2, round(sprite.height * factor))), Image.Resampling.BILINEAR
            )
            if random.random() < world.mirror:
                sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        slack = world.shift * room + max(0.0, (min(room, height) - side) / 2) * min(1.0, world.shift * 5)
        x = (index + 0.5) * room + random.uniform(-slack, slack)
        y = height / 2 + random.uniform(-slack, slack)
        if count > 1 and width == height:
            y += random.uniform(-1, 1) * (height - side) / 2 * 0.6
        # At most a tenth of a thing may leave the picture.
        free_x, free_y = 0.4 * sprite.width, 0.4 * sprite.height
        x, y = min(max(x, free_x), width - free_x), min(max(y, free_y), height - free_y)
        angle = 0.0 if keypoints is not None else random.uniform(-world.rotate, world.rotate)
        return Placed(sprite, x, y, angle, keypoints)


def thicken(sketch: Array, strokes: Random) -> Array:
    """The same sketch as a person might draw it: other thickness, softer or harder lines."""
    image = Image.fromarray((np.clip(sketch, 0, 1) * 255).astype(np.uint8), "L")
    if strokes.random() < 0.3:
        image = image.filter(ImageFilter.MaxFilter(3))
    if strokes.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(0.6))
    out = np.asarray(image, dtype=np.float32) / 255
    if strokes.random() < 0.5:
        out = (out > strokes.uniform(0.25, 0.5)).astype(np.float32)
    return out
