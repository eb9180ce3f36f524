"""Keep everything else as the base draws it while one concept is learnt.

An adapter trained on photos of one thing alone changes every picture, whatever the prompt says, and fused
adapters then draw over each other. So the base first draws ordinary pictures, and two things are done with them:

* the adapted networks are held to the base's own predictions on them: DreamBooth's prior preservation (Ruiz et
  al. 2023, sec. 3.3) with the base's output as the target. Part of their prompts carry a random word, as
  somebody else's concept would, so that an adapter answers to its own word and to no other new one;
* photos are shown side by side with them (the Cut-Mix of SVDiff, Han et al. 2023, sec. 3.3), so that a concept
  keeps to its own side of a picture.

With ``data.class_images_dir`` the ordinary pictures are files of the concept's class instead.
"""

from __future__ import annotations

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

CHUNK = 8  # predictions asked for together
DRAWS = 8  # noise and timestep draws per ordinary picture
PAIRS = ("{} on the left and {} on the right", "on the left {}, on the right {}")
OTHER_TOKENS = tuple(f"<other-{index}>" for index in range(64))  # random words that stand for other people's concepts


@dataclass
class PriorTargets:
    """Where the adapted networks must predict what the base predicts: n noised pictures with their targets."""

    noisy: Tensor
    timesteps: Tensor
    prompts: list[str]
    targets: Tensor

    def batch(self, step: int, config: TrainConfig) -> PriorTargets:
        """A few of them for one step."""
        generator = keyed_generator(config.seed, "anchors", step)
        chosen = torch.randint(len(self.prompts), (config.prior.batch_size,), generator=generator)
        prompts = [self.prompts[int(index)] for index in chosen]
        return PriorTargets(self.noisy[chosen], self.timesteps[chosen], prompts, self.targets[chosen])


@torch.no_grad()
def predict_prior_targets(
    ordinary: PriorImages,
    denoiser: Denoiser,
    config: TrainConfig,
    encode: PromptEncoder,
    hooks: Hooks = QUIET,
) -> PriorTargets:
    """Noise the ordinary pictures and ask the untouched base what it predicts."""
    noises, times, prompts = [], [], []
    for index in range(len(ordinary.prompts) * DRAWS):
        generator = keyed_generator(config.seed, "anchor", index)
        picture = index % len(ordinary.prompts)
        times.append(denoiser.sample_timestep(generator, config.timestep_power))
        noises.append(torch.randn(ordinary.latents.shape[1:], generator=generator))
        prompt = ordinary.prompts[picture]
        if float(torch.rand((), generator=generator)) < config.prior.other_token_prob:
            word = OTHER_TOKENS[int(torch.randint(len(OTHER_TOKENS), (), generator=generator))]
            thing = ordinary.things[picture]
            prompt = prompt.replace(thing, f"{word} {thing.split()[-1]}")
        prompts.append(prompt)
    latents = ordinary.latents.repeat(DRAWS, 1, 1, 1)
    timesteps = torch.stack(times).to(latents.device)
    noisy = denoiser.add_noise(latents, torch.stack(noises).to(latents), timesteps)
    targets = []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        targets.append(denoiser.predict(noisy[part], timesteps[part], encode(prompts[part], noisy.shape[-2:])))
        hooks.progress(Event("predict", min(start + CHUNK, len(prompts)), len(prompts)))
    return PriorTargets(noisy, timesteps, prompts, torch.cat(targets))


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
    """Whether this step shows photos beside ordinary pictures."""
    return float(torch.rand((), generator=keyed_generator(config.seed, "cut", step))) < config.prior.cut_mix_prob


def cut_mix(samples: Batch, ordinary: PriorImages, token: str, step: int, config: TrainConfig) -> Batch:
    """Half of a step's photos, each beside an ordinary picture; the prompt names both sides.

    Where one is taller, its top is shown. Masks weigh the photo's side alone.
    """
    prompts: list[str] = []
    latents: list[Tensor] = []
    noises: list[Tensor] = []
    weights: list[Tensor] = []
    height = min(samples.latents.shape[2], ordinary.latents.shape[2])
    count = max(1, len(samples.prompts) // 2)
    for index in range(count):
        generator = keyed_generator(config.seed, "cut", step, index)
        other = int(torch.randint(len(ordinary.prompts), (), generator=generator))
        noise = torch.randn(ordinary.latents.shape[1:], generator=generator).to(samples.noise)
        whole = torch.ones_like(noise[:1])
        weight = whole if samples.weights is None else samples.weights[index]
        photo = (samples.latents[index], samples.noise[index], weight, token)
        halves = [photo, (ordinary.latents[other], noise, whole, ordinary.things[other])]
        if float(torch.rand((), generator=generator)) < 0.5:
            halves.reverse()
        pictures, sides, counts, things = zip(*halves, strict=True)
        for row, parts in ((latents, pictures), (noises, sides), (weights, counts)):
            row.append(torch.cat([part[:, :height] for part in parts], -1))
        pair = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        prompts.append(pair.format(*things))
    weighed = None if samples.weights is None else torch.stack(weights)
    return Batch(torch.stack(latents), torch.stack(noises), samples.timesteps[:count], prompts, weighed)
