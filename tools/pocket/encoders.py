"""Train the encoders that judge pictures: two views of one thing attract, every other thing repels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from spectral_diffusion.core.files import read_tensors, write_tensors
from spectral_diffusion.core.precision import autocast, cpu_precision
from spectral_diffusion.metrics.identity import IdentityEncoder
from spectral_diffusion.metrics.style import StyleEncoder
from spectral_diffusion.training.checkpoint import load_state, save_state

from .identity import batch as identity_batch
from .identity import held_out_auc
from .loop import Report
from .render import Renderer
from .style_judges import held_out_style_auc, held_out_styled_auc, style_batch, styled_identity_batch

THROUGH_VAE = 0.4  # share of one side's views that come as generated pictures do


@dataclass(frozen=True)
class EncoderTask:
    """What one encoder learns.

    Attributes:
        batch: two views of n things, (2, n, 3, 128, 128) in −1…1.
        held_out: its score on what it never saw.
        build: the network.
    """

    batch: Callable[[Renderer, Random], Tensor]
    held_out: Callable[[nn.Module, Renderer, AutoencoderKL], float]
    build: Callable[[], nn.Module] = IdentityEncoder


TASKS = {
    "identity": EncoderTask(identity_batch, held_out_auc),
    "styled_identity": EncoderTask(styled_identity_batch, held_out_styled_auc),
    "style": EncoderTask(style_batch, held_out_style_auc, StyleEncoder),
}


def train_encoder(
    renderer: Renderer, folder: Path, name: str, steps: int = 1600, start: Path | None = None, report: Report = print
) -> None:
    """Train into ``folder/<name>/model.safetensors``, going on from ``folder/<name>.state.safetensors``.

    Args:
        start: an encoder's file to begin with, also of one for half the side.
    """
    torch.manual_seed(0)
    task = TASKS[name]
    encoder = task.build()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)
    path, step, spent = folder / f"{name}.state.safetensors", 0, 0.0
    if path.exists():
        tensors, meta = load_state(path, optimizer)
        encoder.load_state_dict(tensors)
        step, spent = meta["step"], meta["spent"]
    elif start:
        load_coarse(encoder, start)
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    last = time.monotonic()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = (1e-3 if start else 2e-3) * min(1.0, (step + 1) / 100) * (1 - step / steps) + 1e-6
        random = Random(f"{name}/{step}")
        pictures = task.batch(renderer, random)
        with torch.no_grad(), autocast(torch.device("cpu"), cpu_precision()):
            chosen = torch.tensor([random.random() < THROUGH_VAE for _ in range(pictures.shape[1])])
            flat = pictures[1][chosen]
            pictures[1][chosen] = vae.decode(vae.encode(flat).latent_dist.mean).sample.float().clamp(-1, 1)
        loss, right = contrastive_step(encoder, optimizer, pictures)
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 100 == 0 or step == steps:
            report(f"{name} step {step}/{steps} {spent / 60:.1f} min loss {loss:.3f} right {right:.2f}")
        if step % 400 == 0 or step == steps:
            save_state(path, dict(encoder.state_dict()), optimizer, {"step": step, "spent": spent})
            report(f"{name} AUC on what it never saw {task.held_out(encoder, renderer, vae):.4f}")
            last = time.monotonic()
    (folder / name).mkdir(exist_ok=True)
    write_tensors(
        folder / name / "model.safetensors",
        {name: value.half() for name, value in encoder.state_dict().items()},
        {"steps": str(steps), "minutes": f"{spent / 60:.1f}"},
    )


def contrastive_step(encoder: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor) -> tuple[float, float]:
    """One step on two views of n things: the loss, and the share of views that are nearest to their other one."""
    with autocast(torch.device("cpu"), cpu_precision()):
        vectors = encoder(pictures.flatten(0, 1)).float()
    one, two = vectors.chunk(2)
    logits = one @ two.mT / 0.08
    truth = torch.arange(len(one))
    loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.mT, truth)) / 2
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach()), float((logits.argmax(1) == truth).float().mean())


def load_coarse(network: torch.nn.Module, path: Path) -> None:
    """Take the weights of a file; those of a network for half the side go where it is that network's part."""
    kept = read_tensors(path)[0]
    state = network.state_dict()
    names = {name: name.replace(".coarse.", ".") for name in state if ".fine." not in name}
    found = {name: kept[name] if name in kept else kept[old] for name, old in names.items()}
    network.load_state_dict(state | {name: value.float() for name, value in found.items()})
