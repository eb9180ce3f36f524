"""Photos to latents: crops, encoded once and kept, or anew at every step.

Every random choice comes from a generator keyed by (seed, step, sample), so that a resumed run, or one
spread over several processes, draws exactly what an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from PIL import Image

from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..core.hooks import QUIET, Event, Hooks
from ..core.machine import to_device
from ..core.rng import keyed_generator as keyed_generator
from ..models.base import Base
from ..models.vae import encode
from .crops import Crop, best_frame, bucket_frames, crops_of, cut_mask, cut_photo
from .crops import random_crop as random_crop
from .folder import Concept, Photo
from .image_io import open_photo
from .latents_cache import Encoded, cached_latents, encoder_hash, key_of
from .masks import open_mask, reduce_mask
from .order import Order
from .order import photo_of as photo_of


class PhotoCrops:
    """All crops of a concept's photos as latents, encoded before training or when a step needs them.

    Args:
        size: side of square crops in pixels; with buckets, crops have about as many pixels.

    Raises:
        UserError: a photo or mask that cannot be used, masks asked for where there are none, no bucket that fits.
    """

    def __init__(self, concept: Concept, base: Base, config: TrainConfig, size: int, hooks: Hooks = QUIET) -> None:
        self.photos, self.vae, self.denoiser = concept.photos, base.pipeline.vae, base.denoiser
        self.masked = config.data.mask_weight > 0 or config.objective.attention_loss_weight > 0
        if self.masked and not any(photo.mask for photo in self.photos):
            asking = "data.mask_weight" if config.data.mask_weight else "objective.attention_loss_weight"
            raise UserError(
                f"{asking} needs masks, and none of the photos of '{concept.name}' has one; put them into "
                "masks/ as <photo's name>.png, white where the concept is."
            )
        frames = bucket_frames(size, base.denoiser.side_multiple) if config.data.aspect_buckets else [(size, size)]
        shapes = [best_frame(photo.size, frames) for photo in self.photos]
        self.crops = [
            crops_of(photo.size, shape, photo.caption or "", config, index)
            for index, (photo, shape) in enumerate(zip(self.photos, shapes, strict=True))
        ]
        self.order = Order.of(shapes, [photo.repeats for photo in self.photos], config)
        self.ready = list(self._prepare(config, hooks)) if config.data.cache_latents else None
        if self.masked and self.ready is None:  # say now what is wrong with them, not at some step
            for photo in self.photos:
                mask_of(photo)

    def _prepare(self, config: TrainConfig, hooks: Hooks) -> Iterator[Encoded]:
        encoder = encoder_hash(self.vae)
        for index, photo in enumerate(self.photos):
            key = key_of(photo, self.masked, self.crops[index], encoder)
            pairs = [(photo, crop) for crop in self.crops[index]]
            yield cached_latents(config.data.latents_cache_dir, key, partial(self._encode, pairs))
            hooks.progress(Event("encode", index + 1, len(self.photos)))

    def take(self, chosen: Sequence[tuple[int, int]]) -> Encoded:
        """The crops (photo, number), all of one shape, on the VAE's device.

        Returns:
            Latents (n, channels, h, w) float32; masks (n, 1, h, w) in 0…1 if the settings weigh the loss by them, else
            None. A photo without a mask counts as a whole.
        """
        if self.ready is None:
            latents, masks = self._encode([(self.photos[photo], self.crops[photo][crop]) for photo, crop in chosen])
        else:
            latents = torch.stack([self.ready[photo][0][crop] for photo, crop in chosen])
            covers = [(self.ready[photo][1], crop) for photo, crop in chosen]
            masks = torch.stack([cover[crop] for cover, crop in covers if cover is not None]) if self.masked else None
        device = self.vae.device
        latents = self.denoiser.normalize(to_device(latents, device))
        return latents, None if masks is None else to_device(masks, device)

    def _encode(self, pairs: Sequence[tuple[Photo, Crop]]) -> Encoded:
        """The latents of these crops, not yet scaled, and their masks at the latents' size.

        Raises:
            UserError: the autoencoder made NaN or infinity of one.
        """
        opened, covers = cache(lambda photo: open_photo(photo.path)), cache(mask_of)
        latents = encode(self.vae, torch.stack([cut_photo(opened(photo), crop) for photo, crop in pairs]))
        for (photo, _), latent in zip(pairs, latents, strict=True):
            if not torch.isfinite(latent).all():
                text = f"The base's autoencoder made NaN or infinity of {photo.path}"
                if self.vae.dtype == torch.float16:
                    raise UserError(f"{text}.", Fix("dtype", "float32"))
                raise UserError(f"{text}; get the base again.")
        if not self.masked:
            return latents, None
        masks = torch.stack([cut_mask(covers(photo), crop) for photo, crop in pairs])
        height, width = (side // self.denoiser.vae_scale for side in masks.shape[2:])
        return latents, reduce_mask(masks, height, width)


def mask_of(photo: Photo) -> Image.Image:
    """A photo's mask in grey, white all over where it has none.

    Raises:
        UserError: see :func:`.masks.open_mask`.
    """
    if photo.mask is None:
        return Image.new("L", photo.size, "white")
    return open_mask(photo.path, photo.mask, photo.size)
