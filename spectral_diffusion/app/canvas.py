"""The canvas of the page as data: strokes, a keypose and regions, checked before anything is done with them."""

from __future__ import annotations

import base64
import binascii
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..core import assets as resources
from ..core.errors import UserError
from ..core.files import parse_json
from ..data.image_io import open_photo, open_upright
from .poses import people
from .workspace import pick

SIDE = 512  # longer side in pixels of images that the server puts on the canvas
MOST_SIDE = 2048  # longer side in pixels of images that the page may send
MOST_TEXT = 8_000_000  # of a PNG as text
MOST_REGIONS = 16
MOST_WORDS = 2000  # characters of a region's prompt
PNG = "data:image/png;base64,"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CanvasRegion:
    """A region: its box as fractions (left, top, right, bottom), its prompt, and the adapter bound to it or ""."""

    box: Box
    prompt: str
    concept: str = ""


@dataclass(frozen=True)
class Canvas:
    """The canvas: the strokes and the keypose as PNG files, and the regions."""

    strokes: bytes | None = None
    keypose: bytes | None = None
    regions: tuple[CanvasRegion, ...] = ()


def read_canvas(value: Any) -> Canvas:
    """Parse and check the page's value, ``{"strokes": PNG as data URL, "keypose": the same, "regions": […]}``.

    Raises:
        UserError: malformed, or too large.
    """
    if value in (None, "", {}):
        return Canvas()
    if not isinstance(value, dict):
        raise UserError("The canvas cannot be read; clear it and draw again.")
    return Canvas(
        read_png(value.get("strokes"), "sketch"),
        read_png(value.get("keypose"), "keypose"),
        read_regions(value.get("regions")),
    )


