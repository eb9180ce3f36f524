"""Contact sheets: sizes, places, captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from spectral_diffusion.data.image_grid import (
    FONT,
    STRIP,
    WIDEST,
    enlarged,
    image_grid,
    labelled,
    labelled_grid,
    labelled_sheet,
    shortened,
)

WHITE = (255, 255, 255)
COLOURS = ("red", "green", "blue", "black", "yellow")


def tiles(count: int, width: int = 20, height: int = 10) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), colour) for colour in COLOURS[:count]]


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and ImageChops.difference(left, right).getbbox() is None


def has_text(image: Image.Image) -> bool:
    return ImageChops.invert(image).getbbox() is not None


@pytest.mark.parametrize(
    ("count", "columns", "across", "down"), [(1, None, 1, 1), (5, None, 3, 2), (4, None, 2, 2), (5, 4, 4, 2)]
)
@pytest.mark.parametrize("gap", [0, 3])
def test_every_picture_is_whole_in_its_place(count: int, columns: int | None, across: int, down: int, gap: int) -> None:
    images = tiles(count)
    sheet = image_grid(images, columns, gap)
    assert sheet.size == (across * (20 + gap) - gap, down * (10 + gap) - gap)
    for index, image in enumerate(images):
        left, top = index % across * (20 + gap), index // across * (10 + gap)
        assert same(sheet.crop((left, top, left + 20, top + 10)), image)
    if count < across * down:
        assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == WHITE
    if gap and across > 1:
        assert not has_text(sheet.crop((20, 0, 20 + gap, sheet.height)))


def test_pictures_of_other_sizes_and_modes_lie_at_the_top_left() -> None:
    sheet = image_grid([Image.new("L", (4, 6)), Image.new("RGBA", (10, 2), "red")], 2, gap=1)
    assert sheet.mode == "RGB" and sheet.size == (21, 6)
    assert sheet.getpixel((3, 5)) == (0, 0, 0) and sheet.getpixel((4, 5)) == WHITE
    assert sheet.getpixel((20, 1)) == (255, 0, 0) and sheet.getpixel((20, 2)) == WHITE


def test_a_caption_leaves_its_picture_as_it_is() -> None:
    [image] = tiles(1, 60, 30)
    out = labelled(image, "rex")
    assert out.size == (60, STRIP + 30)
    assert same(out.crop((0, STRIP, *out.size)), image) and has_text(out.crop((0, 0, 60, STRIP)))
    assert not has_text(labelled(image, "").crop((0, 0, 60, STRIP)))


def test_long_captions_are_cut_to_their_width() -> None:
    assert shortened("rex", 100) == "rex"
    cut = shortened("a very long caption", 60)
    assert cut.endswith("…") and "a very long caption".startswith(cut[:-1]) and 30 < FONT.getlength(cut) <= 60
    assert shortened("rex", 1) == "…" and shortened("", 1) == ""


def test_rows_and_columns_have_their_labels_beside_them() -> None:
    red, green, blue, black = tiles(4, 60, 40)
    plain = labelled_grid([[red, green], [blue, black]], gap=4)
    assert same(plain, image_grid([red, green, blue, black], 2, 4))
    sheet = labelled_grid([[red, green], [blue, black]], ["rex", "a row's name " * 9], ["photos", "alone"])
    left = sheet.width - plain.width
    assert left == WIDEST and sheet.height == plain.height + STRIP
    assert same(sheet.crop((left, STRIP, *sheet.size)), plain)
    for row in range(2):
        top = STRIP + row * 44
        assert has_text(sheet.crop((0, top, left, top + 40)))
        assert has_text(sheet.crop((left + row * 64, 0, left + row * 64 + 60, STRIP)))
    assert not has_text(sheet.crop((0, 0, left, STRIP)))


def test_pixel_art_is_enlarged_by_whole_factors() -> None:
    image = Image.new("RGB", (3, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    large = enlarged(image, 7)
    assert large.size == (9, 6) and large.getpixel((2, 2)) == (0, 0, 0) and large.getpixel((3, 2)) == WHITE
    assert same(enlarged(large, 4), large)


def test_files_are_shown_in_their_order_and_not_all_of_too_many(tmp_path: Path) -> None:
    paths = []
    for image, name in zip(tiles(5, 16, 16), COLOURS, strict=True):
        paths.append(tmp_path / f"{name}.png")
        image.save(paths[-1])
    sheet = labelled_sheet(paths, COLOURS, side=32, limit=3)
    assert sheet.size == (2 * 32 + 6, 2 * (32 + STRIP) + 6)
    assert sheet.getpixel((0, STRIP)) == (255, 0, 0) and sheet.getpixel((38, 47)) == (0, 128, 0)
    assert sheet.getpixel((0, 53 + STRIP + 1)) == (0, 0, 255) and sheet.getpixel((69, 90)) == WHITE


def test_the_last_row_is_as_high_as_its_pictures() -> None:
    tall, low = Image.new("RGB", (10, 40)), Image.new("RGB", (10, 8))
    assert image_grid([tall, low], 1, gap=2).size == (10, 50)
    assert image_grid([low, tall], 1, gap=2).size == (10, 82)
