"""The contact sheet: a row for each concept, a column for each way of being shown, the photos first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageOps

from ..data.image_grid import image_grid, labelled_grid
from ..metrics.views import View
from .measure import PHOTOS

SIDE = 70  # of a tile, in pixels
MOST = 4  # tiles in a cell, two by two


def evenly_chosen(views: Sequence[View], most: int) -> list[View]:
    """At most so many of them, evenly over all."""
    count = min(most, len(views))
    return [views[index * len(views) // count] for index in range(count)]


def tile(view: View, side: int) -> Image.Image:
    """What is seen in a view within a white square, small pictures in whole pixels."""
    image = view.open()
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    shown = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    return ImageOps.expand(shown, (0, 0, side - shown.width, side - shown.height), "white")


def draw_sheet(ways: Mapping[str, Sequence[View]], concepts: Sequence[str]) -> Image.Image:
    """The sheet of all views that are there."""
    columns = [PHOTOS, *(way for way in ways if way != PHOTOS)]

    def cell(way: str, name: str) -> Image.Image:
        mine = [view for view in ways.get(way, ()) if view.concept == name]
        blank = Image.new("RGB", (SIDE, SIDE), "white")
        return image_grid([*(tile(view, SIDE) for view in evenly_chosen(mine, MOST)), *[blank] * MOST][:MOST], 2)

    return labelled_grid([[cell(way, name) for way in columns] for name in concepts], concepts, columns, gap=12)
