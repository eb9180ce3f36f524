"""A first convolution for pictures of twice the side that a network was made for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DetailStem(nn.Module):
    """A network's first convolution on the picture at half its side, plus what full resolution adds.

    The addition begins at zero, so the network begins as the one for half the side.
    """

    def __init__(self, coarse: nn.Conv2d, hidden: int = 16) -> None:
        super().__init__()
        stride = 2 * coarse.stride[0]
        side = max(4, stride)  # of the kernel
        self.coarse = coarse
        last = nn.Conv2d(hidden, coarse.out_channels, side, stride, (side - stride) // 2, bias=False)
        nn.init.zeros_(last.weight)
        self.fine = nn.Sequential(nn.Conv2d(3, hidden, 3, padding=1), nn.SiLU(), last)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.coarse(F.avg_pool2d(images, 2)) + self.fine(images)
        return out
