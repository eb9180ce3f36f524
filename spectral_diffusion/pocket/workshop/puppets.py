"""Articulated figures of the pocket world: people, robots and bears, drawn from the positions of their joints.

A pose is a set of angles; joints follow from it, and both the drawing and the OpenPose keypoints follow from
the joints, so a keypose always tells the truth about its picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, pi, sin
from random import Random

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

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
    big = 3
    points = joints(pose, look)
    pad = 0.2
    low, high = points.min(0) - pad, points.max(0) + pad
    scale = height * big / (high[1] - low[1] - 2 * pad + 0.25)
    spots = (points - low) * scale
    size = tuple(int(v) for v in np.ceil((high - low) * scale))
    image = Image.new("RGBA", (size[0], size[1]))
    pen = ImageDraw.Draw(image)
    unit = look.limb * scale

    def darker(colour: RGB, by: float = 0.8) -> RGB:
        return int(colour[0] * by), int(colour[1] * by), int(colour[2] * by)

    def disc(centre: Sequence[float], rx: float, ry: float, colour: RGB) -> None:
        x, y = centre
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def limb(a: int, b: int, width: float, colour: RGB) -> None:
        pen.line((*spots[a], *spots[b]), fill=colour, width=max(1, round(width)))
        for end in (a, b):
            disc(spots[end], width / 2, width / 2, colour)

    robot, bear = look.kind == "robot", look.kind == "bear"
    if look.extra == "cape":
        left, right = spots[2], spots[5]
        foot = (spots[10] + spots[13]) / 2
        pen.polygon([*map(tuple, (left, right, foot + at(unit * 2.4, 0), foot - at(unit * 2.4, 0)))], fill=look.detail)
    legs = look.main if bear else look.second
    for hip, knee, ankle in ((8, 9, 10), (11, 12, 13)):
        limb(hip, knee, unit * 1.1, legs)
        limb(knee, ankle, unit, legs)
        if robot:
            disc(spots[knee], unit * 0.62, unit * 0.62, look.head)
        disc(spots[ankle] + at(0, unit * 0.35), unit * 0.85, unit * 0.5, darker(legs, 0.6) if not bear else look.second)
    hips_left, hips_right = spots[8], spots[11]
    if bear:
        middle = (spots[1] + (hips_left + hips_right) / 2) / 2
        tall = abs(spots[1][1] - hips_left[1]) * 0.68
        disc(middle, look.shoulders * scale * 1.15, tall, look.main)
        disc(middle + at(0, tall * 0.15), look.shoulders * scale * 0.7, tall * 0.65, look.second)
    else:
        wide = unit * (0.5 if robot else 0.35)
        corners = [
            spots[2] - at(wide, wide),
            spots[5] + at(wide, -wide),
            hips_right + at(wide, wide),
            hips_left + at(-wide, wide),
        ]
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=look.main)
        if robot:
            chest = (spots[1] + (hips_left + hips_right) / 2) / 2
            pen.rectangle((*(chest - unit * 0.8), *(chest + unit * 0.8)), fill=look.head)
            disc(chest, unit * 0.4, unit * 0.4, look.detail)
    if look.stripe:
        upper, lower = 0.42, 0.72
        a, b = (spots[2] * (1 - t) + hips_left * t for t in (upper, lower))
        c, d = (spots[5] * (1 - t) + hips_right * t for t in (upper, lower))
        out = np.array([unit * 0.45, 0])
        pen.polygon([(float(x), float(y)) for x, y in (a - out, c + out, d + out, b - out)], fill=look.stripe)
    for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
        sleeve = darker(look.main)
        limb(shoulder, elbow, unit * 0.95, sleeve)
        limb(elbow, wrist, unit * 0.85, look.second if robot else sleeve)
        if robot:
            disc(spots[elbow], unit * 0.55, unit * 0.55, look.head)
        disc(spots[wrist], unit * 0.6, unit * 0.6, look.head if not bear else look.second)

    size_head = look.head_size * scale
    centre = (spots[14] + spots[15]) / 2 - at(0, -0.22 * size_head)
    if look.topping == "long":
        disc(centre + at(0, size_head * 0.25), size_head * 1.12, size_head * 1.25, look.detail)
    if look.topping == "ears":
        for ear in (16, 17):
            disc(spots[ear] - at(0, size_head * 0.65), size_head * 0.42, size_head * 0.42, look.main)
            disc(spots[ear] - at(0, size_head * 0.65), size_head * 0.22, size_head * 0.22, look.detail)
    if robot:
        half = size_head * np.array([1.0, 0.85])
        pen.rounded_rectangle((*(centre - half), *(centre + half)), size_head * 0.25, fill=look.main)
        pen.line((*centre, centre[0], centre[1] - size_head * 1.5), fill=look.second, width=max(1, round(unit * 0.3)))
        disc((centre[0], centre[1] - size_head * 1.5), unit * 0.35, unit * 0.35, look.detail)
        for eye in (14, 15):
            disc(spots[eye], size_head * 0.24, size_head * 0.24, (250, 250, 235))
            disc(spots[eye], size_head * 0.1, size_head * 0.1, (30, 30, 40))
        pen.line(
            (
                centre[0] - size_head * 0.5,
                centre[1] + size_head * 0.45,
                centre[0] + size_head * 0.5,
                centre[1] + size_head * 0.45,
            ),
            fill=look.second,
            width=max(1, round(size_head * 0.14)),
        )
    else:
        disc(centre, size_head, size_head * 1.05, look.head)
        if bear:
            disc(centre + at(0, size_head * 0.4), size_head * 0.45, size_head * 0.35, look.second)
            disc(centre + at(0, size_head * 0.25), size_head * 0.16, size_head * 0.12, (35, 30, 30))
        if look.topping in {"hair", "long", "cap"}:
            box = (
                centre[0] - size_head * 1.04,
                centre[1] - size_head * 1.12,
                centre[0] + size_head * 1.04,
                centre[1] + size_head * 0.75,
            )
            pen.pieslice(box, 180, 360, fill=look.main if look.topping == "cap" else look.detail)
            if look.topping == "cap":
                pen.rectangle(
                    (
                        centre[0] - size_head * 1.35,
                        centre[1] - size_head * 0.3,
                        centre[0] + size_head * 1.35,
                        centre[1] - size_head * 0.1,
                    ),
                    fill=darker(look.main),
                )
        for eye in (14, 15):
            disc(spots[eye] + at(0, size_head * 0.12), size_head * 0.13, size_head * 0.13, (35, 30, 35))
    if look.extra == "horn":
        pen.polygon(
            [
                (centre[0] - size_head * 0.35, centre[1] - size_head * 0.85),
                (centre[0] + size_head * 0.35, centre[1] - size_head * 0.85),
                (centre[0], centre[1] - size_head * 1.9),
            ],
            fill=look.detail,
        )
    if look.extra == "scarf":
        disc(spots[1] + at(0, unit * 0.1), unit * 1.35, unit * 0.5, look.detail)
        pen.line(
            (*(spots[1] + at(unit * 0.7, 0)), *(spots[1] + at(unit * 1.0, unit * 2.4))),
            fill=look.detail,
            width=round(unit * 0.7),
        )
    seen = image.getchannel("A").getbbox()
    assert seen
    image, spots = image.crop(seen), spots - np.array(seen[:2])
    factor = height / image.height
    target = (max(2, round(image.width * factor)), height)
    return image.resize(target, Image.Resampling.LANCZOS), spots * (np.array(target) / np.array(image.size))
