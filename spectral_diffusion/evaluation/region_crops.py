"""Where each concept should be in a picture of this program: its scene holds the regions, so no detector is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..config.scene import Region, Scene
from ..config.settings import build
from ..core.errors import UserError
from ..core.names import with_article
from ..metrics.views import View
from ..models.tokens import token_text, typed_tokens
from ..scenes.png_metadata import read_settings
from ..scenes.region_mask import region_mask

Pixels = tuple[int, int, int, int]  # left, top, right, bottom
Tokens = Mapping[str, tuple[str, str]]  # a concept's token to its name and noun


def scene_in(path: Path) -> Scene | None:
    """The scene of a single picture of this program; None for other files and for contact sheets."""
    try:
        scene = build(Scene, read_settings(path))
    except UserError:
        return None
    return scene if scene.only_seed is not None or len(scene.every_seed()) == 1 else None


def views_in(path: Path, scene: Scene, tokens: Tokens, size: tuple[int, int]) -> list[View]:
    """The views of one picture: each region that names one concept; without regions the whole picture.

    ``size`` is the picture's, (width, height) in pixels.

    Raises:
        UserError: a region's mask cannot be read.
    """
    prompts: list[tuple[str, Region | None]] = [(region.prompt, region) for region in scene.regions]
    views = []
    for prompt, region in prompts or [(scene.prompt, None)]:
        named = {token for token in tokens if token.lower() in typed_tokens(prompt)}
        if len(named) == 1:
            name, _ = tokens[named.pop()]
            box = square_box(bounds(region, *size)) if region else None
            views.append(View(name, path, spoken(prompt, tokens), box))
    return views


def spoken(prompt: str, tokens: Tokens) -> str:
    """A prompt with nouns in place of the tokens: ``a photo of a dog``."""
    for token, (_, noun) in tokens.items():
        prompt = token_text(token).sub(with_article(noun), prompt)
    return prompt


def bounds(region: Region, width: int, height: int) -> Pixels:
    """The smallest box around a region in pixels."""
    area = region_mask(region, width, height)
    if isinstance(area, torch.Tensor):
        rows, columns = (area > 0.5).any(1).nonzero(), (area > 0.5).any(0).nonzero()
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    left, top, right, bottom = area
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def square_box(box: Pixels) -> Pixels:
    """The largest square in the middle of a box, at least one pixel wide."""
    left, top, right, bottom = box
    side = max(1, min(right - left, bottom - top))
    x, y = left + (right - left - side) // 2, top + (bottom - top - side) // 2
    return x, y, x + side, y + side
