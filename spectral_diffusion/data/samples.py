"""Photos to latents: crops, encoded once, and which of them each training step sees.

Every random choice comes from a generator keyed by (seed, step, sample), so that a resumed run, or one
spread over several processes, draws exactly what an unbroken one would.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..config import TrainConfig
from ..randomness import keyed_generator
from .folder import Concept, open_photo


def random_crop(image: Image.Image, size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Resize the short edge to size × (1 … scale), crop size × size at random; (3, size, size) in −1…1."""
    grow, right, down = torch.rand(3, generator=generator).tolist()
    short = round(size * (1 + (scale - 1) * grow))
    factor = short / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round(right * (width - size)), round(down * (height - size))
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def encode_crops(concept: Concept, vae: AutoencoderKL, config: TrainConfig, size: int) -> Tensor:
    """All crops of all photos as latents, (photos, crops, channels, h, w) float32 on the VAE's device."""
    weight = next(vae.parameters())
    rows = []
    for index, photo in enumerate(concept.photos):
        image = open_photo(photo.path)
        crops = torch.stack(
            [
                random_crop(image, size, config.crop_scale, keyed_generator(config.seed, "crop", index, crop))
                for crop in range(config.crops)
            ]
        )
        latents = [vae.encode(part.to(weight)).latent_dist.mean.float() for part in crops.split(8)]
        rows.append(torch.cat(latents))
    return torch.stack(rows) * vae.config.scaling_factor


def photo_of(step: int, sample: int, photos: int, config: TrainConfig) -> int:
    """Which photo a sample shows: every photo once per epoch, in a shuffled order."""
    position = step * config.batch + sample
    epoch, place = divmod(position, photos)
    order = torch.randperm(photos, generator=keyed_generator(config.seed, "epoch", epoch))
    return int(order[place])
