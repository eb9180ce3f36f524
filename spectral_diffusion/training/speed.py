"""How long a training takes on this machine, measured before it starts.

A small base is measured as it is, by a real step of its U-Net. A large one would take minutes to load, so its
arithmetic is counted and divided by what the device does in a second of such work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
PASSES = 2.2  # a step's arithmetic over a prediction's: forward, and back to the inputs of every layer
BATCH = 8


def seconds_per_picture(arch: str, device: torch.device, precision: MixedPrecision) -> float:
    """Seconds of a training step for each picture of its batch; measured once on this machine and kept.

    Args:
        arch: ``pocket``, ``sd15`` or ``sdxl``.
    """
    if arch == "pocket":
        return float(measured_once(f"whole-step-{device.type}-{precision}", lambda: pocket_step(device, precision)))
    rate = float(measured_once(f"flops-{device.type}-{precision}", lambda: flops_per_second(device, precision)))
    return PASSES * FLOPS[arch] / rate


def training_seconds(config: TrainConfig, arch: str) -> float:
    """Seconds of a training on this machine when it does nothing else, its prior images included."""
    device = parse_device(config.device)
    precision = resolve_mixed_precision(config.mixed_precision, device, parse_dtype(config.dtype))
    prior = config.prior if config.prior.loss_weight else None
    images = float((config.batch_size + (prior.batch_size if prior else 0)) * config.steps)
    if prior and not config.data.class_images_dir:  # each with guidance, two predictions a step
        images += prior.num_images * 2 * STEPS / PASSES
    return images * seconds_per_picture(arch, device, precision)


def pocket_step(device: torch.device, precision: MixedPrecision) -> float:
    """Seconds for each picture of a step of the pocket base's U-Net, forward and back to all weights.

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

    return timed(lambda: torch.autograd.grad(work(), (noisy, embeddings, *unet.parameters())), device) / BATCH


def flops_per_second(device: torch.device, precision: MixedPrecision) -> float:
    """What the device does in a second of a large network's products and convolutions."""
    pixels, kernel = torch.randn(1, 320, 64, 64, device=device), torch.randn(320, 320, 3, 3, device=device)
    rows, weight = torch.randn(4096, 640, device=device), torch.randn(640, 640, device=device)

    def work() -> None:
        with autocast(device, precision):
            F.conv2d(pixels, kernel, padding=1)
            F.linear(rows, weight)

    done = 2 * (64 * 64 * 320 * 320 * 9 + 4096 * 640 * 640)
    return done / timed(work, device)


def timed(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of some timings, in seconds; the first run, which also chooses kernels, does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
