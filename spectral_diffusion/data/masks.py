"""Masks: which part of a photo is the concept. White is, black is not, grey is so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..core.errors import UserError
from .image_io import on_ground, open_upright

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 24  # how far a pixel of a mask may be from black, white or gray: JPEG leaves noise
LEAST = 1 / 16  # a crop that shows less of its mask than this is not made up for any further


def is_mask(image: Image.Image) -> bool:
    """Whether a picture is black and white, as a mask is and hardly any photo; a few greys of soft edges may be."""
    pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST), dtype=np.int16)
    colorless = np.ptp(pixels, axis=2).max() <= NEAR
    extreme = ((pixels <= NEAR) | (pixels >= 255 - NEAR)).mean()
    return bool(colorless and extreme > 0.9)


def open_mask(photo: Path, mask: Path, size: tuple[int, int]) -> Image.Image:
    """A mask in grey (mode L), of its photo's ``size`` (width, height). A photo that is its own mask gives its alpha.

    Raises:
        UserError: unreadable, of another size, or black all over.
    """
    try:
        image = open_upright(mask)
    except UserError as error:
        if mask == photo:
            raise
        message = str(error).replace(mask.name, str(mask), 1)
        raise UserError(f"The mask {message}; paint it again, or take the file away.") from error
    if image.size != size:
        sides = [f"{width}×{height}" for width, height in (image.size, size)]
        raise UserError(f"The mask {mask} has {sides[0]} pixels, its photo {photo.name} {sides[1]}; save both alike.")
    if mask == photo:
        grey = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", size, "white")
    else:
        grey = on_ground(image, "black").convert("L")
    if grey.getextrema() == (0, 0):
        if mask == photo:
            raise UserError(f"The photo {mask} is transparent all over; its alpha is its mask and must show something.")
        raise UserError(f"The mask {mask} is black all over; paint what is to be learnt white, or take the file away.")
    return grey


def reduce_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (n, 1, H, W) in 0…1 at the latents' size: each entry is the mean of the pixels it covers."""
    import torch.nn.functional as F

    return F.adaptive_avg_pool2d(mask, (height, width))


def loss_weights(masks: Tensor, weight: float) -> Tensor:
    """The loss weights (n, 1, h, w): 1 inside the mask, 1 − ``weight`` outside.

    Divided by their mean, so that a small thing is learnt as fast as one that fills the picture; a mask that is
    white all over gives exactly 1 everywhere.
    """
    weights = 1 - weight * (1 - masks)
    return weights / weights.mean((1, 2, 3), keepdim=True).clamp_min(LEAST)
