"""The area of a region: its box, or the mask in a file."""

from __future__ import annotations

from collections.abc import Sequence

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


def cells_in(area: Box | Tensor, height: int, width: int) -> Tensor:
    """Which cells (height · width) of a grid an area covers, by their middles or by half of a mask."""
    if isinstance(area, Tensor):
        image = Image.fromarray((area * 255).byte().numpy()).resize((width, height), Image.Resampling.BOX)
        return torch.tensor(list(image.getdata())) >= 128
    left, top, right, bottom = area
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    return inside.flatten()


def weight_map(weights: Sequence[float], areas: Sequence[Box | Tensor], height: int, width: int) -> Tensor:
    """(height, width): the mean weight of the regions that cover a cell, 1 where none does."""
    total, count = torch.zeros(height * width), torch.zeros(height * width)
    for weight, area in zip(weights, areas, strict=True):
        inside = cells_in(area, height, width)
        total += weight * inside
        count += inside
    return torch.where(count > 0, total / count.clamp_min(1), torch.ones(())).view(height, width)