def read_png(text: Any, what: str) -> bytes | None:
    """The bytes of a PNG data URL; None if it is empty or holds no stroke.

    Raises:
        UserError: not one, or too large.
    """
    if text in (None, ""):
        return None
    if not isinstance(text, str) or not text.startswith(PNG):
        raise UserError(f"The {what} on the canvas is no PNG; clear it and draw again.")
    if len(text) > MOST_TEXT:
        raise UserError(f"The {what} on the canvas is over {MOST_TEXT // 1_000_000} MB; clear it and draw again.")
    try:
        data = base64.b64decode(text[len(PNG) :], validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if max(width, height) > MOST_SIDE:
                raise UserError(
                    f"The {what} of {width}×{height} is too large for the canvas; its sides may be {MOST_SIDE} pixels."
                )
            pixels = image.convert("RGBA")
    except UserError:
        raise
    except (binascii.Error, OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise UserError(f"The {what} on the canvas is no readable PNG; clear it and draw again.") from error
    return data if has_strokes(pixels) else None


def has_strokes(image: Image.Image) -> bool:
    """Whether an image is not uniform in color and transparency."""
    ranges: Any = image.convert("RGBA").getextrema()
    return any(high - low > 16 for low, high in ranges)


def read_regions(value: Any) -> tuple[CanvasRegion, ...]:
    """Regions as a list of ``{"box": [left, top, right, bottom], "prompt": …, "concept": …}``, or that as JSON text.

    Raises:
        UserError: an invalid box, or anything else that is malformed.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except ValueError as error:
            raise UserError(f"The regions are no JSON ({str(error)[:80]}); {_FORM}") from error
    value = value or []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"The regions are no list; {_FORM}")
    if len(value) > MOST_REGIONS:
        raise UserError(f"There are {len(value)} regions; at most {MOST_REGIONS} are possible.")
    return tuple(_region(item, number) for number, item in enumerate(value, 1))


_FORM = 'write [{"box": [0, 0, 0.5, 1], "prompt": "a dog", "concept": "rex"}].'


def _region(region: dict[str, Any], number: int) -> CanvasRegion:
    if odd := sorted(map(str, set(region) - {"box", "prompt", "concept"})):
        raise UserError(f"Region {number} has an unknown part '{odd[0][:40]}'; {_FORM}")
    box, prompt, concept = region.get("box"), region.get("prompt") or "", region.get("concept") or ""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_share(side) for side in box):
        raise UserError(f"The box of region {number} must be four numbers from 0 to 1: left, top, right, bottom.")
    left, top, right, bottom = (float(side) for side in box)
    if not (left < right and top < bottom):
        raise UserError(f"The box of region {number} has no area; draw it larger or delete it.")
    if not isinstance(prompt, str) or not isinstance(concept, str) or len(prompt) > MOST_WORDS:
        raise UserError(f"The prompt of region {number} must be a text of at most {MOST_WORDS} characters.")
    if not prompt.strip():
        raise UserError(f"Region {number} has no prompt; write what goes there, or delete its box.")
    return CanvasRegion((left, top, right, bottom), prompt.strip(), concept)


def _is_share(side: Any) -> bool:
    return isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side) and 0 <= side <= 1


# --- images for the canvas ---------------------------------------------------------------------


def as_url(data: bytes | None) -> str:
    """A PNG file as a data URL; "" for none."""
    return PNG + base64.b64encode(data).decode("ascii") if data else ""


def png_of(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_ink(strokes: Image.Image, ratio: float | None = None) -> bytes:
    """White strokes on black (mode L) in the canvas's form: a PNG of black ink on transparency, undistorted."""
    strokes = _framed(strokes, ratio)
    ink = Image.new("RGBA", strokes.size, (0, 0, 0, 0))
    ink.putalpha(strokes)
    return png_of(ink)


def ink_of_drawing(path: Path, ratio: float | None = None) -> bytes:
    """An uploaded drawing as ink, on any paper; framed to the width-to-height ``ratio``, by default its own.

    Raises:
        UserError: not a readable image, or an empty sheet.
    """
    from ..scenes.extract import clean_strokes  # imports scipy, which a page need not wait for

    return _some(as_ink(clean_strokes(_fitted(open_upright(path))), ratio), "No stroke was found in that drawing")


def ink_of_photo(path: Path, ratio: float | None = None) -> bytes:
    """A photo's edges as ink, see :func:`ink_of_drawing`.

    Raises:
        UserError: not a readable image, no edge in it, or no library for it.
    """
    from ..scenes.extract import sketch_of

    return _some(as_ink(sketch_of(_fitted(open_photo(path))), ratio), "No edge was found in that photo")


def _some(data: bytes, otherwise: str) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        if not has_strokes(image):
            raise UserError(f"{otherwise}; draw on the canvas instead.")
    return data


def keypose_of_photo(path: Path, ratio: float | None = None) -> bytes:
    """The skeletons of a photo's people as a PNG, see :func:`ink_of_drawing`.

    Raises:
        UserError: not a readable image, no person in it, or no library for it.
    """
    from ..scenes.extract import keypose_of
    from ..scenes.keypose import draw_keypose

    image = _fitted(open_photo(path))
    skeletons = keypose_of(image)
    if not skeletons:
        raise UserError("No person was found in that photo; choose one of the poses instead.")
    return png_of(_framed(draw_keypose(skeletons, *image.size), ratio))


def keypose_preset(pose: str, count: int, ratio: float) -> bytes:
    """A few people in a ready-made pose as a PNG of the canvas's width-to-height ratio.

    Raises:
        UserError: no such pose or number.
    """
    width, height = picture_size(ratio)
    from ..scenes.keypose import draw_keypose

    return png_of(draw_keypose(people(pose, count, width, height), width, height, thickness=height / 45))


def sketch_files() -> dict[str, Path]:
    """The ready-made sketches by name."""
    return {path.stem: path for path in sorted((resources.concepts() / "sketches").glob("*.png"))}


def ready_sketch(name: str, ratio: float | None = None) -> bytes:
    """A ready-made sketch as ink, see :func:`ink_of_drawing`.

    Raises:
        UserError: no such sketch.
    """
    path = pick(name, sketch_files(), "sketch", "choose one of the list")
    with Image.open(path) as image:
        return as_ink(image.convert("L"), ratio)


def picture_size(ratio: float) -> tuple[int, int]:
    """The canvas's pixels at a width-to-height ratio."""
    ratio = min(8.0, max(1 / 8, ratio))
    return (SIDE, round(SIDE / ratio)) if ratio >= 1 else (round(SIDE * ratio), SIDE)


def _fitted(image: Image.Image) -> Image.Image:
    """Shrink an image to the canvas's size."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def _framed(image: Image.Image, ratio: float | None) -> Image.Image:
    """Fit an image centered on black into a canvas of that ratio."""
    if ratio is None:
        return _fitted(image)
    return ImageOps.pad(image, picture_size(ratio), Image.Resampling.BICUBIC, color=0)
