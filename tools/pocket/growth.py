"""A wider U-Net that begins from a narrow one.

Every channel keeps its weights; what new channels feed into old ones begins at zero. Group and layer norms see other
neighbours, so the wide network does not begin as exactly the same function, and some training heals it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .models import Sizes, Trainee

JOINED = re.compile(r"unet\.up_blocks\.(\d)\.resnets\.(\d)\.(norm1|conv1\.weight|conv_shortcut\.weight)")


def hidden(sizes: Sizes, block: int, layer: int) -> int:
    """Channels that come from below in an up block's layer, in front of those from the skip."""
    turned = sizes.widths[::-1]
    return turned[max(0, block - 1)] if layer == 0 else turned[block]


def places(name: str, dim: int, count: tuple[int, int], sizes: tuple[Sizes, Sizes]) -> Tensor:
    """Where a narrow tensor's indices of one dimension go in the wide one.

    Args:
        count: the dimension's sizes, narrow and wide.
        sizes: of the networks, narrow and wide.
    """
    old, new = count
    joined = JOINED.match(name)
    if joined and dim == (0 if joined[3] == "norm1" else 1):
        first, moved = (hidden(one, int(joined[1]), int(joined[2])) for one in sizes)
        return torch.cat([torch.arange(first), torch.arange(old - first) + moved])
    if ".ff.net.0.proj." in name and dim == 0:  # values and gates
        return torch.cat([torch.arange(old // 2), torch.arange(old // 2) + new // 2])
    if name == "unet.time_embedding.linear_1.weight" and dim == 1:  # the nearest frequencies, cosines and sines
        nearest = (torch.arange(old // 2) * new / old).long()
        return torch.cat([nearest, nearest + new // 2])
    return torch.arange(old)


@torch.no_grad()
def widened(narrow: Trainee, sizes: Sizes) -> Trainee:
    """The networks in other sizes with the narrow ones' weights in their place."""
    wide = Trainee(sizes, narrow.downscale)
    weights = wide.state_dict()
    for name, value in narrow.state_dict().items():
        target = weights[name]
        if value.shape == target.shape:
            target.copy_(value)
            continue
        at = [
            places(name, dim, count, (narrow.sizes, sizes))
            for dim, count in enumerate(zip(value.shape, target.shape, strict=True))
        ]
        if value.ndim > 1:
            target[at[0]] = 0
            target[at[0][:, None], at[1]] = value
        else:
            target[at[0]] = value
    wide.load_state_dict(weights)
    return wide
