"""The area of a region: its box, or the mask in a file."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config.scene import Box, Region
from ..core.errors import UserError
from ..data.image_io import open_on_black


def region_mask(region: Region, width: int, height: int) -> Tensor | Box:
    """A region's box as fractions, or its mask (h, w) in 0…1 of a picture's pixels.

    Raises:
        UserError: a box outside the picture, a mask that is not readable or empty.
    """
    if region.mask is None:
        return region.fractions(width, height)
    image = open_on_black(region.mask).convert("L").resize((width, height), Image.Resampling.NEAREST)
    mask = torch.from_numpy(np.asarray(image, np.float32) / 255)
    if not bool((mask > 0.5).any()):
        raise UserError(f"The mask {region.mask} is empty: paint white where '{region.prompt}' goes.")
    return mask
