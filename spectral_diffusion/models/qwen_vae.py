"""What families with an autoencoder of Qwen-Image have in common: statistics per channel, and packed latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import to_device
from .flow import FlowDenoiser
from .vae import latent_channels

SIDE = 1024  # of pictures in pixels, as the pipelines have it


class QwenVaeDenoiser(FlowDenoiser):
    """Latents (n, c, h, w) are the autoencoder's with mean 0 and deviation 1; pipelines give tokens (n, h·w/p², c·p²).

    A token is a patch of p × p cells. The autoencoder is one of videos, and a picture is a frame of it.
    """

    @classmethod
    def size_of(cls, network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        return int(vae.get("sample_size") or SIDE)

    @property
    def latent_channels(self) -> int:
        return latent_channels(self.vae)

    @property
    def patch(self) -> int:
        """The side of a token's patch in cells."""
        return math.isqrt(int(self.network.config.in_channels) // self.latent_channels)

    @property
    def side_multiple(self) -> int:
        return self.patch * self.vae_scale

    # ------------------------------------------------------------------ latents

    def normalize(self, raw: Tensor) -> Tensor:
        mean, deviation = self._statistics(raw)
        return (raw - mean) / deviation

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, c, 1, 1) of the autoencoder's latents."""
        config: Any = self.vae.config
        mean, deviation = (
            to_device(torch.tensor(values, dtype=like.dtype), like.device)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) as tokens (n, h·w/p², c·p²), row by row."""
        return F.pixel_unshuffle(latents, self.patch).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens as latents (n, c, rows, columns)."""
        cells = tokens.transpose(1, 2).unflatten(2, (rows // self.patch, columns // self.patch))
        return F.pixel_shuffle(cells, self.patch)

    def step_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.unpack(latents, height // self.vae_scale, width // self.vae_scale)

    def from_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.step_latents(latents, height, width)

    def raw_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.denormalize(self.step_latents(latents, height, width))
