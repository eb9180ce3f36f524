"""Teach a fused base what every adapter draws alone: no photo is needed, only the adapters and the untouched base.

A merge is exact for one layer at a time; what it gets wrong adds up through the network. Here the whole fused network
is held to each adapter's own predictions on that concept's pictures, and to the base's on ordinary ones. The concepts'
own words learn too, which no ordinary prompt holds.

Every adapter also answers the empty prompt in its own way, and the fused network can have but one answer: the base's
(:mod:`.teachers`). What an adapter changes whatever it is asked is thereby left to nobody, and stays out of ordinary
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.fuse import DistillConfig
from ..core.errors import Fix, NotFiniteError
from ..core.hooks import QUIET, Event, Hooks
from ..core.precision import MixedPrecision, autocast, is_half, loss_scaler
from ..core.rng import keyed_generator
from ..linalg import Factors
from ..models.base import Base
from ..training.optimizers import lr_schedule
from .student import Student
from .teachers import DistillTargets, TeacherTargets, predict

Question = tuple[TeacherTargets, int]  # one noised picture of a lesson


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
