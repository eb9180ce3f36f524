"""The losses and gradient norms of steps, read from the device together, since reading waits for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EVERY = 10  # steps between readings on a device that works ahead of Python


class Readings:
    """Figures of the steps since the last reading.

    Args:
        device: a CPU is read at every step, as nothing has to wait.
        steps: of the whole training; the first and the last are read too.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self.every, self.steps = 1 if device.type == "cpu" else EVERY, steps
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._first = 0

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the figures of ``step``, counted from 0, on the device."""
        if not self._losses:
            self._first = step
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())

    def is_due(self, done: int) -> bool:
        """Whether to read after ``done`` steps."""
        return done % self.every == 0 or done in (1, self.steps)

    def read(self) -> tuple[list[float], int | None]:
        """The losses since the last reading, and the first step that went wrong; None if none did."""
        if not self._losses:
            return [], None
        count, first = len(self._losses), self._first
        values = torch.stack([value.float() for value in (*self._losses, *self._norms)]).tolist()
        losses, norms = values[:count], values[count:]
        self._losses, self._norms = [], []
        wrong = [index for index in range(count) if not math.isfinite(losses[index] + norms[index])]
        return losses, first + wrong[0] if wrong else None
