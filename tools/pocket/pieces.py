"""One piece of the pretraining: from the state in a folder to the next one."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from spectral_diffusion import pocket

from .art import icon_sets
from .base import Recipe, Training
from .batches import Mix
from .compute import Compute, choose
from .device import DeviceRenderer, DeviceSource
from .growth import widened
from .loop import Limits, Report, train_piece
from .models import SIZES, Trainee
from .plan import Planner
from .render import Renderer
from .sheet import export, sample_sheet
from .sprites import Bank, build_bank, pack_artwork
from .travel import STATE_JSON, unpack
from .vae import VaeRecipe, VaeSource, VaeTraining, grown, quality, vae_planner

STATE = "base.state.safetensors"
VAE_STATE = "vae.state.safetensors"
ARTWORK = "artwork.safetensors"


@dataclass(frozen=True)
class Piece:
    """Where a piece begins and what it computes on."""

    work: Path
    start: str = "pocket"
    sizes: str = "narrow"
    batch: int = 32
    device: str = "auto"
    workers: int = 0  # processes that plan ahead
    puppets: int = 48  # drawings of each puppet in a colour and a pose
    reuse: bool = True  # see every batch twice
    compiled: bool = False  # the U-Net, with torch.compile
    sheet_samples: int = 50_000


def frozen_vae(compute: Compute) -> AutoencoderKL:
    """The autoencoder of pocket@1, from 64 pixels to the latents."""
    vae = AutoencoderKL.from_pretrained(pocket.path() / "vae", dtype=torch.float32)
    return vae.requires_grad_(False).to(compute.device)


def bank_of(work: Path, size: int, puppets: int, compute: Compute, workers: int = 0) -> Bank:
    """The bank of sprites; the artwork is fetched and packed the first time."""
    artwork = work / ARTWORK
    if not artwork.exists():
        pack_artwork(Renderer(icon_sets(work / "art")), artwork)
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else nullcontext()
    with pool as processes:

        def mapped(work, *jobs):  # type: ignore[no-untyped-def]
            return processes.map(work, *jobs, chunksize=64) if processes else map(work, *jobs)

        return build_bank(artwork, size, puppets, compute.device, mapped)


def begin(piece: Piece, compute: Compute, recipe: Recipe) -> Training:
    """The training as the piece finds it: from its state, packed files, or a pipeline."""
    sizes, state = SIZES[piece.sizes], piece.work / STATE
    if state.exists() or (Path(piece.start) / STATE_JSON).exists():
        training = Training(Trainee(sizes), compute, recipe)
        if state.exists():
            training.load(state)
        else:
            unpack(training, Path(piece.start))
        return training
    trainee = Trainee()
    trainee.load_pipeline(pocket.path() if piece.start == "pocket" else Path(piece.start))
    if sizes != trainee.sizes:
        torch.manual_seed(0)
        trainee = widened(trainee, sizes)
    training = Training(trainee, compute, recipe)
    training.about = {"start": piece.start}
    return training


def run_base(piece: Piece, recipe: Recipe, limits: Limits, decay_samples: int | None, report: Report) -> Training:
    """Train the base for one piece in ``piece.work``; saves its state there, and a sheet of samples now and then."""
    compute, mix = choose(piece.device), Mix()
    training = begin(piece, compute, recipe)
    progress = training.progress
    progress.decay(decay_samples)
    vae = frozen_vae(compute)
    bank = bank_of(piece.work, 64, piece.puppets, compute, piece.workers)
    planner = Planner(bank.catalogue, training.trainee.tokenizer, mix, piece.batch)
    source = DeviceSource(DeviceRenderer(bank, compute), vae, planner, piece.workers, piece.reuse)
    if piece.compiled:
        training.trainee.unet.compile()
    report(
        f"from step {progress.step}, {progress.samples} samples; {piece.sizes}, batch {piece.batch} "
        f"on {described(compute)}"
    )
    training.about |= {"sizes": piece.sizes, "batch": piece.batch, "mix": asdict(mix)}
    sheets = progress.samples // max(1, piece.sheet_samples)

    def save() -> None:
        nonlocal sheets
        training.save(piece.work / STATE)
        report(f"saved {STATE} at {progress.samples} samples")
        if piece.sheet_samples and progress.samples // piece.sheet_samples > sheets:
            sheets = progress.samples // piece.sheet_samples
            draw_sheet(training, piece.work)

    try:
        train_piece(training, source, limits, save, report)
    finally:
        source.close()
    return training


def draw_sheet(training: Training, work: Path) -> None:
    """Write the pipeline as it stands into ``work/pipeline``, and what it draws for fixed prompts beside it."""
    export(training, frozen_vae(Compute(torch.device("cpu"), False)), work / "pipeline")
    sample_sheet(work / "pipeline", work / f"samples-{training.progress.samples // 1000:06d}k.png")


def run_vae(piece: Piece, recipe: VaeRecipe, limits: Limits, decay_samples: int | None, report: Report) -> None:
    """Train the autoencoder for 128 pixels for one piece in ``piece.work``; saves its state and ``vae/`` there."""
    compute = choose(piece.device)
    old = frozen_vae(compute)
    training = VaeTraining(grown(old.cpu()), compute, recipe)
    old.to(compute.device)
    state = piece.work / VAE_STATE
    if state.exists():
        training.load(state)
    progress = training.progress
    progress.decay(decay_samples)
    trainee = Trainee(SIZES[piece.sizes])
    trainee.load_pipeline(pocket.path() if piece.start == "pocket" else Path(piece.start))
    trainee.requires_grad_(False).to(compute.device)
    bank = bank_of(piece.work, 128, piece.puppets, compute, piece.workers)
    planner = vae_planner(Planner(bank.catalogue, trainee.tokenizer, Mix(), piece.batch))
    source = VaeSource(DeviceRenderer(bank, compute), planner, old, trainee, recipe)
    held_out = VaeSource(
        source.renderer, replace(planner, batch=48, name="pocket2-vae-validation"), old, trainee, recipe
    )
    validation = held_out(0)
    report(f"vae from step {progress.step}, {progress.samples} samples; batch {piece.batch} on {described(compute)}")

    def save() -> None:
        training.save(state, {"start": piece.start, "batch": piece.batch})
        averaged = training.averaged()
        averaged.save_pretrained(piece.work / "vae")
        figures = ", ".join(f"{name} {value:.3f}" for name, value in quality(averaged, validation).items())
        report(f"saved {VAE_STATE} at {progress.samples} samples: {figures}")

    train_piece(training, source, limits, save, report)


def described(compute: Compute) -> str:
    """The device, its threads and its precision in words."""
    if compute.device.type == "cuda":
        name = torch.cuda.get_device_name(compute.device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{name}, {'bfloat16' if compute.bf16 else 'float32'}"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
