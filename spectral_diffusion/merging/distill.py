"""Teach a fused base what every adapter draws alone: no photo is needed, only the adapters and the untouched base.

A merge is exact for one layer at a time; what it gets wrong adds up through the network. Here the whole fused network
is held to each adapter's own predictions on that concept's pictures, and to the base's on ordinary ones. The concepts'
own words learn too, which no ordinary prompt holds.

Every adapter also answers the empty prompt in its own way, and the fused network can have but one answer: the base's.
With guidance g a picture follows e + g (c − e), so what is taught for a concept's words is not the adapter's c but
c − (1 − 1/g) (e − e₀), which with the base's e₀ gives the same. What an adapter changes whatever it is asked is
thereby left to nobody, and stays out of ordinary pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.apply import Strength, enabled_adapters
from ..config.fuse import DistillConfig
from ..config.train import GENERIC_ADJECTIVES, GENERIC_NOUNS, GENERIC_TEMPLATES, generic_subject, in_style
from ..core.errors import Fix, NotFiniteError, UserError
from ..core.hooks import QUIET, Event, Hooks
from ..core.precision import MixedPrecision, autocast, is_half, loss_scaler
from ..core.rng import keyed_generator, keyed_random
from ..linalg import Factors
from ..models.base import Base
from ..training.optimizers import lr_schedule
from .student import Student

CHUNK = 16  # pictures drawn, and predictions made, together; fewer where a batch is smaller, as memory may be short
DRAWING = 10  # steps of each picture


@dataclass(frozen=True)
class TeacherTargets:
    """Noised pictures (n, c, h, w) of one concept, or of ordinary things, and what is right to predict there.

    They wait on the CPU; a batch goes to the base's device.
    """

    prompts: list[str]
    noisy: Tensor
    timesteps: Tensor
    wanted: Tensor


Question = tuple[TeacherTargets, int]  # one noised picture of a lesson


@dataclass(frozen=True)
class DistillTargets:
    """One lesson a concept, and that of ordinary things."""

    concepts: list[TeacherTargets]
    ordinary: TeacherTargets


def prepare_targets(
    base: Base,
    adapters: Sequence[Adapter],
    strengths: Mapping[str, Strength],
    config: DistillConfig,
    seed: int,
    hooks: Hooks = QUIET,
) -> DistillTargets:
    """What to teach, from the untouched base with every adapter's token in it; it is as it was afterwards.

    Raises:
        UserError: an adapter has no word of its own.
    """
    for adapter in adapters:
        if not adapter.tokens:
            raise UserError(
                f"'{adapter.name}' has no word of its own: it changes ordinary prompts, which teaching would take away "
                "again.",
                Fix("distill.steps", "0"),
            )
    random = keyed_random("ordinary", seed)
    things = config.prior_subjects or [generic_subject(a, n) for a in GENERIC_ADJECTIVES for n in GENERIC_NOUNS]
    # Also the words of what an adapter was trained on top of.
    words = [(adapter, token) for adapter in adapters for token in adapter.tokens]
    lessons = []
    for adapter, token in words:
        strength = strengths.get(adapter.name, 1.0)
        wanted = [token] * config.num_images
        if token in adapter.styles:
            wanted = [in_style(random.choice(things), token) for _ in wanted]
        lessons.append(targets_of(base, adapter, wanted, config, seed, strength))
        hooks.progress(Event("lesson", len(lessons), len(words) + 1))
    usual = targets_of(base, None, [random.choice(things) for _ in range(config.num_prior_images)], config, seed)
    hooks.progress(Event("lesson", len(words) + 1, len(words) + 1))
    return DistillTargets(lessons, usual)


@torch.no_grad()
def targets_of(
    base: Base,
    adapter: Adapter | None,
    things: Sequence[str],
    config: DistillConfig,
    seed: int,
    strength: Strength = 1.0,
) -> TeacherTargets:
    """What an adapter (None: the base alone) draws for each of the things, and what is right to predict on the way."""
    who, denoiser = adapter.name if adapter else "ordinary", base.denoiser
    prompts = [
        base.spell(GENERIC_TEMPLATES[i % len(GENERIC_TEMPLATES)].replace("{}", thing)) for i, thing in enumerate(things)
    ]
    active, together = [(adapter, strength)] if adapter else [], min(CHUNK, config.batch_size)
    with enabled_adapters(base, active):
        latents = sample_latents(base, prompts, who, config, seed).repeat_interleave(config.noises_per_image, 0)
    random, generator = keyed_random("lesson", who, seed), keyed_generator("noise", who, seed)
    empty = 0.0 if adapter else config.empty_prompt_prob
    asked = ["" if random.random() < empty else prompt for prompt in prompts for _ in range(config.noises_per_image)]
    last = denoiser.num_timesteps
    timesteps = (last * torch.rand(len(latents), generator=generator) ** 0.5).long().clamp(max=last - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = denoiser.add_noise(latents, noise, timesteps)

    def answers(texts: list[str]) -> Tensor:
        parts = (slice(start, start + together) for start in range(0, len(texts), together))
        return torch.cat([predict(base, texts[part], noisy[part], timesteps[part]).cpu() for part in parts])

    nothing, share = [""] * len(asked), 1 - 1 / denoiser.effective_guidance(config.guidance_scale)
    with enabled_adapters(base, active):
        wanted = answers(asked)
        if adapter and share:
            wanted -= share * answers(nothing)
    if adapter and share:
        wanted += share * answers(nothing)
    return TeacherTargets(asked, noisy, timesteps, wanted)


def predict(base: Base, prompts: Sequence[str], noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The network's predictions (n, c, h, w) float32 for noised latents and prompts."""
    denoiser = base.denoiser
    height, width = (side * denoiser.vae_scale for side in noisy.shape[-2:])
    conditioning = denoiser.encode(prompts, (height, width))
    return denoiser.predict(noisy.to(base.device), timesteps.to(base.device), conditioning)


