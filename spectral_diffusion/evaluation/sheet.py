"""The contact sheet: a row for each concept, a column for each way of being shown, the photos first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..metrics.views import View
from .measure import PHOTOS

SIDE, GAP, TOP, LEFT = 72, 12, 22, 92  # of a tile, between cells, above and beside them, in pixels
MOST = 4  # tiles in a cell, two by two


def evenly_chosen(views: Sequence[View], most: int) -> list[View]:
    """At most so many of them, evenly over all."""
    count = min(most, len(views))
    return [views[index * len(views) // count] for index in range(count)]


def tile(view: View, side: int) -> Image.Image:
    """What is seen in a view within a square, small pictures in whole pixels."""
    image = view.open()
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def draw_sheet(ways: Mapping[str, Sequence[View]], concepts: Sequence[str]) -> Image.Image:
    """The sheet of all views that are there."""
    columns = [PHOTOS, *(way for way in ways if way != PHOTOS)]
    cell = 2 * SIDE + GAP
    sheet = Image.new("RGB", (LEFT + len(columns) * cell, TOP + len(concepts) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, way in enumerate(columns):
        draw.text((LEFT + column * cell, 4), fitted_tile(draw, way, cell - GAP, font), fill="black", font=font)
    for row, name in enumerate(concepts):
        top = TOP + row * cell
        draw.text((6, top + SIDE - 8), fitted_tile(draw, name, LEFT - 12, font), fill="black", font=font)
        for column, way in enumerate(columns):
            mine = [view for view in ways.get(way, ()) if view.concept == name]
            for index, view in enumerate(evenly_chosen(mine, MOST)):
                place = (LEFT + column * cell + index % 2 * SIDE, top + index // 2 * SIDE)
                sheet.paste(tile(view, SIDE - 2), place)
    return sheet


def fitted_tile(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The text, shortened to a width in pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
