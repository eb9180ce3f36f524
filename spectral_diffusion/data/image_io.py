"""Image files as pictures: upright, in 8 bits, whatever they came as."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import UserError
from ..core.files import exists, is_file

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # what a file really is; others may start other programs
UNREAD = {
    ".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL", ".dng": "raw", ".cr2": "raw", ".cr3": "raw",
    ".nef": "raw", ".arw": "raw",
}  # fmt: skip
MAX_PIXELS = 80_000_000
DRAWN = "spectral_diffusion_drawing"  # marks a sketch or a keypose that was drawn from a photo


def open_upright(path: Path) -> Image.Image:
    """An image turned upright, as RGBA where it is transparent somewhere, else as RGB.

    Raises:
        UserError: not a readable image, or unreasonably large.
    """
    if not is_file(path):  # opening a pipe may never end
        raise UserError(f"{path.name} is not a readable image" if exists(path) else f"No such file: {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path.name} has more than {MAX_PIXELS // 1_000_000} million pixels")
                image.load()
                upright = in_8_bits(turned(image))
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


def is_control_image(path: Path) -> bool:
    """Whether a picture is marked as a drawing that this program made of a photo."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return DRAWN in image.info
    except Exception:  # a hostile file may break a decoder in any way
        return False


def turned(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says; one whose EXIF cannot be read stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # invalid bytes there raise nearly everything
        return image


def in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of more bits as mode L; any other as it is. Floating point is in 0…1, or in 0…255."""
    if not (image.mode.startswith("I;16") or image.mode in {"I", "F"}):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode != "F":
        values /= 256
    elif values.max(initial=0) <= 1:
        values *= 255
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def on_ground(image: Image.Image, color: str) -> Image.Image:
    """An image as RGB, what is transparent in it shown on a color."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")


def open_photo(path: Path) -> Image.Image:
    """An image as RGB, upright, transparency on white.

    Raises:
        UserError: not a readable image, or unreasonably large.
    """
    return on_ground(open_upright(path), "white")


def open_on_black(path: Path) -> Image.Image:
    """A picture as RGB, upright; what is transparent is black, as in keyposes and masks.

    Raises:
        UserError: not a readable image.
    """
    return on_ground(open_upright(path), "black")
