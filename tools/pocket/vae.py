"""Pretrain the pocket base's AutoencoderKL on rendered scenes."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from spectral_diffusion.training.state import load_state, save_state

from .render import Picture, Renderer, WorldConfig

Report = Callable[[str], None]
WIDEST = WorldConfig(
    classes=48, counts=(0.5, 0.35, 0.15), scale=(0.5, 0.95), shift=0.15, rotate=15, mirror=0.5, natural=0.4
)


def build_vae() -> AutoencoderKL:
    """A small AutoencoderKL: 3×64×64 pixels to 8×16×16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def pixels(pictures: list[Picture]) -> Tensor:
    """(n, 3, H, W) float32 in −1…1."""
    stack = np.stack([picture.image for picture in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def prefetch(make: Callable[[int], object], start: int, depth: int = 4) -> Iterator:
    """Yield make(start), make(start + 1), … from one background thread."""
    ready: queue.Queue = queue.Queue(depth)

    def work() -> None:
        step = start
        while True:
            ready.put(make(step))
            step += 1

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def psnr(vae: AutoencoderKL, renderer: Renderer, count: int = 64) -> float:
    """Reconstruction PSNR in dB on fixed scenes that no training step draws."""
    random = Random("vae-validation")
    images = pixels([renderer.scene(random, WIDEST) for _ in range(count)])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    error = ((decoded.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def train_vae(renderer: Renderer, folder: Path, minutes: float, batch: int = 8, report: Report = print) -> None:
    """Train for ``minutes`` of wall time in all, going on from ``folder/vae.state.safetensors``.

    The learning rate falls linearly with the share of the time that is gone.
    """
    torch.manual_seed(0)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    path = folder / "vae.state.safetensors"
    step, spent = 0, 0.0
    if path.exists():
        tensors, meta = load_state(path, optimizer)
        vae.load_state_dict(tensors)
        step, spent = meta["step"], meta["spent"]

    def make(step: int) -> Tensor:
        random = Random(f"vae/{step}")
        return pixels([renderer.scene(random, WIDEST) for _ in range(batch)])

    batches = prefetch(make, step)
    last = time.monotonic()
    loss = torch.zeros(())
    while spent < minutes * 60:
        share = spent / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200) * min(1.0, (1 - share) / 0.6)
        images = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edges = sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        loss = F.mse_loss(decoded, images) * 4 + F.l1_loss(decoded, images) + edges + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not math.isfinite(float(loss.detach())):
            raise RuntimeError(f"VAE loss is not finite at step {step}.")
        optimizer.step()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 250 == 0:
            report(f"vae step {step} {spent / 60:.1f} min loss {float(loss.detach()):.4f}")
        if step % 1000 == 0:
            save_state(path, dict(vae.state_dict()), optimizer, {"step": step, "spent": spent})
            report(f"vae step {step} psnr {psnr(vae, renderer):.2f} dB")
            last = time.monotonic()
    save_state(path, dict(vae.state_dict()), optimizer, {"step": step, "spent": spent})
    report(f"vae done: step {step}, {spent / 60:.1f} min, psnr {psnr(vae, renderer):.2f} dB")
    normalise_latents(vae, renderer)
    vae.save_pretrained(folder / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, renderer: Renderer) -> None:
    """Fold the latents' mean and standard deviation per channel into the quant convolutions.

    Afterwards latents have mean 0 and variance 1 and ``scaling_factor`` can stay 1.
    """
    random = Random("latent-statistics")
    latents = vae.encode(pixels([renderer.scene(random, WIDEST) for _ in range(256)])).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    width = mean.numel()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:width] /= std[:, None, None, None]
    quant.bias[:width] = (quant.bias[:width] - mean) / std
    quant.bias[width:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
