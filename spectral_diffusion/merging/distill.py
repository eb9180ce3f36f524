"""Distill every adapter into a fused base: no photo is needed, only the adapters and the untouched base.

A merge is exact for one layer at a time, and its errors add up through the network. Here the whole fused network learns
each adapter's own predictions on images of its concept, and the base's on generic images. The concepts' token
embeddings learn too; no generic prompt contains them.

Every adapter also changes the prediction for the empty prompt, and the fused network can have but one: the base's
(:mod:`.teacher_targets`). So no target contains what an adapter changes whatever the prompt is, and generic images stay
as they are.
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
from .teacher_targets import DistillTargets, TeacherTargets, predict

Sample = tuple[TeacherTargets, int]  # one noised image: the targets that it is among, and its index


def distill(
    student: Student,
    targets: DistillTargets,
    config: DistillConfig,
    seed: int,
    precision: MixedPrecision = "no",
    hooks: Hooks = QUIET,
) -> dict[str, Factors] | None:
    """Train the student to predict the targets.

    Returns:
        The correction that was learned, by layer; None where weights have changed in place. The tokens' vectors always
        change in place.

    Raises:
        NotFiniteError: the loss is NaN or infinity.
        Cancelled: ``hooks.should_stop`` said so.
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
            hooks.raise_if_stopped()
            for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * lr_factor(step)
            optimizer.zero_grad()
            total = 0.0
            for batch in batches(targets, config, step, seed):
                loss = distillation_loss(base, batch, precision) / config.gradient_accumulation_steps
                if not torch.isfinite(loss):
                    raise NotFiniteError(
                        f"The distillation met NaN or infinity at step {step}.",
                        Fix("distill.learning_rate", f"{config.learning_rate / 10:g}"),
                    )
                scaler.scale(loss).backward()
                total += float(loss.detach())
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learning.weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            hooks.progress(Event("distill", step + 1, config.steps, {"loss": total}))
        return learning.factors()


def batches(targets: DistillTargets, config: DistillConfig, step: int, seed: int) -> list[list[Sample]]:
    """A step's samples, in ``gradient_accumulation_steps`` batches; concepts take turns, and a share is generic."""
    generator, count = keyed_generator("distil", seed, step), config.batch_size * config.gradient_accumulation_steps
    own = min(count - int(count * config.prior_share), count - 1)
    taken: list[Sample] = []
    for index in range(count):
        of_concept = index < own and targets.concepts
        turn = (step * own + index) % max(1, len(targets.concepts))
        chosen = targets.concepts[turn] if of_concept else targets.prior
        taken.append((chosen, int(torch.randint(len(chosen.prompts), (), generator=generator))))
    return [taken[start : start + config.batch_size] for start in range(0, count, config.batch_size)]


def distillation_loss(base: Base, batch: Sequence[Sample], precision: MixedPrecision = "no") -> Tensor:
    """Mean squared error of the predictions of one batch, which are made in a mixed precision."""

    def stacked(part: str) -> Tensor:
        return torch.stack([getattr(targets, part)[index] for targets, index in batch]).to(base.device)

    prompts = [targets.prompts[index] for targets, index in batch]
    with autocast(base.device, precision):
        predicted = predict(base, prompts, stacked("noisy"), stacked("timesteps"))
    return F.mse_loss(predicted.float(), stacked("targets"))
