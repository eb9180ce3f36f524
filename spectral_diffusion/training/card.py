"""The card of a finished training: what it is, how the loss fell, what it drew on the way, its settings."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..adapters.adapter import Adapter
from ..adapters.formats.card import model_card
from ..config.settings import to_yaml
from ..config.train import TrainConfig
from ..core.files import atomic, write_text
from ..core.machine import made_on
from ..core.paths import without_folders

SIZE = (640, 280)
MARGIN = (56, 14, 14, 30)  # left, top, right, bottom, in pixels
Points = Sequence[tuple[int, float]]


def curve_picture(curve: Points, title: str = "loss") -> Image.Image:
    """A curve over steps as a picture with its axes."""
    image = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    values, steps = [value for _, value in finite] or [0.0], [step for step, _ in finite] or [0]
    low, high = min(values), max(values)
    spread, length = (high - low) or 1.0, (steps[-1] - steps[0]) or 1

    def point_at(step: int, value: float) -> tuple[float, float]:
        return (
            left + (step - steps[0]) / length * (right - left),
            bottom - (value - low) / spread * (bottom - top),
        )

    for share in (0.0, 0.5, 1.0):
        value, step = low + share * (high - low), round(steps[0] + share * (steps[-1] - steps[0]))
        y, x = point_at(steps[0], value)[1], point_at(step, low)[0]
        pen.line([(left, y), (right, y)], fill=(225, 225, 225))
        pen.text((4, y - 7), f"{value:.4g}", fill=(90, 90, 90), font=font)
        pen.text((min(x, right - 40), bottom + 8), f"{step}", fill=(90, 90, 90), font=font)
    pen.text((left + 6, top), title, fill=(90, 90, 90), font=font)
    points = [point_at(step, value) for step, value in finite]
    if len(points) > 1:
        pen.line(points, fill=(30, 90, 180), width=2)
    return image


def write_card(
    adapter: Adapter, config: TrainConfig, curve: Points, samples: Sequence[tuple[int, str]], likeness: Points
) -> Path:
    """Write ``<output>.md`` and ``<stem>-curve.png`` beside the adapter; returns the card's path."""
    output = config.output
    picture, card = output.with_name(f"{output.stem}-curve.png"), output.with_suffix(".md")
    with atomic(picture) as temporary:
        curve_picture(curve).save(temporary, format="PNG")
    existing = [(step, file) for step, file in samples if Path(file).is_file()]
    beside = {file: Path(os.path.relpath(file, output.parent)).as_posix() for _, file in existing}
    facts = {
        "method": adapter.method.name, "rank": adapter.rank, "slot": str(adapter.slot or ""),
        "trained numbers": f"{adapter.count():,}", "steps": config.steps, "seed": config.seed,
        "mixed precision": config.mixed_precision, "made on": made_on(adapter.provenance),
    }  # fmt: skip
    text = model_card(
        adapter.name, without_folders(adapter.base), {adapter.token: adapter.noun}, facts, [output.name],
        beside[existing[-1][1]] if existing else "",
    )  # fmt: skip
    parts = ["## How it was trained", "", f"![loss]({picture.name})", ""]
    if likeness:
        best = max(likeness, key=lambda point: point[1])
        parts += [
            f"Likeness to the photos: {likeness[-1][1]:.3f} at the end, {best[1]:.3f} at best (step {best[0]}).",
            "",
        ]
    for step, file in existing[:-1]:
        parts += [f"Step {step}:", "", f"![step {step}]({beside[file]})", ""]
    settings = "\n".join(
        line for line in to_yaml(config, shared=True).splitlines() if not line.startswith(("concept:", "output:"))
    )
    parts += ["## Settings", "", "```yaml", settings, "```", ""]
    write_text(card, f"{text}\n" + "\n".join(parts))
    return card
