"""Try a change of the pretraining's recipe against the plain one: same start, same pictures, same held-out losses."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectral_diffusion.core.files import write_json

from .base import Recipe, Training
from .batches import Batch, Mix, token_ids
from .compute import choose
from .device import DeviceRenderer, DeviceSource, Plans
from .loop import Limits, Report, train_piece
from .models import Trainee
from .muon import MuonAdamW
from .pieces import ARTWORK, STATE, Piece, bank_of, begin, described, vae_of
from .plan import Planner
from .sheet import export

AVERAGES = (30_000, 150_000, 5_000, 15_000, 60_000)  # samples that they look back; the first two as in a saved state
TIMESTEPS = (100, 300, 500, 700, 900)  # of the held-out losses
HELD_OUT = 4  # batches


@dataclass(frozen=True)
class Trial:
    """One change of the recipe."""

    recipe: dict[str, Any] = field(default_factory=dict)
    sizes: str = "narrow"
    muon: bool = False  # for the matrices; AdamW for everything else


TRIALS = {
    "plain": Trial(),
    "maps": Trial({"maps": 0.1}),
    "noisier": Trial({"timestep_power": 0.4}),
    "even": Trial({"timestep_power": 0.8}),
    "wide": Trial(sizes="wide"),
    "muon": Trial(muon=True),
}


@torch.no_grad()
def held_out_losses(training: Training, batches: Sequence[Batch], average: int | None) -> dict[str, float]:
    """The plain error of the predicted velocity by timestep, over all pixels and where things are.

    Args:
        average: which moving average is measured; None: the weights themselves.
    """
    trainee, compute = training.trainee, training.compute
    shown = Trainee(trainee.sizes, trainee.downscale).to(compute.device).requires_grad_(False)
    weights = trainee.state_dict() if average is None else training.averaged_weights(average)
    shown.load_state_dict(weights, strict=False)
    losses: dict[str, float] = {}
    for timestep in TIMESTEPS:
        alpha = training.alphas[timestep]
        total, inside = 0.0, 0.0
        for index, batch in enumerate(batches):
            generator = compute.generator(1000 * timestep + index)
            noise = torch.randn(batch.latents.shape, generator=generator, device=compute.device)
            noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.latents
            steps = torch.full((len(noise),), timestep, device=compute.device)
            with compute.autocast():
                error = (shown(noisy, steps, batch).float() - target).square()
            total += float(error.mean())
            inside += float((error * batch.where).sum() / batch.where.sum() / error.shape[1])
        losses[f"{timestep}"] = total / len(batches)
        losses[f"{timestep} things"] = inside / len(batches)
    return losses


def unsaved() -> None:
    """Save nothing: a trial is not resumed."""


def run_trial(name: str, work: Path, samples: int, every: int, report: Report) -> None:
    """Train with one change; writes its losses and its pipeline into ``work / "trials"``.

    Args:
        name: one of :data:`TRIALS`.
        work: folder with the state that every trial begins with.
        samples: how many the trial sees.
        every: samples between two measurements.
    """
    trial, folder = TRIALS[name], work / "trials" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (STATE, ARTWORK):
        shutil.copyfile(work / file, folder / file)
    recipe = Recipe(**trial.recipe, ema=AVERAGES)
    compute = choose("auto")
    piece = Piece(folder, sizes=trial.sizes, sheet_samples=0)
    training = begin(piece, compute, recipe)
    if trial.muon:
        training.optimizer = MuonAdamW(training, 1.0)
    training.progress.warmed = training.progress.samples
    first = training.progress.samples
    bank = bank_of(piece, compute)
    planner = Planner(bank.catalogue, partial(token_ids, training.trainee.tokenizer), Mix(), piece.batch)
    source = DeviceSource(DeviceRenderer(bank, compute), vae_of(work, compute), Plans(planner, 0, 2), 2)
    held_out = [source.batch(replace(planner, name="pocket2-validation")(step)) for step in range(HELD_OUT)]
    record: list[dict[str, Any]] = []
    begun = time.process_time()

    def measure() -> None:
        nonlocal begun
        row: dict[str, Any] = {"samples": training.progress.samples - first, "cpu_seconds": time.process_time() - begun}
        paused = time.process_time()
        row["weights"] = held_out_losses(training, held_out, None)
        for index, length in enumerate(AVERAGES):
            row[f"average {length}"] = held_out_losses(training, held_out, index)
        record.append(row)
        write_json(folder.with_suffix(".json"), {"trial": name, "device": described(compute), "rows": record})
        report(json.dumps({k: v for k, v in row.items() if not isinstance(v, dict)}))
        begun += time.process_time() - paused

    measure()
    for until in range(first + every, first + samples + every, every):
        train_piece(training, source, Limits(until_samples=min(until, first + samples)), unsaved, report)
        measure()
    export(training, vae_of(work), folder / "pipeline", AVERAGES.index(30_000))
