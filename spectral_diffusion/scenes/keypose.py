"""Keyposes: people as 18 OpenPose keypoints, drawn in OpenPose's colors on black.

Order of the points: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee,
ankle, left hip, knee, ankle, right eye, left eye, right ear, left ear ("right" is the person's own).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

POINTS = 18
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip


def draw_keypose(people: Sequence[np.ndarray], width: int, height: int, thickness: float | None = None) -> Image.Image:
    """Draw people as OpenPose skeletons, an RGB image of width × height pixels.

    Args:
        people: arrays (18, 2) of x, y in pixels; a row with NaN is a point that is not seen.
        thickness: of the limbs in pixels; default a hundredth of the shorter side, at least 1.5.
    """
    factor = 4  # drawn larger and scaled down, for smooth lines
    thick = (thickness or max(1.5, min(width, height) / 100)) * factor
    image = Image.new("RGB", (width * factor, height * factor))
    draw = ImageDraw.Draw(image)

    def dot(x: float, y: float, radius: float, color: tuple[int, int, int]) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    for person in people:
        points = np.asarray(person, dtype=float) * factor
        for index, (a, b) in enumerate(LIMBS):
            if np.isfinite(points[[a, b]]).all():
                color = tuple(int(0.6 * c) for c in COLORS[index])
                draw.line((*points[a], *points[b]), fill=color, width=round(thick))
        for index, (x, y) in enumerate(points[:POINTS]):
            if np.isfinite(x + y):
                dot(x, y, thick * 0.7, COLORS[index])
    return image.resize((width, height), Image.Resampling.BOX)
