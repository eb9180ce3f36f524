"""Teach a fused base what every adapter draws alone: no photo is needed, only the adapters and the untouched base.

A merge is exact for one layer at a time; what it gets wrong adds up through the network. Here the whole fused network
is held to each adapter's own predictions on that concept's pictures, and to the base's on ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ..adapted import overlay
from ..adapter import Adapter
from ..base import Base
from ..config import ORDINARY_SCENES
from ..methods.attach import activate, detach
from ..methods.targets import find_targets
from ..progress import Event, Progress, silent
from ..randomness import keyed_generator, keyed_random
from ..tokens import collapse, known_tokens

CHUNK = 16  # pictures drawn, and predictions made, together


@dataclass(frozen=True)
class Distil:
    """How a fused base is taught.

    Attributes:
        steps: of AdamW, the rate falling to nothing in a line.
        batch: predictions in a step, of which ``ordinary`` (a share) are of ordinary pictures.
        pictures: drawn for a concept, and ``draws`` of noise and time for each.
        plain: pictures of ordinary prompts; ``empty`` (a share) of their predictions are asked for with no prompt.
    """

    steps: int = 300
    rate: float = 1e-4
    batch: int = 16
    ordinary: float = 0.5
    pictures: int = 24
    draws: int = 12
    plain: int = 96
    empty: float = 0.15
    guidance: float = 2.0
    targets: str = "attention"


@dataclass(frozen=True)
class Lesson:
    """Noised pictures (n, c, h, w) of one concept, or of ordinary things, and what is right to predict there."""

    prompts: list[str]
    noisy: Tensor
    timesteps: Tensor
    wanted: Tensor


def predict(base: Base, lesson: Lesson, chosen: Sequence[int]) -> Tensor:
    """The base's predictions (n, c, h, w) for some of a lesson's pictures."""
    prompts, rows = [lesson.prompts[index] for index in chosen], torch.as_tensor(chosen)
    words = base.pipeline.encode_prompt(
        prompts, device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    found: Tensor = base.pipeline.unet(lesson.noisy[rows], lesson.timesteps[rows], words).sample
    return found


@torch.no_grad()
def lesson_of(base: Base, adapter: Adapter | None, things: Sequence[str], config: Distil, seed: int) -> Lesson:
    """What an adapter (None: the base alone) draws for each of the things, and predicts on its way there.

    The adapter's token is installed already; the base is as it was afterwards.
    """
    who = adapter.name if adapter else "ordinary"
    known = known_tokens(base.pipeline.tokenizer)
    prompts = [
        collapse(ORDINARY_SCENES[i % len(ORDINARY_SCENES)].replace("{}", thing), known)
        for i, thing in enumerate(things)
    ]
    if adapter:
        overlay(base, adapter, 1.0, "teacher")
        activate(base.models, ["teacher"])
    drawn = [
        base.pipeline(
            prompt=prompts[start : start + CHUNK],
            num_inference_steps=10,
            guidance_scale=config.guidance,
            width=base.size,
            height=base.size,
            output_type="latent",
            generator=[
                keyed_generator("lesson", who, seed, start + i) for i in range(len(prompts[start : start + CHUNK]))
            ],
        ).images
        for start in range(0, len(prompts), CHUNK)
    ]
    latents = torch.cat(drawn).repeat_interleave(config.draws, 0)
    random, generator = keyed_random("lesson", who, seed), keyed_generator("noise", who, seed)
    empty = 0.0 if adapter else config.empty
    asked = ["" if random.random() < empty else prompt for prompt in prompts for _ in range(config.draws)]
    schedule = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    last = len(schedule.alphas_cumprod)
    timesteps = (last * torch.rand(len(latents), generator=generator) ** 0.5).long().clamp(max=last - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    lesson = Lesson(asked, schedule.add_noise(latents, noise, timesteps), timesteps, latents)
    parts = [range(start, min(start + CHUNK, len(asked))) for start in range(0, len(asked), CHUNK)]
    wanted = torch.cat([predict(base, lesson, part) for part in parts])
    if adapter:
        detach(base.models)
    return Lesson(asked, lesson.noisy, timesteps, wanted)


def distil(
    fused: Base,
    plain: Base,
    adapters: Sequence[Adapter],
    ordinary: Sequence[str],
    config: Distil,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Move the target weights of ``fused`` in place until it predicts what its teachers do.

    Args:
        fused: the student, with the adapters' tokens; any merge is a start.
        plain: the untouched base with the same tokens.
        ordinary: things without any concept, such as ``a red dog``, drawn from by the seed.
    """
    random = keyed_random("ordinary", seed)
    lessons = [lesson_of(plain, adapter, [adapter.token] * config.pictures, config, seed) for adapter in adapters]
    usual = lesson_of(plain, None, [random.choice(ordinary) for _ in range(config.plain)], config, seed)
    fused.pipeline.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    for model in fused.models.values():
        model.requires_grad_(False)
    weights = [layer.weight.requires_grad_(True) for layer in find_targets(fused.models, config.targets).values()]
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.rate * (1 - step / config.steps)
        loss = loss_of(fused, lessons, usual, config, step, seed)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        progress(Event("distil", step + 1, config.steps, {"loss": float(loss.detach())}))
    for weight in weights:
        weight.requires_grad_(False)


def loss_of(fused: Base, lessons: Sequence[Lesson], usual: Lesson, config: Distil, step: int, seed: int) -> Tensor:
    """Mean squared error of one batch; the concepts take turns."""
    generator = keyed_generator("distil", seed, step)
    own = config.batch - int(config.batch * config.ordinary)
    taken: list[tuple[Lesson, int]] = []
    for index in range(config.batch):
        lesson = lessons[(step * own + index) % len(lessons)] if index < own else usual
        taken.append((lesson, int(torch.randint(len(lesson.prompts), (), generator=generator))))

    def stacked(part: str) -> Any:
        return torch.stack([getattr(lesson, part)[index] for lesson, index in taken])

    batch = Lesson(
        [lesson.prompts[index] for lesson, index in taken], stacked("noisy"), stacked("timesteps"), stacked("wanted")
    )
    with torch.autocast(fused.device.type, torch.bfloat16):
        found = predict(fused, batch, range(config.batch))
    return F.mse_loss(found.float(), batch.wanted)
