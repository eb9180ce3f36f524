"""One piece of the base's training: from the state in a folder to the next one."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from spectral_diffusion import pocket

from .art import icon_sets
from .base import Limits, Recipe, Training, train_base
from .batches import Mix, PillowSource
from .compute import choose
from .models import Trainee
from .render import Renderer
from .sheet import export, sample_sheet
from .vae import Report

STATE = "base.state.safetensors"


@dataclass(frozen=True)
class Piece:
    """Where a piece begins and what it computes on."""

    work: Path
    start: str = "pocket"
    batch: int = 32
    device: str = "auto"
    sheet_samples: int = 50_000


def run_base(piece: Piece, recipe: Recipe, limits: Limits, decay_samples: int | None, report: Report) -> None:
    """Train one piece in ``piece.work``; saves its state there, and a sheet of samples now and then."""
    compute, mix = choose(piece.device), Mix()
    folder = pocket.path() if piece.start == "pocket" else Path(piece.start)
    training = Training(Trainee(), compute, recipe)
    state = piece.work / STATE
    if state.exists():
        training.load(state)
    else:
        training.trainee.load_pipeline(folder)
        training.reset_averages()
    progress = training.progress
    if decay_samples and progress.decay_from is None:
        progress.decay_from, progress.decay_samples = progress.samples, decay_samples
    vae = AutoencoderKL.from_pretrained(pocket.path() / "vae", dtype=torch.float32).requires_grad_(False)
    source = PillowSource(
        Renderer(icon_sets(piece.work / "art")),
        vae.to(compute.device),
        training.trainee.tokenizer,
        compute,
        mix,
        piece.batch,
    )
    report(
        f"from {'step ' + str(progress.step) if progress.step else folder}, {progress.samples} samples; batch "
        f"{piece.batch} on {compute.device} of {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, {'bfloat16' if compute.bf16 else 'float32'}"
    )
    sheets = progress.samples // max(1, piece.sheet_samples)

    def save(training: Training) -> None:
        nonlocal sheets
        about = {"start": piece.start, "batch": piece.batch, "mix": asdict(mix)}
        training.save(state, about)
        report(f"saved {state.name} at {progress.samples} samples")
        if piece.sheet_samples and progress.samples // piece.sheet_samples > sheets:
            sheets = progress.samples // piece.sheet_samples
            export(training, vae, piece.work / "pipeline", about={"progress": asdict(progress), **about})
            sample_sheet(piece.work / "pipeline", piece.work / f"samples-{progress.samples // 1000:06d}k.png")

    train_base(training, source, limits, save, report)
