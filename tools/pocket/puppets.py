"""Articulated figures of the pocket world: people, robots and bears, drawn from the positions of their joints.

A pose is a set of angles; joints follow from it, and both the drawing and the OpenPose keypoints follow from
the joints, so a keypose always tells the truth about its picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import cos, pi, sin
from random import Random

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

BIG = 3  # times the size, before it is made smaller and smooth
PAD = 0.2  # heights around the joints
NOUNS = ("person", "robot", "bear")
SKINS: tuple[RGB, ...] = ((250, 215, 185), (225, 175, 135), (175, 120, 80), (110, 75, 50))
HAIRS: tuple[RGB, ...] = ((45, 35, 30), (110, 70, 35), (220, 180, 90), (160, 60, 30), (180, 180, 185))
CLOTHS: tuple[RGB, ...] = ((60, 70, 110), (90, 90, 95), (120, 85, 60), (40, 40, 50), (200, 195, 180), (60, 110, 90))


@dataclass(frozen=True)
class Pose:
    """Angles in degrees, 0 hanging down, positive away from the body; ``side`` tells figures apart that face left."""

    lean: float = 0.0
    head: float = 0.0
    arms: tuple[Point, Point] = ((15, 5), (15, 5))  # (upper, lower) of the right and left arm
    legs: tuple[Point, Point] = ((8, 0), (8, 0))  # (thigh, shin) of the right and left leg


# What a caption may say, and the pose it means. "" is no word: any pose.
POSES: dict[str, tuple[Pose, ...]] = {
    "standing": (Pose(), Pose(arms=((25, -40), (25, -40)))),
    "walking": (Pose(arms=((25, 15), (-20, 15)), legs=((-18, -6), (24, -8))),),
    "running": (Pose(lean=8, arms=((60, 80), (-55, 60)), legs=((-30, -50), (55, -45))),),
    "jumping": (Pose(arms=((140, 10), (140, 10)), legs=((42, -50), (42, -50))),),
    "dancing": (Pose(lean=-8, arms=((150, 20), (60, -70)), legs=((6, 0), (50, -70))),),
    "waving": (Pose(arms=((150, 25), (12, 5))), Pose(arms=((12, 5), (150, 25)))),
}


@dataclass(frozen=True)
class Look:
    """What a figure looks like: sizes relative to its height of 1, colours, and small parts."""

    main: RGB
    second: RGB  # legs of a person, joints of a robot, belly of a bear
    head: RGB
    detail: RGB  # hair, lamp or ears' inside
    kind: str = "person"
    head_size: float = 0.13
    limb: float = 0.085
    shoulders: float = 0.13
    hips: float = 0.09
    topping: str = "hair"  # hair, long, bald, cap, antenna, ears
    stripe: RGB | None = None
    extra: str = ""  # parts that no pretraining shows: scarf, cape, horn


def at(x: float, y: float) -> np.ndarray:
    """A point or a shift, (2,)."""
    return np.array([x, y])


def random_pose(random: Random, word: str = "") -> Pose:
    """The pose a word means, with its own jitter; without a word anything a figure can do."""
    if word:
        pose = random.choice(POSES[word])
        if random.random() < 0.5:
            pose = replace(pose, lean=-pose.lean, arms=pose.arms[::-1], legs=pose.legs[::-1])
        jitter = 8.0

        def shake(limb: Point) -> Point:
            return limb[0] + random.gauss(0, jitter), limb[1] + random.gauss(0, jitter)

        return Pose(
            pose.lean + random.gauss(0, 3),
            random.gauss(0, 5),
            (shake(pose.arms[0]), shake(pose.arms[1])),
            (shake(pose.legs[0]), shake(pose.legs[1])),
        )

    def arm() -> Point:
        return random.uniform(-15, 165), random.uniform(-70, 70)

    def leg() -> Point:
        return random.uniform(-12, 60), random.uniform(-60, 5)

    return Pose(random.uniform(-10, 10), random.uniform(-12, 12), (arm(), arm()), (leg(), leg()))


def random_look(random: Random, noun: str, colour: RGB) -> Look:
    """A figure whose main colour is given."""
    shade: RGB = tuple(int(c * 0.6) for c in colour)  # type: ignore[assignment]
    light: RGB = tuple(int(c + (255 - c) * 0.55) for c in colour)  # type: ignore[assignment]
    limb, head = random.uniform(0.095, 0.12), random.uniform(0.13, 0.16)
    if noun == "person":
        return Look(
            colour,
            random.choice(CLOTHS),
            random.choice(SKINS),
            random.choice(HAIRS),
            "person",
            head,
            limb,
            topping=random.choice(("hair", "long", "bald", "cap")),
        )
    if noun == "robot":
        return Look(colour, shade, light, (250, 210, 60), "robot", head, limb, 0.15, 0.1, topping="antenna")
    return Look(colour, light, colour, light, "bear", head * 1.15, limb * 1.25, 0.12, 0.1, topping="ears")


def joints(pose: Pose, look: Look) -> np.ndarray:
    """The 18 OpenPose keypoints (18, 2) of a figure about one unit tall, hips at the origin, y down."""

    def turn(angle: float, length: float, sign: float) -> np.ndarray:
        a = angle * pi / 180
        return np.array([sign * sin(a) * length, cos(a) * length])

    up = np.array([sin(pose.lean * pi / 180), -cos(pose.lean * pi / 180)])
    across = np.array([-up[1], up[0]])  # to the picture's right
    neck = up * 0.34
    points = np.zeros((18, 2))
    points[1] = neck
    tilt = (pose.lean + pose.head) * pi / 180
    head_up = np.array([sin(tilt), -cos(tilt)])
    head_across = np.array([-head_up[1], head_up[0]])
    centre = neck + head_up * (look.head_size + 0.04)
    size = look.head_size
    points[0] = centre + head_up * -0.05 * size
    # A figure faces us: its right side is on the picture's left.
    for (eye, ear), sign in (((14, 16), -1.0), ((15, 17), 1.0)):
        points[eye] = centre + head_across * sign * 0.38 * size + head_up * 0.22 * size
        points[ear] = centre + head_across * sign * 0.95 * size + head_up * 0.1 * size
    for (shoulder, elbow, wrist), (upper, lower), sign in (
        ((2, 3, 4), pose.arms[0], -1.0),
        ((5, 6, 7), pose.arms[1], 1.0),
    ):
        points[shoulder] = neck + across * sign * look.shoulders - up * 0.03
        points[elbow] = points[shoulder] + turn(upper, 0.17, sign)
        points[wrist] = points[elbow] + turn(upper + lower, 0.16, sign)
    for (hip, knee, ankle), (thigh, shin), sign in (
        ((8, 9, 10), pose.legs[0], -1.0),
        ((11, 12, 13), pose.legs[1], 1.0),
    ):
        points[hip] = across * sign * look.hips * 0.75
        points[knee] = points[hip] + turn(thigh, 0.2, sign)
        points[ankle] = points[knee] + turn(thigh + shin, 0.2, sign)
    return points


def draw_figure(pose: Pose, look: Look, height: int) -> tuple[Image.Image, np.ndarray]:
    """Draw a figure ``height`` pixels high: RGBA cropped to what is visible, keypoints (18, 2) in its pixels."""
    points = joints(pose, look)
    low, high = points.min(0) - PAD, points.max(0) + PAD
    scale = height * BIG / (high[1] - low[1] - 2 * PAD + 0.25)
    spots = (points - low) * scale
    width, tall = (int(v) for v in np.ceil((high - low) * scale))
    image = Image.new("RGBA", (width, tall))
    Painter(ImageDraw.Draw(image), look, spots, scale).figure()
    seen = image.getchannel("A").getbbox()
    assert seen
    image, spots = image.crop(seen), spots - np.array(seen[:2])
    factor = height / image.height
    target = (max(2, round(image.width * factor)), height)
    return image.resize(target, Image.Resampling.LANCZOS), spots * (np.array(target) / np.array(image.size))


class Painter:
    """Draws one figure, part by part from the back to the front.

    ``spots`` are the keypoints (18, 2) in pixels, of which ``scale`` make one height.
    """

    def __init__(self, pen: ImageDraw.ImageDraw, look: Look, spots: np.ndarray, scale: float) -> None:
        self.pen, self.look, self.spots, self.scale = pen, look, spots, scale
        self.unit = look.limb * scale  # the width of a limb
        self.robot, self.bear = look.kind == "robot", look.kind == "bear"
        self.size = look.head_size * scale
        self.centre = (spots[14] + spots[15]) / 2 - at(0, -0.22 * self.size)  # of the head

    def figure(self) -> None:
        """The whole of it."""
        if self.look.extra == "cape":
            self.cape()
        self.legs()
        self.trunk()
        if self.look.stripe:
            self.stripe(self.look.stripe)
        self.arms()
        self.behind_the_head()
        if self.robot:
            self.robot_head()
        else:
            self.round_head()
        if self.look.extra == "horn":
            self.horn()
        if self.look.extra == "scarf":
            self.scarf()

    def disc(self, centre: Sequence[float], rx: float, ry: float, colour: RGB) -> None:
        x, y = centre
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def limb(self, a: int, b: int, width: float, colour: RGB) -> None:
        self.pen.line((*self.spots[a], *self.spots[b]), fill=colour, width=max(1, round(width)))
        for end in (a, b):
            self.disc(self.spots[end], width / 2, width / 2, colour)

    def polygon(self, corners: Iterable[Sequence[float]], colour: RGB) -> None:
        self.pen.polygon([(float(x), float(y)) for x, y in corners], fill=colour)

    def cape(self) -> None:
        left, right = self.spots[2], self.spots[5]
        foot, out = (self.spots[10] + self.spots[13]) / 2, at(self.unit * 2.4, 0)
        self.polygon((left, right, foot + out, foot - out), self.look.detail)

    def legs(self) -> None:
        look, unit = self.look, self.unit
        colour = look.main if self.bear else look.second
        foot = look.second if self.bear else darker(colour, 0.6)
        for hip, knee, ankle in ((8, 9, 10), (11, 12, 13)):
            self.limb(hip, knee, unit * 1.1, colour)
            self.limb(knee, ankle, unit, colour)
            if self.robot:
                self.disc(self.spots[knee], unit * 0.62, unit * 0.62, look.head)
            self.disc(self.spots[ankle] + at(0, unit * 0.35), unit * 0.85, unit * 0.5, foot)

    def trunk(self) -> None:
        look, spots, unit = self.look, self.spots, self.unit
        left, right = spots[8], spots[11]  # hips
        middle = (spots[1] + (left + right) / 2) / 2
        if self.bear:
            wide, tall = look.shoulders * self.scale, abs(spots[1][1] - left[1]) * 0.68
            self.disc(middle, wide * 1.15, tall, look.main)
            self.disc(middle + at(0, tall * 0.15), wide * 0.7, tall * 0.65, look.second)
            return
        out = unit * (0.5 if self.robot else 0.35)
        shoulders = spots[2] - at(out, out), spots[5] + at(out, -out)
        self.polygon((*shoulders, right + at(out, out), left + at(-out, out)), look.main)
        if self.robot:
            self.pen.rectangle((*(middle - unit * 0.8), *(middle + unit * 0.8)), fill=look.head)
            self.disc(middle, unit * 0.4, unit * 0.4, look.detail)

    def stripe(self, colour: RGB) -> None:
        upper, lower = 0.42, 0.72  # of the way from shoulder to hip
        a, b = (self.spots[2] * (1 - t) + self.spots[8] * t for t in (upper, lower))
        c, d = (self.spots[5] * (1 - t) + self.spots[11] * t for t in (upper, lower))
        out = at(self.unit * 0.45, 0)
        self.polygon((a - out, c + out, d + out, b - out), colour)

    def arms(self) -> None:
        look, unit, sleeve = self.look, self.unit, darker(self.look.main)
        for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
            self.limb(shoulder, elbow, unit * 0.95, sleeve)
            self.limb(elbow, wrist, unit * 0.85, look.second if self.robot else sleeve)
            if self.robot:
                self.disc(self.spots[elbow], unit * 0.55, unit * 0.55, look.head)
            self.disc(self.spots[wrist], unit * 0.6, unit * 0.6, look.second if self.bear else look.head)

    def behind_the_head(self) -> None:
        look, size = self.look, self.size
        if look.topping == "long":
            self.disc(self.centre + at(0, size * 0.25), size * 1.12, size * 1.25, look.detail)
        if look.topping == "ears":
            for ear in (16, 17):
                middle = self.spots[ear] - at(0, size * 0.65)
                self.disc(middle, size * 0.42, size * 0.42, look.main)
                self.disc(middle, size * 0.22, size * 0.22, look.detail)

    def robot_head(self) -> None:
        look, size, centre = self.look, self.size, self.centre
        half = size * at(1.0, 0.85)
        lamp = centre[0], centre[1] - size * 1.5
        self.pen.rounded_rectangle((*(centre - half), *(centre + half)), size * 0.25, fill=look.main)
        self.pen.line((*centre, *lamp), fill=look.second, width=max(1, round(self.unit * 0.3)))
        self.disc(lamp, self.unit * 0.35, self.unit * 0.35, look.detail)
        for eye in (14, 15):
            self.disc(self.spots[eye], size * 0.24, size * 0.24, (250, 250, 235))
            self.disc(self.spots[eye], size * 0.1, size * 0.1, (30, 30, 40))
        mouth = centre[1] + size * 0.45
        ends = (centre[0] - size * 0.5, mouth, centre[0] + size * 0.5, mouth)
        self.pen.line(ends, fill=look.second, width=max(1, round(size * 0.14)))

    def round_head(self) -> None:
        look, size, (x, y) = self.look, self.size, self.centre
        self.disc(self.centre, size, size * 1.05, look.head)
        if self.bear:
            self.disc(self.centre + at(0, size * 0.4), size * 0.45, size * 0.35, look.second)
            self.disc(self.centre + at(0, size * 0.25), size * 0.16, size * 0.12, (35, 30, 30))
        if look.topping in {"hair", "long", "cap"}:
            box = (x - size * 1.04, y - size * 1.12, x + size * 1.04, y + size * 0.75)
            self.pen.pieslice(box, 180, 360, fill=look.main if look.topping == "cap" else look.detail)
        if look.topping == "cap":
            brim = (x - size * 1.35, y - size * 0.3, x + size * 1.35, y - size * 0.1)
            self.pen.rectangle(brim, fill=darker(look.main))
        for eye in (14, 15):
            self.disc(self.spots[eye] + at(0, size * 0.12), size * 0.13, size * 0.13, (35, 30, 35))

    def horn(self) -> None:
        size, (x, y) = self.size, self.centre
        foot = y - size * 0.85
        self.polygon(((x - size * 0.35, foot), (x + size * 0.35, foot), (x, y - size * 1.9)), self.look.detail)

    def scarf(self) -> None:
        unit, neck = self.unit, self.spots[1]
        self.disc(neck + at(0, unit * 0.1), unit * 1.35, unit * 0.5, self.look.detail)
        ends = (*(neck + at(unit * 0.7, 0)), *(neck + at(unit * 1.0, unit * 2.4)))
        self.pen.line(ends, fill=self.look.detail, width=round(unit * 0.7))


def darker(colour: RGB, by: float = 0.8) -> RGB:
    return int(colour[0] * by), int(colour[1] * by), int(colour[2] * by)
