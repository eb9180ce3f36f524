"""Contact sheets: pictures side by side, with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

STRIP = 16  # pixels of a line of text
WIDEST = 150  # pixels of the labels of rows at most
FONT = ImageFont.load_default(size=12)


def image_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures in rows on white, in a square if ``columns`` is not given; smaller ones are at the top left.

    All rows but the last are as high as the highest picture.
    """
    from diffusers.utils import make_image_grid  # here: pages and --help wait for no diffusers

    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(sides) + gap for sides in zip(*(image.size for image in images)))
    tiles = [ImageOps.expand(i.convert("RGB"), (0, 0, width - i.width, height - i.height), "white") for i in images]
    tiles += [Image.new("RGB", (width, height), "white")] * (rows * columns - len(images))
    sheet: Image.Image = make_image_grid(tiles, rows, columns)
    below = height - max(image.height for image in images[(rows - 1) * columns :])
    return sheet.crop((0, 0, sheet.width - gap, sheet.height - below))


def labelled(image: Image.Image, text: str) -> Image.Image:
    """A picture with a caption above it."""
    return labelled_grid([[image]], column_labels=[text])


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    gap: int = 4,
) -> Image.Image:
    """Rows of pictures with a label to the left of each row and one above each column."""
    cells = [image for row in rows for image in row]
    width, height = (max(sides) for sides in zip(*(image.size for image in cells)))
    left = min(WIDEST, max((math.ceil(FONT.getlength(text)) + 8 for text in row_labels), default=0))
    top = STRIP if column_labels else 0
    sheet = ImageOps.expand(image_grid(cells, len(rows[0]), gap), (left, top, 0, 0), "white")
    for row, text in enumerate(row_labels):
        write(sheet, (2, top + row * (height + gap) + (height - STRIP) // 2), text, left - 4)
    for column, text in enumerate(column_labels):
        write(sheet, (left + column * (width + gap) + 2, 1), text, width - 2)
    return sheet


def labelled_sheet(pictures: Sequence[Path], labels: Sequence[str], side: int = 128, limit: int = 64) -> Image.Image:
    """Picture files, each at least ``side`` pixels high with its label above; the first ``limit``."""
    tiles = []
    for path, label in zip(pictures[:limit], labels, strict=False):
        with Image.open(path) as image:
            tiles.append(labelled(enlarged(image.convert("RGB"), side), label))
    return image_grid(tiles, gap=6)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """A picture at the largest whole multiple of its size whose height is at most ``side``, or as it is."""
    factor = max(1, side // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write(image: Image.Image, position: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text into a picture, shortened to ``width`` pixels."""
    ImageDraw.Draw(image).text(position, shortened(text, width), fill=(60, 60, 60), font=FONT)


def shortened(text: str, width: int) -> str:
    """A line of text of at most ``width`` pixels, with … where it was cut."""
    if FONT.getlength(text) <= width:
        return text
    while text and FONT.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
