"""The autoencoder at work: pictures to latents and back, in a precision and in portions that it stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

MOST = 8  # pictures encoded together
PIXELS = 2**19  # of them; encoding takes more memory than a training step of the same pictures


def at_once(height: int, width: int) -> int:
    """How many pictures of this size are encoded together: eight small ones, two of 512², one of 1024²."""
    return max(1, min(MOST, PIXELS // (height * width)))


def overflows(vae: AutoencoderKL) -> bool:
    """Whether the autoencoder is in float16, and its config says that it overflows there (``force_upcast``)."""
    return vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))


@contextmanager
def upcast(vae: AutoencoderKL) -> Iterator[None]:
    """An autoencoder that overflows is in float32 for a while."""
    needed = overflows(vae)
    if needed:
        nn.Module.to(vae, torch.float32)  # diffusers' own warns of layers to be kept, of which there are none
    try:
        yield
    finally:
        if needed:
            nn.Module.to(vae, torch.float16)


@contextmanager
def in_portions(vae: AutoencoderKL, height: int, width: int) -> Iterator[None]:
    """Let a pipeline decode large pictures one by one: together they take more memory than everything before."""
    before, vae.use_slicing = vae.use_slicing, vae.use_slicing or at_once(height, width) < MOST
    try:
        yield
    finally:
        vae.use_slicing = before


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in −1…1 as latents (n, channels, h, w): the means, float32, not yet scaled."""
    with upcast(vae):
        weight = next(vae.parameters())
        parts = pixels.split(at_once(*pixels.shape[-2:]))
        return torch.cat([vae.encode(part.to(weight)).latent_dist.mean.float() for part in parts])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The autoencoder's latents (n, channels, h, w) as pictures (n, 3, H, W) in −1…1, float32."""
    with upcast(vae):
        side = 2 ** (len(vae.config.block_out_channels) - 1)
        parts = latents.to(next(vae.parameters())).split(at_once(side * latents.shape[-2], side * latents.shape[-1]))
        return torch.cat([vae.decode(part).sample.float() for part in parts])
