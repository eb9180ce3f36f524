"""What the scenes of one step are, without their pixels: things and their places, backdrops, words, conditions.

Plans are plain arrays that a pool of processes can make ahead; a step's plan depends on the step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from torch import Tensor

from . import puppets
from .batches import Mix, wide_batch
from .render import Array, WorldConfig, random_things
from .sprites import NOUNS, TINTS, VARIANTS, Catalogue
from .world import PLAIN, SETTINGS, Backdrop, Thing, caption


@dataclass
class Layer:
    """The things at one depth: for each the picture's row, its sprite, place and turn. Heights of a picture are 1."""

    rows: list[int] = field(default_factory=list)
    sprites: list[int] = field(default_factory=list)
    nouns: list[int] = field(default_factory=list)
    tints: list[int] = field(default_factory=list)
    places: list[tuple[float, float, float, float, float]] = field(default_factory=list)  # x, y, side, angle, ±1


@dataclass
class Plan:
    """The scenes of one step."""

    wide: bool
    count: int
    layers: list[Layer]  # from the back to the front
    backdrops: list[int]
    mirrored: list[bool]  # backdrops
    captions: list[str]
    ids: Array  # (n, length)
    sketch_rows: list[int]
    strokes: list[tuple[bool, bool, float]]  # per sketch: thicker, softer, threshold (0: none)
    keypose_rows: list[int]


def backdrop_row(backdrop: Backdrop, random: Random) -> int:
    """One of the bank's drawings of a backdrop."""
    if backdrop.setting:
        return list(SETTINGS).index(backdrop.setting) * VARIANTS + random.randrange(VARIANTS)
    assert backdrop.colour
    return len(SETTINGS) * VARIANTS + list(PLAIN).index(backdrop.colour)


@dataclass(frozen=True)
class Planner:
    """Plans the scenes of a step."""

    catalogue: Catalogue
    encode: Callable[[list[str]], Tensor]  # captions to token ids (n, length)
    mix: Mix
    batch: int
    name: str = "pocket2"

    def __call__(self, step: int) -> Plan:
        random, mix = Random(f"{self.name}/{step}"), self.mix
        wide, count = wide_batch(random, mix, self.batch)
        plan = Plan(wide, count, [], [], [], [], np.zeros(0), [], [], [])
        for row in range(count):
            things, backdrop = random_things(random, mix.world, wide)
            self.place(plan, row, things, random)
            plan.backdrops.append(backdrop_row(backdrop, random))
            plan.mirrored.append(random.random() < 0.5)
            classless = False
            if random.random() < mix.sketch:
                plan.sketch_rows.append(row)
                threshold = random.uniform(0.25, 0.5) if random.random() < 0.5 else 0.0
                plan.strokes.append((random.random() < 0.3, random.random() < 0.3, threshold))
                classless = random.random() < mix.classless
            if any(thing.noun in puppets.NOUNS for thing in things) and random.random() < mix.keypose:
                plan.keypose_rows.append(row)
            text = caption(things, backdrop, random, classless)
            plan.captions.append("" if random.random() < mix.empty else text)
        return replace(plan, ids=self.encode(plan.captions).numpy())

    def place(self, plan: Plan, row: int, things: list[Thing], random: Random) -> None:
        """Add the things of one picture to the layers, in random depth."""
        depths = random.sample(range(len(things)), len(things))
        while len(plan.layers) < len(things):
            plan.layers.append(Layer())
        for index, (thing, depth) in enumerate(zip(things, depths, strict=True)):
            layer = plan.layers[depth]
            sprite, place = self.placed(thing, index, len(things), 2.0 if plan.wide else 1.0, random)
            layer.rows.append(row)
            layer.sprites.append(sprite)
            layer.places.append(place)
            layer.nouns.append(NOUNS.index(thing.noun))
            layer.tints.append(TINTS.index(thing.colour or "own"))

    def placed(
        self, thing: Thing, index: int, count: int, width: float, random: Random
    ) -> tuple[int, tuple[float, float, float, float, float]]:
        """The sprite of a thing and its place, as :class:`render.Renderer` has it."""
        world: WorldConfig = self.mix.world
        room = width / count
        side = min(room * (1.0 if count == 1 else 1.06), 1.0) * random.uniform(*world.scale)
        longer, angle, mirror = side, random.uniform(-world.rotate, world.rotate), 1.0
        if thing.noun in puppets.NOUNS:
            assert thing.colour
            number = random.randrange(self.catalogue.puppets)
            sprite = self.catalogue.puppet(thing.noun, thing.colour, thing.pose, number)
            wide, high = self.catalogue.sizes[sprite]
            longer = side * min(1.04 / high, 1.15 / wide)
            angle = 0.0
        else:
            sprite = self.catalogue.icon(thing.noun, random.random() < world.second_drawing, thing.colour)
            wide, high = self.catalogue.sizes[sprite]
            mirror = -1.0 if random.random() < world.mirror else 1.0
        slack = world.shift * room + max(0.0, (min(room, 1.0) - side) / 2) * min(1.0, world.shift * 5)
        x = (index + 0.5) * room + random.uniform(-slack, slack)
        y = 0.5 + random.uniform(-slack, slack)
        if count > 1 and width == 1:
            y += random.uniform(-1, 1) * (1 - side) / 2 * 0.6
        # At most a tenth of a thing may leave the picture.
        free_x, free_y = 0.4 * wide * longer, 0.4 * high * longer
        x, y = min(max(x, free_x), width - free_x), min(max(y, free_y), 1 - free_y)
        return sprite, (x, y, longer, angle, mirror)
