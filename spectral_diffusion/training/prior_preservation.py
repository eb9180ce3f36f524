"""Prior preservation: the base's other images stay as they are while a concept is trained.

An adapter trained on photos of a single subject changes every image, whatever the prompt, and fused adapters
overwrite each other. So the base first generates prior images, which are used twice:

* the adapted networks must reproduce the base's predictions on them: DreamBooth's prior preservation (Ruiz et
  al. 2023, sec. 3.3) with the base's output as the target. Part of their prompts carry a random token, as those
  of another concept would, so that an adapter responds to its own token and to no other new one;
* photos are shown side by side with them (the Cut-Mix of SVDiff, Han et al. 2023, sec. 3.3), so that a concept
  stays on its own side of an image.

With ``data.class_images_dir`` the prior images are files of the concept's class instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.train import TrainConfig
from ..core.hooks import QUIET, Event, Hooks
from ..core.rng import keyed_generator
from ..models.denoiser import Denoiser
from ..models.prompt_encoder import PromptEncoder
from .batch import Batch
from .prior_images import PriorImages

CHUNK = 8  # predictions per batch
DRAWS = 8  # noises and timesteps per prior image
PAIRS = ("{} on the left and {} on the right", "on the left {}, on the right {}")
OTHER_TOKENS = tuple(f"<other-{index}>" for index in range(64))  # tokens that stand in for other concepts


@dataclass
class PriorTargets:
    """Targets of the adapted networks: n noised images with the base's predictions. All are on the CPU but a batch."""

    noisy: Tensor
    timesteps: Tensor
    prompts: list[str]
    targets: Tensor

    def batch(self, step: int, config: TrainConfig, device: torch.device) -> PriorTargets:
        """A few of them for one step, on a device."""
        generator = keyed_generator(config.seed, "anchors", step)
        chosen = torch.randint(len(self.prompts), (config.prior.batch_size,), generator=generator)
        prompts = [self.prompts[int(index)] for index in chosen]
        noisy, timesteps, targets = (part[chosen].to(device) for part in (self.noisy, self.timesteps, self.targets))
        return PriorTargets(noisy, timesteps, prompts, targets)


@torch.no_grad()
def predict_prior_targets(
    prior_images: PriorImages,
    denoiser: Denoiser,
    config: TrainConfig,
    encode: PromptEncoder,
    hooks: Hooks = QUIET,
) -> PriorTargets:
    """Noise the prior images and predict with the unchanged base, a chunk at a time: there may be thousands."""
    latents, total = prior_images.latents, len(prior_images.prompts) * DRAWS
    prompts: list[str] = []
    chunks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, total, CHUNK):
        samples = [noised_prompt(prior_images, denoiser, config, i) for i in range(start, min(start + CHUNK, total))]
        pictures, noises, times, texts = zip(*samples, strict=True)
        timesteps = torch.stack(times).to(latents.device)
        noisy = denoiser.add_noise(latents[list(pictures)], torch.stack(noises).to(latents), timesteps)
        targets = denoiser.predict(noisy, timesteps, encode(list(texts), noisy.shape[-2:]))
        chunks.append((noisy.cpu(), timesteps.cpu(), targets.cpu()))
        prompts += texts
        hooks.progress(Event("predict", len(prompts), total))
    noisy, timesteps, targets = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return PriorTargets(noisy, timesteps, prompts, targets)


def noised_prompt(
    images: PriorImages, denoiser: Denoiser, config: TrainConfig, index: int
) -> tuple[int, Tensor, Tensor, str]:
    """The prior image, noise (c, h, w), timestep and prompt of one target, all keyed by its index."""
    generator, picture = keyed_generator(config.seed, "anchor", index), index % len(images.prompts)
    timestep = denoiser.sample_timestep(generator, config.timestep_power, config.objective)
    noise = torch.randn(images.latents.shape[1:], generator=generator)
    prompt = images.prompts[picture]
    if float(torch.rand((), generator=generator)) < config.prior.other_token_prob:
        word = OTHER_TOKENS[int(torch.randint(len(OTHER_TOKENS), (), generator=generator))]
        subject = images.subjects[picture]
        prompt = prompt.replace(subject, f"{word} {subject.split()[-1]}")
    return picture, noise, timestep, prompt


def predict_both(
    denoiser: Denoiser, encode: PromptEncoder, noisy: Tensor, batch: Batch, prior: PriorTargets | None
) -> tuple[Tensor, Tensor | None]:
    """Predictions for a batch's noised photos and for its prior images, in one call where the shapes allow it.

    Returns:
        Predictions (n, c, h, w) and (m, c, h, w) float32.
    """

    def predict(noisy: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        return denoiser.predict(noisy, timesteps, encode(prompts, noisy.shape[-2:]))

    if prior is None:
        return predict(noisy, batch.timesteps, batch.prompts), None
    if prior.noisy.shape[1:] != noisy.shape[1:]:
        photos = predict(noisy, batch.timesteps, batch.prompts)
        return photos, predict(prior.noisy, prior.timesteps, prior.prompts)
    timesteps = torch.cat([batch.timesteps, prior.timesteps])
    both = predict(torch.cat([noisy, prior.noisy]), timesteps, batch.prompts + prior.prompts)
    return both[: len(noisy)], both[len(noisy) :]


def is_cut_mix_step(step: int, config: TrainConfig) -> bool:
    """Whether this step shows photos beside prior images."""
    return float(torch.rand((), generator=keyed_generator(config.seed, "cut", step))) < config.prior.cut_mix_prob


def cut_mix(
    samples: Batch, prior_images: PriorImages, step: int, config: TrainConfig, things: Sequence[int] | None = None
) -> Batch:
    """Half of a step's photos, each beside a prior image; the prompt names both sides.

    Where one is taller, its top is shown. Masks weigh the photo's side alone.

    Args:
        things: which photos may be shown so, default all; those of a style may not, as it would end in mid-picture.
    """
    prompts: list[str] = []
    latents: list[Tensor] = []
    noises: list[Tensor] = []
    weights: list[Tensor] = []
    height = min(samples.latents.shape[2], prior_images.latents.shape[2])
    chosen = list(range(len(samples.prompts)) if things is None else things)[: max(1, len(samples.prompts) // 2)]
    for index in chosen:
        generator = keyed_generator(config.seed, "cut", step, index)
        other = int(torch.randint(len(prior_images.prompts), (), generator=generator))
        noise = torch.randn(prior_images.latents.shape[1:], generator=generator).to(samples.noise)
        whole = torch.ones_like(noise[:1])
        weight = whole if samples.weights is None else samples.weights[index]
        photo = (samples.latents[index], samples.noise[index], weight, samples.tokens[index])
        halves = [photo, (prior_images.latents[other], noise, whole, prior_images.subjects[other])]
        if float(torch.rand((), generator=generator)) < 0.5:
            halves.reverse()
        pictures, sides, counts, subjects = zip(*halves, strict=True)
        for row, parts in ((latents, pictures), (noises, sides), (weights, counts)):
            row.append(torch.cat([part[:, :height] for part in parts], -1))
        pair = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        prompts.append(pair.format(*subjects))
    weighed = None if samples.weights is None else torch.stack(weights)
    return Batch(torch.stack(latents), torch.stack(noises), samples.timesteps[chosen], prompts, weighed)
