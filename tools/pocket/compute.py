"""Where and how the pretraining computes: the device, and whether bfloat16 is quick there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_diffusion.core.precision import cpu_is_quick_in_bf16


@dataclass(frozen=True)
class Compute:
    """A device, and the precision of what is computed there; parameters stay float32."""

    device: torch.device
    bf16: bool

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the copy does not wait for the device."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def choose(device: str = "auto", bf16: bool | None = None) -> Compute:
    """The device of this name (auto: CUDA if there is one), bfloat16 where it is quick unless it is given."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if bf16 is None:
        bf16 = cpu_is_quick_in_bf16() if chosen.type == "cpu" else chosen.type == "cuda"
    return Compute(chosen, bf16)
