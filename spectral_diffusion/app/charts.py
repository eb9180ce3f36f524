"""Small pictures for the page as SVG, in the page's own colors (see ``style.css``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 30  # margins


def loss_curve(points: Sequence[tuple[int, float]], steps: int) -> str:
    """The running loss over the steps of a training; without points, the empty axes."""
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    low, high = _range([loss for _, loss in points])
    steps = max([steps, 1, *(step for step, _ in points)])

    def position(step: float, loss: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / steps
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = []
    for loss in (low, (low + high) / 2, high):
        _, y = position(0, loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if points:
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for step, anchor in ((0, "start"), (steps // 2, "middle"), (steps, "end")):
        parts.append(f'<text x="{position(step, low)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step}</text>')
    title = "Loss over steps: nothing yet"
    if points:
        line = " ".join("{:.1f},{:.1f}".format(*position(*point)) for point in points)
        x, y = position(*points[-1])
        parts.append(f'<polyline class="loss" points="{line}"/><circle class="loss" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        title = f"Loss over steps: {points[0][1]:.3g} at step {points[0][0]}, {points[-1][1]:.3g} at {points[-1][0]}"
    inside = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{title}</title>{inside}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value with a margin, never equal."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - air) if low >= 0 else low - air, high + air
