"""Keep everything else as the base draws it while one concept is learnt.

An adapter trained on photos of one thing alone changes every picture, whatever the prompt says, and fused
adapters then draw over each other. So the base first draws ordinary pictures, and two things are done with them:

* the adapted networks are held to the base's own predictions on them: DreamBooth's prior preservation (Ruiz et
  al. 2023, sec. 3.3) with the base's output as the target. Part of their prompts carry a random word, as
  somebody else's concept would, so that an adapter answers to its own word and to no other new one;
* photos are shown side by side with them (the Cut-Mix of SVDiff, Han et al. 2023, sec. 3.3), so that a concept
  keeps to its own side of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..base import Base
from ..config import PreservationConfig, TrainConfig
from ..progress import Event, Progress
from ..randomness import keyed_generator
from .draws import Samples, draw_timestep

CHUNK = 8  # pictures drawn together
DRAWS = 8  # noise and timestep draws per ordinary picture
PAIRS = ("{} on the left and {} on the right", "on the left {}, on the right {}")
OTHERS = tuple(f"<other-{index}>" for index in range(64))  # random words that stand for other people's concepts

Condition = Callable[[list[str]], dict[str, Any]]


@dataclass
class Ordinary:
    """Pictures the base drew: latents (n, c, h, w), what each shows, and its prompt."""

    latents: Tensor
    things: list[str]
    prompts: list[str]


@dataclass
class Anchors:
    """Where the adapted networks must predict what the base predicts: n noised pictures with their targets."""

    noisy: Tensor
    timesteps: Tensor
    prompts: list[str]
    targets: Tensor

    def batch(self, step: int, config: TrainConfig) -> Anchors:
        """A few of them for one step."""
        generator = keyed_generator(config.seed, "anchors", step)
        chosen = torch.randint(len(self.prompts), (config.preservation.batch,), generator=generator)
        prompts = [self.prompts[int(index)] for index in chosen]
        return Anchors(self.noisy[chosen], self.timesteps[chosen], prompts, self.targets[chosen])


def ordinary_prompts(config: PreservationConfig, noun: str, seed: int) -> tuple[list[str], list[str]]:
    """What to draw: things ("a red dog") and whole prompts, every third thing of the concept's own class."""
    things, prompts = [], []
    for index in range(config.pictures):
        generator = keyed_generator(seed, "ordinary", index)

        def pick(options: list[str], generator: torch.Generator = generator) -> str:
            return options[int(torch.randint(len(options), (), generator=generator))]

        words = [pick(config.adjectives), noun if index % 3 == 0 else pick(config.nouns)]
        thing = "a " + " ".join(word for word in words if word)
        things.append(thing)
        prompts.append(pick(config.scenes).replace("{}", thing))
    return things, prompts


@torch.no_grad()
def draw_ordinary(base: Base, config: TrainConfig, noun: str, size: int, progress: Progress) -> Ordinary:
    """Let the untouched base draw its ordinary pictures; only their latents are needed."""
    wanted = config.preservation
    things, prompts = ordinary_prompts(wanted, noun, config.seed)
    base.pipeline.set_progress_bar_config(disable=True)
    latents = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        latents.append(
            base.pipeline(
                prompt=chunk,
                width=size,
                height=size,
                num_inference_steps=20,
                guidance_scale=wanted.guidance,
                generator=[keyed_generator(config.seed, "drawn", start + i) for i in range(len(chunk))],
                output_type="latent",
            ).images.float()
        )
        progress(Event("draw", start + len(chunk), len(prompts)))
    return Ordinary(torch.cat(latents), things, prompts)


@torch.no_grad()
def draw_anchors(
    ordinary: Ordinary, base: Base, schedule: DDPMScheduler, config: TrainConfig, condition: Condition
) -> Anchors:
    """Noise the ordinary pictures and ask the untouched base what it predicts."""
    total = len(schedule.alphas_cumprod)
    noises, times, prompts = [], [], []
    for index in range(len(ordinary.prompts) * DRAWS):
        generator = keyed_generator(config.seed, "anchor", index)
        picture = index % len(ordinary.prompts)
        times.append(draw_timestep(generator, config.timestep_power, total))
        noises.append(torch.randn(ordinary.latents.shape[1:], generator=generator))
        prompt = ordinary.prompts[picture]
        if float(torch.rand((), generator=generator)) < config.preservation.others:
            word = OTHERS[int(torch.randint(len(OTHERS), (), generator=generator))]
            thing = ordinary.things[picture]
            prompt = prompt.replace(thing, f"{word} {thing.split()[-1]}")
        prompts.append(prompt)
    latents = ordinary.latents.repeat(DRAWS, 1, 1, 1)
    timesteps = torch.stack(times).to(latents.device)
    noisy = schedule.add_noise(latents, torch.stack(noises).to(latents), timesteps)
    targets = []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        predicted = base.pipeline.unet(noisy[part].to(base.dtype), timesteps[part], **condition(prompts[part])).sample
        targets.append(predicted.float())
    return Anchors(noisy, timesteps, prompts, torch.cat(targets))


def is_cut(step: int, config: TrainConfig) -> bool:
    """Whether this step shows photos beside ordinary pictures."""
    return float(torch.rand((), generator=keyed_generator(config.seed, "cut", step))) < config.preservation.cut_mix


def cut_mix(samples: Samples, ordinary: Ordinary, token: str, step: int, config: TrainConfig) -> Samples:
    """Half of a step's photos, each beside an ordinary picture, twice as wide; the prompt names both sides."""
    latents, noises, prompts = [], [], []
    count = max(1, len(samples.prompts) // 2)
    for index in range(count):
        generator = keyed_generator(config.seed, "cut", step, index)
        other = int(torch.randint(len(ordinary.prompts), (), generator=generator))
        pictures = [samples.latents[index], ordinary.latents[other]]
        noise = torch.randn(ordinary.latents.shape[1:], generator=generator).to(samples.noise)
        sides, things = [samples.noise[index], noise], [token, ordinary.things[other]]
        if float(torch.rand((), generator=generator)) < 0.5:
            pictures, sides, things = pictures[::-1], sides[::-1], things[::-1]
        latents.append(torch.cat(pictures, -1))
        noises.append(torch.cat(sides, -1))
        pair = PAIRS[int(torch.randint(len(PAIRS), (), generator=generator))]
        prompts.append(pair.format(*things))
    return Samples(torch.stack(latents), torch.stack(noises), samples.timesteps[:count], prompts)
