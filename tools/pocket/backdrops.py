"""Draw the backdrops of the pocket world: plain colors and eight places, each in many variants."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .world import PLAIN

Array = np.ndarray
Color = tuple[int, int, int]
OVERSAMPLING = 4


@lru_cache(maxsize=2048)
def backdrop_canvas(setting: str | None, colour: str | None, width: int, height: int, variant: int) -> Array:
    """One of many drawn variants of a backdrop, (height, width, 3) float32 in 0…255.

    Raises:
        ValueError: there is no such setting.
    """
    random = Random(f"{setting}/{colour}/{width}/{height}/{variant}")
    noise = np.random.default_rng(random.getrandbits(32))
    if setting is None:
        assert colour
        base = np.array(PLAIN[colour], dtype=np.float32)
        ramp = np.linspace(1.06, 0.94, height, dtype=np.float32)[:, None, None]
        return np.clip(np.broadcast_to(base, (height, width, 3)) * ramp, 0, 255)
    if setting not in PLACES:
        raise ValueError(f"no such setting: {setting}")
    brush = Brush(width, height, random)
    PLACES[setting](brush)
    pixels = np.asarray(brush.image.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    return np.clip(pixels + noise.normal(0, 1.5, (height, width, 1)).astype(np.float32), 0, 255)


class Brush:
    """A large canvas with a horizon at random. Heights ``y0`` and ``y1`` are shares of the canvas, from its top."""

    def __init__(self, width: int, height: int, random: Random) -> None:
        self.random, self.aspect = random, (width, height)
        self.image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING))
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.height = self.image.size
        self.horizon = random.uniform(0.48, 0.62)

    def count(self, per_square: int) -> int:
        """So many per square picture, in proportion to the width."""
        width, height = self.aspect
        return per_square * width // height

    def jitter(self, rgb: Color, by: int = 10) -> Color:
        """The color, somewhat lighter or darker."""
        shift = self.random.randint(-by, by)
        r, g, b = (min(255, max(0, c + shift)) for c in rgb)
        return r, g, b

    def fill(self, top: Color, bottom: Color, y0: float, y1: float) -> None:
        """A band with a gradient."""
        h = self.height
        a, b = np.array(self.jitter(top)), np.array(self.jitter(bottom))
        for y in range(round(y0 * h), round(y1 * h)):
            mix = (y - y0 * h) / max((y1 - y0) * h, 1)
            self.draw.line((0, y, self.width, y), fill=tuple((a + (b - a) * mix).astype(int).tolist()))

    def dots(self, count: int, size: tuple[float, float], rgb: Color, y0: float, y1: float) -> None:
        """Round dots at random in a band."""
        random, w, h = self.random, self.width, self.height
        for _ in range(count):
            x, y, s = random.random() * w, (y0 + random.random() * (y1 - y0)) * h, random.uniform(*size) * h
            self.draw.ellipse((x - s, y - s, x + s, y + s), fill=self.jitter(rgb, 14))


def grass(brush: Brush) -> None:
    """A meadow with blades."""
    random = brush.random
    brush.fill((150, 205, 245), (205, 232, 250), 0, brush.horizon)
    brush.fill((120, 200, 90), (60, 140, 50), brush.horizon, 1)
    for _ in range(brush.count(90)):
        x, y = random.random() * brush.width, random.uniform(brush.horizon, 1) * brush.height
        tip = (x + random.uniform(-4, 4), y - random.uniform(6, 16))
        brush.draw.line((x, y, *tip), fill=brush.jitter((60, 150, 60), 25), width=3)


def beach(brush: Brush) -> None:
    """Sky, sea and sand with grains."""
    brush.fill((140, 205, 250), (190, 228, 250), 0, brush.horizon * 0.75)
    brush.fill((50, 150, 205), (90, 190, 215), brush.horizon * 0.75, brush.horizon)
    brush.fill((245, 225, 165), (230, 200, 135), brush.horizon, 1)
    brush.dots(brush.count(50), (0.004, 0.01), (215, 185, 120), brush.horizon, 1)


def sky(brush: Brush) -> None:
    """Clouds of five ellipses each."""
    random, h = brush.random, brush.height
    brush.fill((80, 160, 240), (170, 215, 250), 0, 1)
    for _ in range(brush.count(3) + 1):
        x, y = random.random() * brush.width, random.uniform(0.1, 0.9) * h
        for _ in range(5):
            s = random.uniform(0.05, 0.1) * h
            dx, dy = random.uniform(-0.13, 0.13) * h, random.uniform(-0.03, 0.03) * h
            brush.draw.ellipse((x + dx - s * 1.4, y + dy - s, x + dx + s * 1.4, y + dy + s), fill=(250, 252, 255))


def sea(brush: Brush) -> None:
    """Water up to a high horizon, with waves."""
    random, h = brush.random, brush.height
    brush.fill((165, 215, 245), (200, 230, 250), 0, 0.25)
    brush.fill((40, 120, 190), (15, 60, 130), 0.25, 1)
    for _ in range(brush.count(16)):
        x, y, s = random.random() * brush.width, random.uniform(0.3, 1) * h, random.uniform(0.05, 0.12) * h
        brush.draw.arc((x - s, y - s / 3, x + s, y + s / 3), 180, 360, fill=brush.jitter((150, 205, 235)), width=4)


def night(brush: Brush) -> None:
    """Stars and a moon over dark ground."""
    random, h = brush.random, brush.height
    brush.fill((12, 14, 50), (35, 35, 90), 0, 0.8)
    brush.fill((22, 30, 40), (12, 18, 26), 0.8, 1)
    brush.dots(brush.count(22), (0.005, 0.012), (245, 240, 200), 0, 0.75)
    x, y, s = random.uniform(0.08, 0.92) * brush.width, random.uniform(0.1, 0.2) * h, 0.07 * h
    brush.draw.ellipse((x - s, y - s, x + s, y + s), fill=(250, 245, 205))


def snow(brush: Brush) -> None:
    """A white field in falling snow."""
    brush.fill((170, 190, 215), (205, 218, 232), 0, brush.horizon)
    brush.fill((246, 249, 253), (222, 230, 242), brush.horizon, 1)
    brush.dots(brush.count(45), (0.007, 0.016), (252, 253, 255), 0, 1)


def table(brush: Brush) -> None:
    """A wall and the boards of a table."""
    random, horizon = brush.random, brush.horizon
    brush.fill((226, 212, 190), (208, 192, 168), 0, horizon)
    brush.fill((165, 105, 60), (125, 75, 40), horizon, 1)
    for step in range(4):
        y = (horizon + (step + random.random()) * (1 - horizon) / 4) * brush.height
        brush.draw.line((0, y, brush.width, y + random.uniform(-3, 3)), fill=brush.jitter((110, 66, 36)), width=3)


def desert(brush: Brush) -> None:
    """Dunes."""
    random, top = brush.random, brush.horizon * brush.height
    brush.fill((250, 200, 130), (252, 226, 170), 0, brush.horizon)
    brush.fill((225, 160, 85), (195, 125, 60), brush.horizon, 1)
    for _ in range(3):
        x, s = random.random() * brush.width, random.uniform(0.3, 0.6) * brush.height
        brush.draw.ellipse((x - s * 1.5, top + 8, x + s * 1.5, top + s), fill=brush.jitter((215, 148, 76)))


PLACES: dict[str, Callable[[Brush], None]] = {
    place.__name__: place for place in (grass, beach, sky, sea, night, snow, table, desert)
}
