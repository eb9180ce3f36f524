"""How long a training takes on this machine, measured before it starts.

A small base is measured as it is, by a real step of its U-Net. A large one would take minutes to load, so its
arithmetic is counted and divided by what the device does in a second of such work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from .. import pocket
from ..config.train import TrainConfig
from ..core.machine import measured_once, parse_device
from ..core.precision import MixedPrecision, autocast, is_half, resolve_mixed_precision
from ..models.denoiser import plain_attention_is_faster
from ..models.loading import parse_dtype
from .prior_images import STEPS

# Arithmetic of one prediction of one picture at the base's own size (torch.utils.flop_counter).
FLOPS = {"pocket": 0.584e9, "sd15": 803e9, "sdxl": 6761e9}
LARGE_FLOPS = 2 * (64 * 64 * 320 * 320 * 9 + 4096 * 640 * 640)  # of large_work
PASSES = 2.2  # a step's arithmetic over a prediction's: forward, and back to the inputs of every layer
BATCH = 8
UNDISTURBED = 0.8  # a measurement that had less of the cores is made again by the next process


class Timing(NamedTuple):
    """Seconds of some work, and the share of the cores that it had: less than 1 beside other programs."""

    seconds: float
    share: float


def seconds_per_picture(arch: str, device: torch.device, precision: MixedPrecision) -> float:
    """Seconds of a training step for each picture of its batch; measured once on this machine and kept.

    Measured beside other programs, it is kept for this process only.

    Args:
        arch: ``pocket``, ``sd15`` or ``sdxl``.
    """
    work = "pocket" if arch == "pocket" else "large"
    seconds = _timing(work, device, precision).seconds
    return seconds / BATCH if arch == "pocket" else PASSES * FLOPS[arch] * seconds / LARGE_FLOPS


def _timing(work: str, device: torch.device, precision: MixedPrecision) -> Timing:
    """The time of a step of the pocket base, or of products and convolutions of a large network."""
    measure = {"pocket": pocket_step, "large": large_work}[work]
    found = measured_once(
        f"time-{work}-{device.type}-{precision}",
        lambda: measure(device, precision),
        lambda timing: timing.share >= UNDISTURBED,
    )
    return Timing(*found)


def training_seconds(config: TrainConfig, arch: str) -> float:
    """Seconds of a training on this machine when it does nothing else, its prior images included."""
    device = parse_device(config.device)
    precision = resolve_mixed_precision(config.mixed_precision, device, parse_dtype(config.dtype))
    prior = config.prior if config.prior.loss_weight else None
    images = float((config.batch_size + (prior.batch_size if prior else 0)) * config.steps)
    if prior and not config.data.class_images_dir:  # each with guidance, two predictions a step
        images += prior.num_images * 2 * STEPS / PASSES
    return images * seconds_per_picture(arch, device, precision)


@lru_cache(maxsize=8)  # a disturbed one is not repeated at every question
def pocket_step(device: torch.device, precision: MixedPrecision) -> Timing:
    """The time of a step of the pocket base's U-Net on a batch of 8, forward and back to all weights.

    Its presets adapt nearly all layers.
    """
    unet = UNet2DConditionModel.from_pretrained(str(pocket.path() / "unet"), torch_dtype=torch.float32).to(device)
    side = unet.config.sample_size
    if plain_attention_is_faster(device.type, is_half(precision, torch.float32), side):
        unet.set_attn_processor(AttnProcessor())
    noisy = torch.zeros(BATCH, unet.config.in_channels, side, side, device=device, requires_grad=True)
    embeddings = torch.zeros(BATCH, 32, unet.config.cross_attention_dim, device=device, requires_grad=True)
    times = torch.zeros(BATCH, dtype=torch.long, device=device)

    def work() -> Tensor:
        with autocast(device, precision):
            predicted: Tensor = unet(noisy, times, embeddings).sample
        return predicted.float().square().mean()

    return timed(lambda: torch.autograd.grad(work(), (noisy, embeddings, *unet.parameters())), device)


@lru_cache(maxsize=8)
def large_work(device: torch.device, precision: MixedPrecision) -> Timing:
    """The time of a product and a convolution as in a large network, of ``LARGE_FLOPS``."""
    pixels, kernel = torch.randn(1, 320, 64, 64, device=device), torch.randn(320, 320, 3, 3, device=device)
    rows, weight = torch.randn(4096, 640, device=device), torch.randn(640, 640, device=device)

    def work() -> None:
        with autocast(device, precision):
            F.conv2d(pixels, kernel, padding=1)
            F.linear(rows, weight)

    return timed(work, device)


def timed(work: Callable[[], object], device: torch.device, repeats: int = 3) -> Timing:
    """The least of some timings; the first run, which also chooses kernels, does not count.

    On a processor it is the calling thread's own time, so that other programs and threads hardly count.
    """
    timings = []
    for _ in range(repeats + 1):
        start, used = time.perf_counter(), time.thread_time()
        work()
        if device.type == "cpu":
            whole = time.perf_counter() - start
            seconds = min(time.thread_time() - used, whole)
            timings.append(Timing(seconds, seconds / whole))
        else:
            getattr(torch, device.type).synchronize()
            timings.append(Timing(time.perf_counter() - start, 1.0))
    counted = timings[1:]
    return min([timing for timing in counted if timing.share >= UNDISTURBED] or counted)
