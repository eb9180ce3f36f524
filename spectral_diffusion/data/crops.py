"""Which part of a photo is shown, at what size, and whether mirrored; the same part of its mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.train import TrainConfig
from ..core.errors import UserError
from ..core.rng import keyed_generator

Frame = tuple[int, int]  # width, height in pixels


class Crop(NamedTuple):
    """A picture resized to ``resized`` (width, height), and from there the part of size ``frame`` at left, top."""

    resized: Frame
    frame: Frame
    left: int
    top: int
    mirrored: bool = False


def choose_crop(size: Frame, frame: Frame, scale: float, generator: torch.Generator, where: str = "random") -> Crop:
    """Cover ``frame`` with a picture of ``size``, 1 … ``scale`` times as large, and choose the part that is shown.

    Args:
        where: ``random``, ``center``, or ``head``: somewhere across, at the top of the picture.
    """
    grow, right, down = torch.rand(3, generator=generator).tolist()
    tight = 0 if frame[0] * size[1] >= frame[1] * size[0] else 1  # the side that just fits
    factor = round(frame[tight] * (1 + (scale - 1) * grow)) / size[tight]
    width, height = (max(least, round(side * factor)) for least, side in zip(frame, size, strict=True))
    if where == "center":
        right = down = 0.5
    elif where == "head":
        down = 0.0
    return Crop((width, height), frame, round(right * (width - frame[0])), round(down * (height - frame[1])))


def crop_image(image: Image.Image, crop: Crop, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The part of a picture that a crop shows."""
    part = image.resize(crop.resized, resample).crop(
        (crop.left, crop.top, crop.left + crop.frame[0], crop.top + crop.frame[1])
    )
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else part


def cut_photo(image: Image.Image, crop: Crop) -> Tensor:
    """The part of an RGB picture that a crop shows, (3, height, width) in −1…1."""
    pixels = np.asarray(crop_image(image, crop), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def cut_mask(mask: Image.Image, crop: Crop) -> Tensor:
    """The part of a grey mask that a crop shows, (1, height, width) in 0…1; no pixel is a mixture of others."""
    pixels = np.asarray(crop_image(mask, crop, Image.Resampling.NEAREST), dtype=np.float32)
    return torch.from_numpy(pixels)[None] / 255


def random_crop(image: Image.Image, size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Resize the short edge to size × (1 … scale), crop size × size at random; (3, size, size) in −1…1."""
    return cut_photo(image, choose_crop(image.size, (size, size), scale, generator))


def crops_of(size: Frame, frame: Frame, caption: str, config: TrainConfig, index: int) -> list[Crop]:
    """All crops of photo number ``index``, keyed by it; a photo whose caption names a side is not mirrored."""
    sided = re.search(r"\b(left|right)\b", caption.lower())
    crops = []
    for number in range(config.crops_per_image):
        generator = keyed_generator(config.seed, "crop", index, number)
        crop = choose_crop(size, frame, config.resize_ratio, generator, config.data.crop)
        mirrored = float(torch.rand((), generator=generator)) < config.data.flip and not sided
        crops.append(crop._replace(mirrored=bool(mirrored)))
    return crops


def bucket_frames(size: int, step: int) -> list[Frame]:
    """Every frame of sides divisible by ``step``, at most size² pixels, and no side beyond half or twice ``size``.

    Raises:
        UserError: there is none.
    """
    sides = [side for side in range(step, 2 * size + 1, step) if 2 * side >= size]
    frames = [(width, height) for width in sides for height in sides if width * height <= size * size]
    if not frames:
        raise UserError(f"data.aspect_buckets needs a resolution of at least {step} on this base; {size} is too small.")
    return frames


def best_frame(size: Frame, frames: Sequence[Frame]) -> Frame:
    """The frame that shows most of a picture at most pixels: the share that is kept times the frame's area."""

    def worth(frame: Frame) -> tuple[float, float]:
        ratio = frame[0] * size[1] / (frame[1] * size[0])
        kept = min(ratio, 1 / ratio)
        return round(kept * frame[0] * frame[1], 6), kept

    return max(frames, key=worth)
