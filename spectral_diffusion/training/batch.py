"""The batch of each training step: photos with noise, timesteps and prompts, all keyed by (seed, step, sample)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.train import STYLE_TEMPLATES, TrainConfig
from ..core.machine import to_device
from ..core.rng import keyed_generator
from ..data.captions import vary
from ..data.folder import Concept
from ..data.masks import loss_weights
from ..data.samples import PhotoCrops
from ..models.denoiser import Denoiser


@dataclass
class Batch:
    """Latents and their noise (n, c, h, w), timesteps (n,), prompts.

    ``weights`` says what each place counts (n, 1, h, w), None if all count 1; ``masks`` where the concept is
    (n, 1, h, w), None if not needed. ``tokens`` are the photos' concepts'; ``erased`` says which samples have another
    subject's prompt, None if none can.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]
    weights: Tensor | None = None
    masks: Tensor | None = None
    tokens: list[str] = field(default_factory=list)
    erased: list[bool] | None = None


def caption_templates(config: TrainConfig, concept: Concept) -> list[str]:
    """Captions of photos without one."""
    is_default = config.templates == TrainConfig.model_fields["templates"].default
    return STYLE_TEMPLATES if concept.is_style and is_default else config.templates


def sample_batch(step: int, crops: PhotoCrops, concept: Concept, config: TrainConfig, denoiser: Denoiser) -> Batch:
    """The photos of one step, all of one shape."""
    chosen, times, prompts, tokens = [], [], [], []
    templates = caption_templates(config, concept)
    generators = [keyed_generator(config.seed, "step", step, sample) for sample in range(config.batch_size)]
    for sample, (photo, generator) in enumerate(zip(crops.order.photos(step), generators, strict=True)):
        crop, template = (
            int(torch.randint(n, (), generator=generator)) for n in (config.crops_per_image, len(templates))
        )
        times.append(denoiser.sample_timestep(generator, config.timestep_power, config.objective))
        chosen.append((photo, crop))
        token = concept.token_of(concept.photos[photo])
        caption = concept.prompt(concept.photos[photo].caption or templates[template], token)
        prompts.append(vary(caption, token, config.data, config.seed, "caption", step, sample))
        tokens.append(token)
    latents, masks = crops.take(chosen)
    noises = []
    for generator in generators:
        noise = torch.randn(latents.shape[1:], generator=generator)
        noises.append(noise + config.noise_offset * torch.randn(latents.shape[1], 1, 1, generator=generator))
    weights = loss_weights(masks, config.data.mask_weight) if masks is not None and config.data.mask_weight else None
    noise, when = to_device(torch.stack(noises), latents.device), to_device(torch.stack(times), latents.device)
    return Batch(latents, noise.to(latents.dtype), when, prompts, weights, masks, tokens)
