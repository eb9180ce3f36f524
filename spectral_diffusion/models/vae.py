"""The autoencoder at work: pictures to latents and back, in a precision and in portions that it stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

COLORS = 3
MOST = 8  # pictures encoded together
PIXELS = 2**19  # of them; encoding takes more memory than a training step of the same pictures


def at_once(height: int, width: int) -> int:
    """How many pictures of this size are encoded together: eight small ones, two of 512², one of 1024²."""
    return max(1, min(MOST, PIXELS // (height * width)))


def pixels_per_cell(vae: Any) -> int:
    """Pixels per cell of the autoencoder's latents, along one side."""
    levels = vae.config.get("block_out_channels") or vae.config["dim_mult"]
    return int(2 ** (len(levels) - 1))


def latent_channels(vae: Any) -> int:
    """Channels of the autoencoder's latents."""
    return int(vae.config.get("latent_channels") or vae.config["z_dim"])


def has_frames(vae: Any) -> bool:
    """Whether the autoencoder is one of videos; a picture is one frame."""
    return "temperal_downsample" in vae.config


def encoder_input(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in −1…1 as the autoencoder reads them: with an opaque alpha channel, and a frame axis."""
    if vae.config.get("in_channels") == COLORS + 1:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    return pixels[:, :, None] if has_frames(vae) else pixels


def decode_batch(vae: Any, latents: Tensor) -> Tensor:
    """The autoencoder's latents (n, channels, h, w) as pictures (n, 3, H, W) in −1…1, all at once.

    What is transparent lies on white.
    """
    frames = has_frames(vae)
    latents = latents.to(vae.dtype)
    decoded: Tensor = vae.decode(latents[:, :, None] if frames else latents, return_dict=False)[0]
    pixels = decoded[:, :, 0] if frames else decoded
    if pixels.shape[1] == COLORS:
        return pixels
    alpha = (pixels[:, COLORS:] + 1) / 2
    return 1 + alpha * (pixels[:, :COLORS] - 1)


def on_white(image: Image.Image) -> Image.Image:
    """A picture without transparency."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def overflows(vae: AutoencoderKL) -> bool:
    """Whether the autoencoder is in float16, and its config says that it overflows there (``force_upcast``)."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


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
        means = [vae.encode(encoder_input(vae, part.to(weight))).latent_dist.mean.float() for part in parts]
        return torch.cat([mean[:, :, 0] if mean.dim() == 5 else mean for mean in means])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The autoencoder's latents (n, channels, h, w) as pictures (n, 3, H, W) in −1…1, float32."""
    with upcast(vae):
        side = pixels_per_cell(vae)
        parts = latents.to(next(vae.parameters())).split(at_once(side * latents.shape[-2], side * latents.shape[-1]))
        return torch.cat([decode_batch(vae, part).float() for part in parts])
