"""The pocket identity encoder: pictures to unit vectors, near for the same thing, far for any other.

It was trained with hard negatives (the same drawing in other colors, swapped colors, the same colors on
another shape), so it sees more than a color histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import pocket
from ..core.errors import UserError
from ..core.files import read_tensors
from .detail_stem import DetailStem

Network = TypeVar("Network", bound=nn.Module)
SIZE = 128  # of the pictures that it sees, in pixels
WIDTH = 128


class Residual(nn.Module):
    """Two 3×3 convolutions with a skip, halving the side."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(self.norms[0](x)))
        y = self.second(F.silu(self.norms[1](y)))
        return y + self.skip(F.avg_pool2d(x, 2))


class IdentityEncoder(nn.Module):
    """Pictures (n, 3, 128, 128) in −1…1 to unit vectors (n, 128)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128, 192)) -> None:
        super().__init__()
        self.stem = DetailStem(nn.Conv2d(3, widths[0], 3, padding=1))
        self.blocks = nn.Sequential(*(Residual(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1] * 16, WIDTH)
        self.norm = nn.GroupNorm(8, widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        features = F.silu(self.norm(self.blocks(self.stem(images))))  # (n, 192, 4, 4)
        return F.normalize(self.head(features.flatten(1)), dim=1)


def load_identity_encoder(path: Path | None = None) -> IdentityEncoder:
    """The shipped encoder, or the one in a file.

    Raises:
        UserError: the file is not one.
    """
    path = path or pocket.path() / "identity" / "model.safetensors"
    return load_frozen(IdentityEncoder(), path, "an identity encoder")


def load_frozen(encoder: Network, path: Path, what: str) -> Network:
    """An encoder with the weights of a file, frozen.

    Raises:
        UserError: they are of another network.
    """
    tensors, _ = read_tensors(path)
    try:
        encoder.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise UserError(f"{path} is not {what} of this program.") from error
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """Unit vectors (n, 128), on the CPU, of pictures of any size (made square, 128×128)."""
    square = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for image in images]
    stack = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in square])).permute(0, 3, 1, 2)
    device = next(encoder.parameters()).device
    return torch.cat([encoder(part.to(device) / 127.5 - 1) for part in stack.split(64)]).cpu()


def identity_score(
    encoder: IdentityEncoder, images: Sequence[Image.Image], references: Sequence[Image.Image]
) -> Tensor:
    """Mean cosine (n,) of every picture with all references."""
    return (embed(encoder, images) @ embed(encoder, references).mT).mean(1)


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive score is above a negative one (ties count half)."""
    higher = (positive[:, None] > negative[None]).cpu().double().mean()
    equal = (positive[:, None] == negative[None]).cpu().double().mean()
    return float(higher + 0.5 * equal)
