"""Image files as pictures: upright, in 8 bits, whatever they came as."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from ..errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # what a file really is; others may start other programs
MAX_PIXELS = 80_000_000


def open_upright(path: Path) -> Image.Image:
    """An image turned upright, as RGBA where it is transparent somewhere, else as RGB.

    Raises:
        UserError: not a readable image, or unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path.name} has more than {MAX_PIXELS // 1_000_000} million pixels")
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I;16") or upright.mode in {"I", "F"}:
                    upright = upright.point(lambda v: v / 256).convert("L")
                if upright.mode in {"RGBA", "LA", "PA"} or "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                    if upright.getchannel("A").getextrema() != (255, 255):
                        return upright
                return upright.convert("RGB")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path.name} is too large an image") from error
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, IndexError, TypeError) as error:
        raise UserError(f"{path.name} is not a readable image") from error


def on_ground(image: Image.Image, colour: str) -> Image.Image:
    """An image as RGB, what is transparent in it shown on a colour."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def open_photo(path: Path) -> Image.Image:
    """An image as RGB, upright, transparency on white.

    Raises:
        UserError: not a readable image, or unreasonably large.
    """
    return on_ground(open_upright(path), "white")
