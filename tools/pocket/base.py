"""Pretrain the pocket base: text encoder, U-Net and T2I-Adapters together.

The training goes on in pieces: a constant learning rate until told otherwise, then a decay over a given number of
samples. Every draw is keyed by the step, so a piece that goes on from a saved state sees what an unbroken run sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_diffusion.errors import UserError
from spectral_diffusion.training.state import load_state, save_state

from .batches import Batch
from .compute import Compute
from .models import Trainee, build_scheduler
from .vae import Report


@dataclass(frozen=True)
class Recipe:
    """How the networks are trained on what the batches show."""

    rate: float = 8e-4
    warmup: int = 16_000  # samples
    last_rate: float = 1e-5  # at the end of the decay
    ema: tuple[int, ...] = (30_000, 150_000)  # samples that each moving average looks back
    timestep_power: float = 0.55  # timesteps are 1000 u^power: below 1, more of them at high noise
    object_weight: float = 2.5  # added to the loss where things are
    snr: float = 5.0  # the loss is weighted by 1 / (1 + SNR / snr)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0


@dataclass
class Progress:
    """How far the training is, and where its decay begins. All of it is saved."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    warmed: int = 0  # samples at which the optimizer started anew; the rate warms up from here
    decay_from: int | None = None
    decay_samples: int = 0

    def rate(self, recipe: Recipe) -> float:
        """The learning rate of the next step."""
        warm = min(1.0, (self.samples - self.warmed + 1) / max(1, recipe.warmup))
        if self.decay_from is None:
            return recipe.rate * warm
        share = min(1.0, (self.samples - self.decay_from) / max(1, self.decay_samples))
        return (recipe.rate + (recipe.last_rate - recipe.rate) * share) * warm

    @property
    def decayed(self) -> bool:
        """Whether the decay is over, and with it the training."""
        return self.decay_from is not None and self.samples >= self.decay_from + self.decay_samples


@dataclass
class Limits:
    """When a piece ends, and how often it saves and reports."""

    minutes: float = math.inf
    until_samples: int | None = None
    save_minutes: float = 5.0
    report_steps: int = 20


@dataclass
class Training:
    """The networks with their optimizer, moving averages and progress."""

    trainee: Trainee
    compute: Compute
    recipe: Recipe
    progress: Progress = field(default_factory=Progress)
    averages: list[list[Tensor]] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.trainee.to(self.compute.device)
        self.names = [name for name, _ in self.trainee.named_parameters()]
        self.parameters = [parameter for _, parameter in self.trainee.named_parameters()]
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in self.recipe.ema]
        self.alphas = build_scheduler().alphas_cumprod.to(self.compute.device)
        recipe = self.recipe
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    @torch.no_grad()
    def reset_averages(self) -> None:
        """Begin the moving averages with the present weights."""
        for average in self.averages:
            torch._foreach_copy_(average, list(self.parameters))

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.progress.rate(self.recipe)
        loss = velocity_loss(self, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        samples = batch.samples
        self.progress.step += 1
        self.progress.samples += samples
        since = self.progress.samples
        with torch.no_grad():
            for average, length in zip(self.averages, self.recipe.ema, strict=True):
                # Early on, an average looks back over a tenth of what there was.
                weight = samples / min(length, max(samples, since / 10))
                torch._foreach_lerp_(average, list(self.parameters), weight)
        return loss.detach()

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write everything that a later piece needs, at once."""
        tensors: dict[str, Tensor] = dict(zip((f"raw.{n}" for n in self.names), self.parameters, strict=True))
        for index, average in enumerate(self.averages):
            tensors |= dict(zip((f"ema{index}.{n}" for n in self.names), average, strict=True))
        meta = {"progress": asdict(self.progress), "recipe": asdict(self.recipe), "about": about}
        save_state(path, tensors, self.optimizer, meta)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a saved state; returns what was saved ``about`` it.

        A state without the optimizer's numbers, packed to travel, starts them anew and warms the rate up again.
        """
        tensors, meta = load_state(path)
        self.progress = Progress(**meta["progress"])
        if meta.get("packed"):
            self.progress.warmed = self.progress.samples
        else:
            load_state(path, self.optimizer)
            for group in self.optimizer.param_groups:
                group.update(betas=self.recipe.betas, weight_decay=self.recipe.weight_decay)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(tensors[f"raw.{name}"])
        for index, average in enumerate(self.averages):
            for name, value in zip(self.names, average, strict=True):
                value.copy_(tensors.get(f"ema{index}.{name}", tensors[f"raw.{name}"]))
        return meta["about"]


def velocity_loss(training: Training, batch: Batch) -> Tensor:
    """v-prediction error, weighted by 1 / (1 + SNR / 5) and by where the things are."""
    recipe, compute = training.recipe, training.compute
    generator = compute.generator(training.progress.step)
    latents, count = batch.latents, len(batch.latents)
    noise = torch.randn(latents.shape, generator=generator, device=compute.device)
    # Stratified timesteps: one per equal stretch, so that a step's loss is steadier. More of them at high noise,
    # where the class decides the shape: measured, a wrong class word costs six times more at 950 than at 500.
    spread = torch.rand(count, generator=generator, device=compute.device)
    spots = (torch.arange(count, device=compute.device) + spread) / count
    top = len(training.alphas)
    timesteps = (spots**recipe.timestep_power * top).long().clamp_max(top - 1)
    alpha = training.alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    with compute.autocast():
        predicted = training.trainee(noisy, timesteps, batch)
    snr = alpha / (1 - alpha)
    where = 1 + recipe.object_weight * batch.where
    return ((predicted.float() - target).square() * where / (1 + snr / recipe.snr)).mean() / where.mean()


def train_base(
    training: Training,
    source: Callable[[int], Batch],
    limits: Limits,
    save: Callable[[Training], None],
    report: Report,
) -> None:
    """Train one piece; it ends with a saved state, by time, samples or the end of the decay.

    Raises:
        UserError: the loss is not finite; the last saved state is good.
    """
    progress = training.progress
    begun = last = saved = time.monotonic()
    loss, steps, samples = torch.zeros((), device=training.compute.device), 0, progress.samples
    done = progress.decayed
    while not done:
        loss = loss + training.step(source(progress.step))
        steps += 1
        done = progress.decayed or progress.samples >= (limits.until_samples or math.inf)
        if steps < limits.report_steps and not done:
            continue
        # The loss is read here alone: on a GPU the steps in between run without waiting.
        mean = float(loss) / steps
        if not math.isfinite(mean):
            raise UserError(
                f"The loss is not finite at step {progress.step}; go on from the last state that was saved."
            )
        now = time.monotonic()
        progress.seconds += now - last
        report(
            f"step {progress.step} samples {progress.samples} rate {progress.rate(training.recipe):.2e} "
            f"loss {mean:.4f} {(progress.samples - samples) / (now - last):.1f} samples/s"
        )
        loss, steps, samples, last = torch.zeros_like(loss), 0, progress.samples, now
        done = done or now - begun >= 60 * limits.minutes
        if done or now - saved >= 60 * limits.save_minutes:
            save(training)
            saved = last = time.monotonic()
