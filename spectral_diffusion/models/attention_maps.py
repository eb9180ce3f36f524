"""Keep a token's attention where the thing is: cross-attention maps are trained towards the photos' masks.

As Break-A-Scene (Avrahami et al. 2023) and Mix-of-Show (Gu et al. 2023) do it: what a layer attends to for the
concept's token, divided by its maximum, shall be 1 inside the mask and 0 outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 32 * 32  # places of a map at most: finer ones cost much and say little of where a thing is
TINY = 1e-6  # a map without a maximum is left as it is


class CapturingProcessor:
    """An attention processor that also says what its layer attends to; its output is the inner one's."""

    def __init__(self, inner: Any, maps: AttentionMaps) -> None:
        self.inner, self.maps = inner, maps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        if (
            encoder_hidden_states is not None
            and hidden_states.dim() == 3
            and hidden_states.shape[1] <= self.maps.largest
        ):
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            scores = attn.get_attention_scores(query, key, None)  # (n · heads, places, words)
            seen = scores.unflatten(0, (len(hidden_states), -1)).float().mean(1)
            self.maps.found.setdefault(id(self), seen)
        out: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **more)
        return out


class AttentionMaps:
    """The cross-attention maps (n, places, words) of the first forward since :meth:`begin`, by layer.

    Attributes:
        largest: the most places of a layer that is captured.
    """

    found: dict[int, Tensor]

    def __init__(self, largest: int = LARGEST) -> None:
        self.found, self.largest = {}, largest

    def begin(self) -> None:
        """Forget what was seen, such as what gradient checkpointing has computed again."""
        self.found.clear()


@contextmanager
def capture_attention_maps(unet: nn.Module, wanted: bool, largest: int = LARGEST) -> Iterator[AttentionMaps | None]:
    """Capture a U-Net's cross-attention, or leave it as it is and yield None."""
    if not wanted:
        yield None
        return
    before = dict(unet.attn_processors)  # type: ignore[arg-type]
    maps = AttentionMaps(largest)
    capturing = {name: CapturingProcessor(one, maps) if ".attn2." in name else one for name, one in before.items()}
    unet.set_attn_processor(capturing)  # type: ignore[operator]
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)  # type: ignore[operator]


def attention_loss(maps: AttentionMaps, own: Tensor, masks: Tensor) -> Tensor:
    """Mean squared distance of the token's maps from the masks, over layers and samples.

    A sample whose mask is empty, or that has no word of the token, counts nothing; neither gives NaN.

    Args:
        maps: their first n samples are the photos.
        own: (n, words), which words are the token's.
        masks: (n, 1, h, w) in 0…1 at the latents' size.
    """
    count = len(masks)
    counts = own.any(1) & (masks.flatten(1).amax(1) > 0)
    losses = []
    for one in maps.found.values():
        attended = (one[:count] * own[:, None].to(one)).sum(2)  # (n, places)
        attended = attended / attended.detach().amax(1, keepdim=True).clamp_min(TINY)
        wanted = F.adaptive_avg_pool2d(masks, shape_of(one.shape[1], *masks.shape[2:])).flatten(1)
        losses.append((((attended - wanted) ** 2).mean(1) * counts).mean())
    return torch.stack(losses).mean() if losses else masks.new_zeros(())


def shape_of(places: int, height: int, width: int) -> tuple[int, int]:
    """The (h, w) of a map with this many places, on latents that were halved, rounded up, some times."""
    while height * width > places and (height > 1 or width > 1):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