def sample_latents(base: Base, prompts: list[str], who: str, config: DistillConfig, seed: int) -> Tensor:
    """The latents (n, c, h, w) of a picture for each prompt, on the CPU."""
    out, together = [], min(CHUNK, config.batch_size)
    for start in range(0, len(prompts), together):
        chunk = prompts[start : start + together]
        generators = [keyed_generator("lesson", who, seed, start + i) for i in range(len(chunk))]
        latents = base.denoiser.sample_latents(chunk, generators, DRAWING, config.guidance_scale, config.resolution)
        out.append(latents.cpu())
    return torch.cat(out)


def distill(
    student: Student,
    targets: DistillTargets,
    config: DistillConfig,
    seed: int,
    precision: MixedPrecision = "no",
    hooks: Hooks = QUIET,
) -> dict[str, Factors] | None:
    """Let the student learn until it predicts what its teachers do.

    Returns:
        The correction that was learned, by layer; None where weights have changed in place. The tokens' vectors always
        change in place.

    Raises:
        NotFiniteError: the loss is NaN or infinity.
    """
    base = student.base
    with (
        student.trainable() as learning,
        base.denoiser.fast_attention(is_half(precision, base.dtype), config.resolution or base.size),
        base.denoiser.gradient_checkpointing(config.gradient_checkpointing),
    ):
        groups = [(learning.weights, config.learning_rate), (learning.rows, config.token_learning_rate)]
        optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups], weight_decay=0.0)
        scaler = loss_scaler(base.device, precision, base.dtype)
        lr_factor = lr_schedule("linear", config.steps)
        for step in range(config.steps):
            for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * lr_factor(step)
            optimizer.zero_grad()
            total = 0.0
            for batch in batches(targets, config, step, seed):
                loss = distillation_loss(base, batch, precision) / config.gradient_accumulation_steps
                if not torch.isfinite(loss):
                    raise NotFiniteError(
                        f"Teaching met NaN or infinity at step {step}.",
                        Fix("distill.learning_rate", f"{config.learning_rate / 10:g}"),
                    )
                scaler.scale(loss).backward()
                total += float(loss.detach())
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learning.weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            hooks.progress(Event("teach", step + 1, config.steps, {"loss": total}))
        return learning.factors()


def batches(lessons: DistillTargets, config: DistillConfig, step: int, seed: int) -> list[list[Question]]:
    """What a step asks, in ``config.accumulate`` batches; the concepts take turns, and some are always ordinary."""
    generator, count = keyed_generator("distil", seed, step), config.batch_size * config.gradient_accumulation_steps
    own = min(count - int(count * config.prior_share), count - 1)
    taken: list[Question] = []
    for index in range(count):
        of_concept = index < own and lessons.concepts
        turn = (step * own + index) % max(1, len(lessons.concepts))
        lesson = lessons.concepts[turn] if of_concept else lessons.ordinary
        taken.append((lesson, int(torch.randint(len(lesson.prompts), (), generator=generator))))
    return [taken[start : start + config.batch_size] for start in range(0, count, config.batch_size)]


def distillation_loss(base: Base, batch: Sequence[Question], precision: MixedPrecision = "no") -> Tensor:
    """Mean squared error of the predictions of one batch, which are made in a mixed precision."""

    def stacked(part: str) -> Tensor:
        return torch.stack([getattr(lesson, part)[index] for lesson, index in batch]).to(base.device)

    prompts = [lesson.prompts[index] for lesson, index in batch]
    with autocast(base.device, precision):
        found = predict(base, prompts, stacked("noisy"), stacked("timesteps"))
    return F.mse_loss(found.float(), stacked("wanted"))
