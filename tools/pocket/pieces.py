"""One piece of the pretraining: from the state in a folder to the next one."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from spectral_diffusion import pocket
from spectral_diffusion.core.files import read_header

from .art import icon_sets
from .averaging import AveragedTraining
from .base import Recipe, Training, changed
from .batches import Mix, token_ids
from .compute import Compute, choose
from .device import DeviceRenderer, DeviceSource, Plans
from .growth import widened
from .loop import Limits, Report, train_piece
from .models import SIZES, Trainee
from .plan import Planner
from .render import Renderer
from .sheet import export, sample_sheet
from .sprites import Bank, build_bank, pack_artwork
from .travel import STATE_JSON, unpack
from .vae import VaeRecipe, VaeSource, VaeTraining, quality, vae_planner

SIDE = 128  # of the pictures, in pixels
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
    reuse: int = 2  # how often every batch is seen
    compiled: bool = False  # the U-Net, with torch.compile
    sheet_samples: int = 50_000

    @property
    def pipeline(self) -> Path:
        """The folder of the pipeline that it begins with."""
        return pocket.path() if self.start == "pocket" else Path(self.start)


def bank_of(piece: Piece, compute: Compute) -> Bank:
    """The bank of sprites; the artwork is fetched and packed the first time."""
    artwork = piece.work / ARTWORK
    if not artwork.exists():
        pack_artwork(Renderer(icon_sets(piece.work / "art")), artwork)
    pool = ProcessPoolExecutor(piece.workers, get_context("spawn")) if piece.workers else nullcontext()
    with pool as processes:

        def mapped(work, *jobs):  # type: ignore[no-untyped-def]
            return processes.map(work, *jobs, chunksize=64) if processes else map(work, *jobs)

        return build_bank(artwork, SIDE, piece.puppets, compute.device, mapped)


def begin(piece: Piece, compute: Compute, recipe: Recipe) -> Training:
    """The training as the piece finds it, from its state, packed files or a pipeline, in the sizes it asks for."""
    state, packed = piece.work / STATE, Path(piece.start)
    if state.exists():
        _, about = peek(state)
    elif (packed / STATE_JSON).exists():
        about = json.loads((packed / STATE_JSON).read_text())["about"]
    else:
        about = {}
    trainee = Trainee(SIZES[about.get("sizes", "narrow")])
    if not about:
        trainee.load_pipeline(piece.pipeline)
    training = Training(trainee, compute, recipe)
    training.about = {"start": piece.start}
    if state.exists():
        training.load(state)
    elif about:
        unpack(training, packed)
    if training.trainee.sizes != SIZES[piece.sizes]:
        training = changed(training, lambda trainee: widened(trainee, SIZES[piece.sizes]))
    training.about |= {"sizes": piece.sizes, "batch": piece.batch}
    return training


def as_saved(work: Path) -> Training:
    """The training as a folder's state has it, on the processor."""
    _, about = peek(work / STATE)
    piece = Piece(work, sizes=about.get("sizes", "narrow"), batch=about.get("batch", 32))
    return begin(piece, Compute(torch.device("cpu"), False), Recipe())


def unpack_into(packed: Path, work: Path) -> int:
    """Make packed files a folder's state, keeping the one before as base.before.safetensors; returns its samples."""
    about = json.loads((packed / STATE_JSON).read_text())["about"]
    trainee = Trainee(SIZES[about.get("sizes", "narrow")])
    training = Training(trainee, Compute(torch.device("cpu"), False), Recipe())
    unpack(training, packed)
    if (work / STATE).exists():
        (work / STATE).replace(work / "base.before.safetensors")
    training.save(work / STATE)
    return training.progress.samples


def peek(state: Path) -> tuple[dict, dict]:
    """The progress in a saved state, and what it says about the weights."""
    meta = json.loads(read_header(state)[1]["state"])["meta"]
    return meta["progress"], meta["about"]


def run_base(piece: Piece, recipe: Recipe, limits: Limits, decay_samples: int | None, report: Report) -> Training:
    """Train the base for one piece in ``piece.work``; saves its state there, and a sheet of samples now and then."""
    compute, mix = choose(piece.device), Mix()
    training = begin(piece, compute, recipe)
    progress = training.progress
    progress.decay(decay_samples)
    vae = vae_of(piece.work, compute)
    bank = bank_of(piece, compute)
    planner = Planner(bank.catalogue, partial(token_ids, training.trainee.tokenizer), mix, piece.batch)
    plans = Plans(planner, piece.workers, piece.reuse)
    source = DeviceSource(DeviceRenderer(bank, compute), vae, plans, piece.reuse)
    if piece.compiled:
        training.trainee.unet.compile()
    report(
        f"from step {progress.step}, {progress.samples} samples; {piece.sizes}, batch {piece.batch} "
        f"on {described(compute)}"
    )
    training.about["mix"] = asdict(mix)

    def draw(sheet: Path) -> None:
        export(training, vae_of(piece.work), piece.work / "pipeline")
        sample_sheet(piece.work / "pipeline", sheet)

    try:
        train_and_draw(training, source, piece, limits, draw, report)
    finally:
        plans.close()
    return training


def train_and_draw(
    training: AveragedTraining,
    source: DeviceSource,
    piece: Piece,
    limits: Limits,
    draw: Callable[[Path], None],
    report: Report,
) -> None:
    """Train one piece, whose state goes into its folder.

    Args:
        draw: draws a sheet of samples into a file; called every ``piece.sheet_samples``.
    """
    progress = training.progress
    sheets = progress.samples // max(1, piece.sheet_samples)

    def save() -> None:
        nonlocal sheets
        training.save(piece.work / STATE)
        report(f"saved {STATE} at {progress.samples} samples")
        if piece.sheet_samples and progress.samples // piece.sheet_samples > sheets:
            sheets = progress.samples // piece.sheet_samples
            draw(piece.work / f"samples-{progress.samples // 1000:06d}k.png")

    train_piece(training, source, limits, save, report)


def vae_of(work: Path, compute: Compute | None = None) -> AutoencoderKL:
    """The frozen autoencoder as far as it is trained in a folder, else the shipped one."""
    folder = work / "vae" if (work / "vae").is_dir() else pocket.path() / "vae"
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    return vae.to(compute.device) if compute else vae


def run_vae(piece: Piece, recipe: VaeRecipe, limits: Limits, decay_samples: int | None, report: Report) -> None:
    """Train the autoencoder for one piece in ``piece.work``, from the shipped one; saves its state and ``vae/``."""
    compute = choose(piece.device)
    old = vae_of(pocket.path(), compute)
    training = VaeTraining(vae_of(pocket.path()).requires_grad_(True), compute, recipe)
    state = piece.work / VAE_STATE
    if state.exists():
        training.load(state)
    progress = training.progress
    progress.decay(decay_samples)
    trainee = Trainee(SIZES[piece.sizes])
    trainee.load_pipeline(piece.pipeline, ("text_encoder", "unet"))
    trainee.requires_grad_(False).to(compute.device)
    bank = bank_of(piece, compute)
    planner = vae_planner(Planner(bank.catalogue, partial(token_ids, trainee.tokenizer), Mix(), piece.batch))
    plans = Plans(planner, piece.workers)
    source = VaeSource(DeviceRenderer(bank, compute), plans, old, trainee, recipe)
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

    try:
        train_piece(training, source, limits, save, report)
    finally:
        plans.close()


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
