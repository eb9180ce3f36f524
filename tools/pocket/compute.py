"""Where and how the pretraining computes: the device, and whether bfloat16 is quick there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


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
        bf16 = quick_bf16() if chosen.type == "cpu" else chosen.type == "cuda"
    return Compute(chosen, bf16)


def quick_bf16() -> bool:
    """Whether this processor takes a product and a convolution in bfloat16 at least as quickly as in float32."""
    weight, rows = torch.randn(256, 256), torch.randn(1024, 256)
    kernel, pictures = torch.randn(64, 64, 3, 3), torch.randn(8, 64, 16, 16)

    def seconds(dtype: torch.dtype, work: Callable[[torch.dtype], object]) -> float:
        work(dtype)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            work(dtype)
            times.append(time.perf_counter() - begun)
        return min(times)

    def product(dtype: torch.dtype) -> Tensor:
        return rows.to(dtype) @ weight.to(dtype)

    def convolution(dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.conv2d(pictures.to(dtype), kernel.to(dtype), padding=1)

    works = (product, convolution)
    return sum(seconds(torch.bfloat16, w) for w in works) < sum(seconds(torch.float32, w) for w in works)
