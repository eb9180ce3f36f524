"""Finished pictures: PNGs with their scene inside, contact sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..errors import UserError
from ..files import atomic
from ..formats.native import versions
from .scene import Scene

SETTINGS_KEY = "spectral_diffusion"
APART = {"output", "device"}  # of a scene: where it goes and what draws it


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side."""
    columns = columns or min(len(images), max(1, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def labelled_sheet(pictures: Sequence[Path], labels: Sequence[str], side: int = 128, most: int = 64) -> Image.Image:
    """A contact sheet of picture files, each at least ``side`` pixels high with its label below; the first ``most``."""
    font, tiles = ImageFont.load_default(size=12), []
    for path, label in zip(pictures[:most], labels, strict=False):
        with Image.open(path) as image:
            factor = max(1, side // image.height)
            shown = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (shown.width, shown.height + 16), "white")
        tile.paste(shown, (0, 0))
        ImageDraw.Draw(tile).text((2, shown.height + 1), label, fill=(60, 60, 60), font=font)
        tiles.append(tile)
    return grid(tiles, gap=6)


def save_png(image: Image.Image, path: Path, scene: Scene) -> None:
    """Write a PNG with its scene and library versions inside, atomically."""
    info = PngImagePlugin.PngInfo()
    held = {"settings": embedded(scene), "versions": versions()}
    info.add_itxt(SETTINGS_KEY, json.dumps(held))  # in their own order: adapters act in it
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def embedded(scene: Scene) -> dict[str, Any]:
    """What of a scene a picture holds."""
    return scene.model_dump(mode="json", exclude=APART)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings embedded in a picture.

    Raises:
        UserError: none are there.
    """
    try:
        with Image.open(path) as image:
            found: dict[str, Any] = json.loads(image.info[SETTINGS_KEY])["settings"]
            return dict(found)
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} holds no settings of this program.") from error


def is_same(path: Path, scene: Scene) -> bool:
    """Whether a picture is there that was drawn from this very scene."""
    try:
        return read_settings(path) == embedded(scene)
    except UserError:
        return False
