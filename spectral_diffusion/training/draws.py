"""What each training step sees: photos with noise, timesteps and prompts, all keyed by (seed, step, sample)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..config import TrainConfig
from ..data.folder import Concept
from ..data.samples import photo_of
from ..errors import UserError
from ..randomness import keyed_generator


@dataclass
class Samples:
    """Latents and their noise (n, c, h, w), timesteps (n,), prompts."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]


def draw(step: int, latents: Tensor, concept: Concept, config: TrainConfig, timesteps: int) -> Samples:
    """The photos of one step; ``latents`` (photos, crops, c, h, w) holds all crops."""
    batch, noises, times, prompts = [], [], [], []
    for sample in range(config.batch):
        generator = keyed_generator(config.seed, "step", step, sample)
        photo = photo_of(step, sample, len(latents), config)
        crop, template = (int(torch.randint(n, (), generator=generator)) for n in (config.crops, len(config.templates)))
        times.append(draw_timestep(generator, config.timestep_power, timesteps))
        noise = torch.randn(latents.shape[2:], generator=generator)
        noise += config.noise_offset * torch.randn(latents.shape[2], 1, 1, generator=generator)
        batch.append(latents[photo, crop])
        noises.append(noise)
        prompts.append(concept.prompt(concept.photos[photo].caption or config.templates[template]))
    device = latents.device
    return Samples(torch.stack(batch), torch.stack(noises).to(device), torch.stack(times).to(device), prompts)


def draw_timestep(generator: torch.Generator, power: float, timesteps: int) -> Tensor:
    """t = T u^power with u uniform in 0…1."""
    return (torch.rand((), generator=generator) ** power * timesteps).long().clamp_max(timesteps - 1)


def target_of(schedule: DDPMScheduler, samples: Samples) -> Tensor:
    """ε or v, as the base's scheduler says.

    Raises:
        UserError: it says something else.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return samples.noise
    if kind == "v_prediction":
        return schedule.get_velocity(samples.latents, samples.noise, samples.timesteps)
    raise UserError(f"This base predicts '{kind}'; only epsilon and v_prediction can be trained.")
