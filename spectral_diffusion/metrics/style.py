"""The pocket style encoder: pictures to unit vectors, near for the same style, whatever they show."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import pocket
from .identity import WIDTH, Residual, load_frozen


class StyleEncoder(nn.Module):
    """Pictures (n, 3, 128, 128) in −1…1 to unit vectors (n, 128).

    Only means and deviations over the whole picture get through, of every level: a style is everywhere, and where
    things are does not count.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 32, 48, 64, 96)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList([Residual(a, b) for a, b in pairwise(widths)])
        self.head = nn.Sequential(nn.Linear(2 * (3 + sum(widths)), 256), nn.SiLU(), nn.Linear(256, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        levels = [images, x]
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        spread = [torch.cat([level.mean((2, 3)), level.flatten(2).std(2)], 1) for level in levels]
        return F.normalize(self.head(torch.cat(spread, 1)), dim=1)


def load_style_encoder(path: Path | None = None) -> StyleEncoder:
    """The shipped encoder, or the one in a file.

    Raises:
        UserError: the file is not one.
    """
    path = path or pocket.path() / "style" / "model.safetensors"
    return load_frozen(StyleEncoder(), path, "a style encoder")
