"""Heads that read from a network's features which class and which colour is where.

They are trained beside the network, so that its features say it early, and dropped at the end.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .sprites import NOUNS, TINTS

ANSWERS = len(NOUNS) + 1, len(TINTS) + 1  # classes and colours; the last of each is "nothing"


def map_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of both maps.

    Args:
        scores: (n, classes + colours, h, w).
        labels: (n, 2, h, w).
    """
    parts = scores.float().split(ANSWERS, 1)
    return sum((F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)), scores.new_zeros(()))


class MapHead(nn.Module):
    """For a U-Net: it sees what the first two up blocks give, at 8×8 and at 16×16."""

    def __init__(self, unet: UNet2DConditionModel, width: int = 64) -> None:
        super().__init__()
        low, high = unet.config.block_out_channels[-1], unet.config.block_out_channels[-2]
        self.low, self.high = nn.Conv2d(low, width, 1), nn.Conv2d(high, width, 1)
        self.last = nn.Conv2d(width, sum(ANSWERS), 1)
        self._seen: list[Tensor] = []
        for block in unet.up_blocks[:2]:
            block.register_forward_hook(lambda module, inputs, output: self._seen.append(output))

    def loss(self, labels: Tensor) -> Tensor:
        """The cross entropy of both maps for the U-Net's last forward pass."""
        low, high = self._seen
        self._seen.clear()
        low = F.interpolate(self.low(low), size=high.shape[-2:], mode="nearest")
        return map_loss(self.last(F.silu(low + self.high(high))), labels)


class TokenMapHead(nn.Module):
    """For FLUX.2: it sees the picture's tokens after a third of the blocks with one stream.

    A token answers for the 2×2 latents that it covers. Features that an early block is made to give train a diffusion
    transformer in fewer samples (REPA, Yu et al. 2025, arXiv:2410.06940); here the drawn scene itself says what is
    where.
    """

    def __init__(self, transformer: Any, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(transformer.inner_dim, width), nn.SiLU(), nn.Linear(width, 4 * sum(ANSWERS))
        )
        self._seen: list[Tensor] = []
        blocks = transformer.single_transformer_blocks
        blocks[len(blocks) // 3].register_forward_hook(lambda module, inputs, output: self._seen.append(output))

    def loss(self, labels: Tensor) -> Tensor:
        """The cross entropy of both maps for the transformer's last forward pass."""
        height, width = labels.shape[-2:]
        tokens = self._seen.pop()[:, -(height * width) // 4 :]  # the prompt's come first
        scores = self.layers(tokens).mT.unflatten(2, (height // 2, width // 2))
        return map_loss(F.pixel_shuffle(scores, 2), labels)
