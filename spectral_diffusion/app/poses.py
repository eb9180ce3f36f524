"""Ready-made poses: skeletons of 18 OpenPose points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .workspace import pick

MOST_PEOPLE = 3
Point = tuple[float, float]

# A standing figure of height 1 with its feet's middle at the origin, y down; points in OpenPose's order (nose, neck,
# right shoulder, elbow, wrist, left …, right hip, knee, ankle, left …, right eye, left eye, right ear, left ear).
# The person's right is the picture's left.
STANDING: tuple[Point, ...] = (
    (0, -0.87), (0, -0.76), (-0.12, -0.75), (-0.16, -0.60), (-0.18, -0.45), (0.12, -0.75), (0.16, -0.60), (0.18, -0.45),
    (-0.08, -0.47), (-0.09, -0.25), (-0.10, -0.03), (0.08, -0.47), (0.09, -0.25), (0.10, -0.03),
    (-0.03, -0.90), (0.03, -0.90), (-0.06, -0.88), (0.06, -0.88),
)  # fmt: skip
SEATED = {index: (x, y + 0.22) for index, (x, y) in enumerate(STANDING) if index not in (9, 10, 12, 13)}

# Each pose by its differences from standing.
POSES: Mapping[str, Mapping[int, Point]] = {
    "standing": {},
    "waving": {3: (-0.27, -0.83), 4: (-0.22, -0.99)},
    "arms up": {3: (-0.22, -0.88), 4: (-0.20, -1.03), 6: (0.22, -0.88), 7: (0.20, -1.03)},
    "arms out": {3: (-0.27, -0.75), 4: (-0.42, -0.75), 6: (0.27, -0.75), 7: (0.42, -0.75)},
    "walking": {
        3: (-0.17, -0.61), 4: (-0.09, -0.48), 6: (0.17, -0.61), 7: (0.25, -0.48),
        9: (-0.15, -0.26), 10: (-0.24, -0.05), 12: (0.15, -0.27), 13: (0.17, -0.03),
    },
    "sitting": SEATED | {
        9: (-0.21, -0.22), 10: (-0.21, -0.01), 12: (0.21, -0.22), 13: (0.21, -0.01),
        3: (-0.17, -0.39), 4: (-0.18, -0.25), 6: (0.17, -0.39), 7: (0.18, -0.25),
    },
}  # fmt: skip


def people(pose: str, count: int, width: int, height: int) -> list[np.ndarray]:
    """``count`` people side by side in one pose, arrays (18, 2) of pixels in a picture of width × height.

    Raises:
        UserError: no such pose, or more people than fit.
    """
    changed = pick(pose, POSES, "pose", "choose one of the list")
    number = pick(str(count), {str(n): n for n in range(1, MOST_PEOPLE + 1)}, "number of people", "choose one of them")
    points = np.array([changed.get(index, point) for index, point in enumerate(STANDING)], float)
    points[:, 0] -= (points[:, 0].min() + points[:, 0].max()) / 2
    tall = min(0.86 * height, 0.95 * width / number / float(np.ptp(points[:, 0])))
    feet = 0.5 * (height + tall)
    return [points * tall + np.array([(index + 0.5) * width / number, feet]) for index in range(number)]
