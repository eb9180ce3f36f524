"""The contact sheet: a row per concept, a column per setting, the photos first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageOps

from ..data.image_grid import image_grid, labelled_grid
from ..metrics.views import View
from .measure import PHOTOS

SIDE = 70  # of a tile, in pixels
MOST = 4  # tiles in a cell, two by two


def evenly_chosen(views: Sequence[View], most: int) -> list[View]:
    """At most ``most`` views, evenly spaced."""
    count = min(most, len(views))
    return [views[index * len(views) // count] for index in range(count)]


def tile(view: View, side: int) -> Image.Image:
    """A view within a white square; small ones are enlarged without interpolation."""
    image = view.open()
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    scaled = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    return ImageOps.expand(scaled, (0, 0, side - scaled.width, side - scaled.height), "white")


def draw_sheet(shown: Mapping[str, Sequence[View]], concepts: Sequence[str]) -> Image.Image:
    """The sheet of all views."""
    columns = [PHOTOS, *(setting for setting in shown if setting != PHOTOS)]

    def cell(setting: str, name: str) -> Image.Image:
        mine = [view for view in shown.get(setting, ()) if view.concept == name]
        blank = Image.new("RGB", (SIDE, SIDE), "white")
        return image_grid([*(tile(view, SIDE) for view in evenly_chosen(mine, MOST)), *[blank] * MOST][:MOST], 2)

    return labelled_grid([[cell(setting, name) for setting in columns] for name in concepts], concepts, columns, gap=12)
