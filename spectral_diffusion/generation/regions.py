"""Regions: a prompt of its own for every box of the picture (regionally controllable sampling of Mix-of-Show,
Gu et al. 2023, sec. 4.2).

Only cross-attention changes: inside a box queries read the region's prompt, outside all boxes the global one; where
boxes overlap the results are averaged. Every query attends by itself, so only a box's own queries are computed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Region:
    """A box (left, top, right, bottom) in fractions of the picture, and its prompts."""

    box: tuple[float, float, float, float]
    prompt: str
    negative_prompt: str = ""

    def mask(self, height: int, width: int) -> Tensor:
        """(height · width,) bool: the cells whose middle is in the box."""
        left, top, right, bottom = self.box
        x = (torch.arange(width) + 0.5) / width
        y = (torch.arange(height) + 0.5) / height
        inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
        return inside.flatten()


def grid_of(cells: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of a feature map with that many cells, from the latents' size.

    Raises:
        ValueError: no halving of the latents has as many.
    """
    while height * width > cells and max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != cells:
        raise ValueError(f"{cells} cells are no halving of the latents")
    return height, width


class RegionalCrossAttention:
    """A diffusers attention processor that lets another one read each region's own prompt.

    Args:
        inner: the processor that does the attention.
        regions: boxes; ``positive`` and ``negative`` (regions, length, width) are their encoded prompts.
        size: height and width of the latents.
        pictures: how many pictures are denoised together; a batch twice as long holds the unconditional half first.
        share: of the global prompt inside the boxes, 0…1.
    """

    def __init__(
        self,
        inner: Any,
        regions: Sequence[Region],
        positive: Tensor,
        negative: Tensor,
        size: tuple[int, int],
        pictures: int,
        share: float = 0.0,
    ) -> None:
        self.inner, self.regions = inner, regions
        self.positive, self.negative = positive, negative
        self.size, self.pictures, self.share = size, pictures, share
        self.cells: dict[int, list[Tensor]] = {}

    def cells_of(self, count: int, device: torch.device) -> list[Tensor]:
        """Per region the indices of its queries among ``count``."""
        if count not in self.cells:
            height, width = grid_of(count, *self.size)
            self.cells[count] = [region.mask(height, width).nonzero()[:, 0].to(device) for region in self.regions]
        return self.cells[count]

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        guided = len(hidden_states) == 2 * self.pictures
        total = torch.zeros_like(out)
        counts = out.new_zeros(out.shape[1])
        for index, cells in enumerate(self.cells_of(hidden_states.shape[1], hidden_states.device)):
            if not len(cells):
                continue  # a box narrower than this level's cells
            text = self.positive[index].expand(self.pictures, -1, -1)
            if guided:
                text = torch.cat([self.negative[index].expand(self.pictures, -1, -1), text])
            mine = self.inner(attn, hidden_states[:, cells], text.to(hidden_states.dtype), None, temb)
            total[:, cells] += mine
            counts[cells] += 1
        inside = (counts > 0)[None, :, None]
        mean = total / counts.clamp_min(1)[None, :, None]
        return torch.where(inside, mean + self.share * (out - mean) if self.share else mean, out)


@contextmanager
def regional(
    unet: Any,
    regions: Sequence[Region],
    encode: Encode,
    size: tuple[int, int],
    pictures: int,
    share: float = 0.0,
) -> Iterator[None]:
    """Let every cross-attention of a U-Net read the regions' prompts while the context is open.

    ``encode`` turns prompts into text features (n, length, width). Without regions nothing is touched.

    Raises:
        UserError: a box covers no cell of the latents.
    """
    if not regions:
        yield
        return
    for region in regions:
        if not region.mask(*size).any():
            raise UserError(f"The box {region.box} of '{region.prompt}' is too small for this picture; enlarge it.")
    positive = encode([region.prompt for region in regions])[:, None]
    negative = encode([region.negative_prompt for region in regions])[:, None]
    before = unet.attn_processors
    unet.set_attn_processor(
        {
            name: RegionalCrossAttention(processor, regions, positive, negative, size, pictures, share)
            if ".attn2." in name
            else processor
            for name, processor in before.items()
        }
    )
    try:
        yield
    finally:
        unet.set_attn_processor(before)
