"""Training in pieces: how far it is, its learning rate, and the loop that ends with a saved state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from spectral_diffusion.core.errors import UserError

from .compute import Compute

Report = Callable[[str], None]
Seen = TypeVar("Seen", contravariant=True)  # what a step sees


@dataclass(frozen=True)
class Rates:
    """The learning rate: it warms up, stays, and comes down when told."""

    rate: float = 8e-4
    warmup: int = 16_000  # samples
    last_rate: float = 1e-5  # at the end of the decay


@dataclass
class Progress:
    """How far the training is, and where its decay begins. All of it is saved."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    warmed: int = 0  # samples at which the optimizer started anew; the rate warms up from here
    decay_from: int | None = None
    decay_samples: int = 0

    def rate(self, recipe: Rates) -> float:
        """The learning rate of the next step."""
        warm = min(1.0, (self.samples - self.warmed + 1) / max(1, recipe.warmup))
        if self.decay_from is None:
            return recipe.rate * warm
        share = min(1.0, (self.samples - self.decay_from) / max(1, self.decay_samples))
        return (recipe.rate + (recipe.last_rate - recipe.rate) * share) * warm

    def decay(self, samples: int | None) -> None:
        """Let the decay begin now, if it is wanted and has not begun before."""
        if samples and self.decay_from is None:
            self.decay_from, self.decay_samples = self.samples, samples

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


class Trains(Protocol[Seen]):
    """What the loop trains."""

    compute: Compute
    progress: Progress

    def step(self, batch: Seen, /) -> Tensor: ...

    def rate(self) -> float: ...


def train_piece(
    training: Trains[Seen],
    source: Callable[[int], Seen],
    limits: Limits,
    save: Callable[[], None],
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
            f"step {progress.step} samples {progress.samples} rate {training.rate():.2e} "
            f"loss {mean:.4f} {(progress.samples - samples) / (now - last):.1f} samples/s"
        )
        loss, steps, samples, last = torch.zeros_like(loss), 0, progress.samples, now
        done = done or now - begun >= 60 * limits.minutes
        if done or now - saved >= 60 * limits.save_minutes:
            save()
            saved = last = time.monotonic()
