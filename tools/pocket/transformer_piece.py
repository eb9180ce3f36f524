"""One piece of the pocket transformer's pretraining: from the state in a folder to the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from spectral_diffusion.data.image_grid import image_grid
from spectral_diffusion.models.loading import load_base
from spectral_diffusion.pocket import VERSION, is_pocket

from .batches import Mix, token_ids
from .compute import Compute, choose
from .device import DeviceRenderer, DeviceSource, Plans
from .loop import Limits, Report
from .pieces import STATE, Piece, bank_of, described, train_and_draw
from .plan import Planner
from .sheet import SHEET
from .teacher import FlowTeacher
from .transformer import (
    FlowRecipe,
    FlowTrainee,
    FlowTraining,
    build_tokenizer,
    chat_ids,
    export_transformer,
    flux2_vae,
    transformer_pictures,
)

MEASURED = 40  # batches for the mean and the deviation of latents
MIX = Mix(sketch=0.0, keypose=0.0)  # there are no adapters for control images


def transformer_vae(work: Path, start: Path, renderer: DeviceRenderer, planner: Planner) -> AutoencoderKLFlux2:
    """The folder's autoencoder; the first time it is made of the pipeline's in ``start``."""
    folder = work / "vae"
    if not folder.is_dir():
        vae = AutoencoderKL.from_pretrained(start / "vae", dtype=torch.float32).to(renderer.compute.device)
        pictures = (renderer(planner(step)).images for step in range(10_000, 20_000))
        square = (batch for batch in pictures if batch.shape[-1] == batch.shape[-2])
        flux2_vae(vae, islice(square, MEASURED)).save_pretrained(folder)
    made = AutoencoderKLFlux2.from_pretrained(folder, dtype=torch.float32)
    return made.requires_grad_(False).eval().to(renderer.compute.device)


def saved_training(work: Path, recipe: FlowRecipe | None = None, compute: Compute | None = None) -> FlowTraining:
    """The training as a folder's state has it, or one that begins."""
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", dtype=torch.float32).requires_grad_(False).eval()
    torch.manual_seed(0)
    compute = compute or Compute(torch.device("cpu"), False)
    training = FlowTraining(FlowTrainee(vae.to(compute.device)), compute, recipe or FlowRecipe())
    if (work / STATE).exists():
        training.load(work / STATE)
    return training


def run_transformer(
    piece: Piece, recipe: FlowRecipe, limits: Limits, decay: int | None, report: Report, teacher: str | None = None
) -> None:
    """Train for one piece in ``piece.work``; saves its state there, and a sheet of samples now and then.

    Args:
        decay: samples over which the rate comes down, from now; None: not yet.
        teacher: a Stable Diffusion over the same autoencoder, whose expectations are targets too.
    """
    compute = choose(piece.device)
    bank = bank_of(piece, compute)
    renderer = DeviceRenderer(bank, compute)
    encode = partial(chat_ids, build_tokenizer())
    planner = Planner(bank.catalogue, encode, MIX, piece.batch, "transformer")
    vae = transformer_vae(piece.work, piece.pipeline, renderer, planner)
    training = saved_training(piece.work, recipe, compute)
    training.about |= {"batch": piece.batch}
    if teacher:
        training.teacher = FlowTeacher(load_base(teacher, str(compute.device)), training.trainee.denoiser)
        own = partial(token_ids, training.teacher.tokenizer)
        planner = replace(planner, encode=partial(joined_ids, (encode, own)))
        training.about |= {"teacher": VERSION if is_pocket(teacher) else Path(teacher).name}
    progress = training.progress
    progress.decay(decay)
    plans = Plans(planner, piece.workers, piece.reuse)
    source = DeviceSource(renderer, vae, plans, piece.reuse)
    report(f"transformer from step {progress.step}, {progress.samples} samples on {described(compute)}")
    try:
        train_and_draw(training, source, piece, limits, partial(transformer_sheet, training), report)
    finally:
        plans.close()


def joined_ids(encoders: Sequence[Callable[[list[str]], Tensor]], captions: list[str]) -> Tensor:
    """Token ids (n, lengths in all) of captions by several tokenizers, side by side."""
    return torch.cat([encode(captions) for encode in encoders], 1)


def transformer_sheet(training: FlowTraining, target: Path) -> None:
    """Write a grid of pictures of fixed prompts, 8 to a row."""
    pipeline = training.averaged().pipeline()
    images = [image for start in range(0, len(SHEET), 8) for image in transformer_pictures(pipeline, SHEET[start:][:8])]
    image_grid(images, 8, gap=0).save(target)


def export_saved(work: Path, folder: Path, average: int = 0) -> None:
    """Write the pipeline of a folder's state, and its sheet beside the weights."""
    training = saved_training(work)
    export_transformer(training, folder, average)
    transformer_sheet(training, folder / "samples.png")
