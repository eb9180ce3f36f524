"""Estimates of a training before it starts: trained numbers, time, memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import pocket
from ..config.train import TrainConfig
from .jobs import QueueJob
from .workspace import duration

if TYPE_CHECKING:
    from ..training.status import TrainingStatus

BUSY = 2.0  # how much longer a step may take than measured alone: other work, photos, the loss
ENOUGH = 100  # the fewest steps of a training used to predict others
SMALL = 50_000_000  # weights of a U-Net base below which it is like the pocket base


@dataclass(frozen=True)
class TrainingEstimate:
    """Two short texts, a sentence on their source, and the seconds that it takes at most, if that is known."""

    trained: str
    time: str
    note: str
    seconds: float | None = None


@dataclass(frozen=True)
class Shape:
    """The shape of a base without its weights: its architecture, whether that is guessed by name, and the (out, in)
    of the adapted weights."""

    arch: str
    guessed: bool
    sides: tuple[tuple[int, int], ...]


def estimate_training(config: TrainConfig, jobs: Iterable[QueueJob] = ()) -> TrainingEstimate:
    """The cost of a training, from the base's shape and the times of this workspace's trainings.

    Raises:
        UserError: the method cannot have that rank on this base.
    """
    from ..methods import get_method
    from ..training.slot_choice import with_rank

    shape = base_shape(config.base, config.target_modules)
    settled = with_rank(config, shape.sides)
    method = get_method(settled.method)
    trained = method.total(shape.sides, settled.rank)
    jobs = list(jobs)
    most: float | None
    if (now := present_pace(jobs, config)) is not None:
        most = now * config.steps
        time, note = duration(most), "The time is taken from the training that runs now."
    elif (known := seconds_per_step(jobs, config)) is not None:
        most = known * config.steps
        time, note = duration(most), "The time is taken from your last training on this base."
    elif shape.arch == "other":
        most = None
        time, note = "not known yet", "The time is known after the first training on this base."
    else:
        from ..training.speed import training_seconds

        seconds = training_seconds(config, shape.arch)
        most = BUSY * seconds
        time, note = span(seconds, most), "The time follows from a short measurement on this machine."
    if shape.guessed:
        note += " The base is not on this machine, so its size is taken from Stable Diffusion's."
    return TrainingEstimate(f"{trained:,}", time, note, most)


def memory_estimate(config: TrainConfig) -> tuple[str, str]:
    """The peak memory of a training, and a note; a large base takes some seconds to count.

    Raises:
        UserError: the targets match nothing.
    """
    from ..core.machine import parse_device
    from ..training.checkpoint import APART
    from ..training.memory import available, gib

    shape = base_shape(config.base, config.target_modules)
    if shape.arch == "pocket":
        return "about 0.8 GiB", ""
    device = parse_device(config.device)
    total = _counted(config.model_dump_json(exclude=set(APART)), device.type)
    free = available(device)
    fits = free is None or total <= free
    return f"about {gib(total)}", "" if fits else f" Only {gib(free or 0)} are free here: choose a smaller preset."


@lru_cache(maxsize=64)
def _counted(settings: str, device: str) -> int:
    """Bytes of a training with these settings (JSON without concept and output)."""
    from ..models.families import denoiser_of
    from ..models.loading import parse_dtype
    from ..training import memory

    config = TrainConfig(**{**json.loads(settings), "concept": "concept", "output": "output"})
    models, vae = _models(config.base)
    dtype = parse_dtype(config.dtype)
    size = config.resolution or denoiser_of(models, vae).size
    cast_models = {name: model.to(dtype) for name, model in models.items()}
    return memory.estimate(cast_models, vae.to(dtype), config, size, "cpu" if device == "cpu" else "cuda").total


def present_pace(jobs: Iterable[QueueJob], config: TrainConfig) -> float | None:
    """Seconds per step of the running training, if it has the same base and batch size."""
    for job in jobs:
        status = job.own_status
        if job.record.state == "running" and status and status.stage == "train" and status.eta and like(status, config):
            return status.eta / max(1, status.steps - status.step)
    return None


def like(status: TrainingStatus, config: TrainConfig) -> bool:
    """Whether a training has the same base and batch size."""
    return (status.config.get("base"), status.config.get("batch_size")) == (config.base, config.batch_size)


def seconds_per_step(jobs: Iterable[QueueJob], config: TrainConfig) -> float | None:
    """Seconds per step of the newest finished training with the same base and batch size, loading included.

    Short ones are skipped, since they mostly load.
    """
    for job in jobs:
        status = job.own_status
        if job.record.state != "done" or job.record.launches != 1 or status is None or job.steps_done < ENOUGH:
            continue
        if not like(status, config):
            continue
        try:
            took = datetime.fromisoformat(status.updated) - datetime.fromisoformat(status.started)
        except ValueError:
            continue
        return took.total_seconds() / job.steps_done
    return None


def span(low: float, high: float) -> str:
    """A range of seconds as text."""
    for unit, size in (("h", 3600), ("min", 60)):
        if high >= 2 * size:
            return f"{max(1, math.floor(low / size))} to {math.ceil(high / size)} {unit}"
    return f"{max(1, math.floor(low))} to {math.ceil(high)} s"


@lru_cache(maxsize=32)
def base_shape(base: str, targets: str) -> Shape:
    """The shape of a base from its configuration files; of one that is not on this machine, from its name.

    Raises:
        UserError: the targets match nothing.
    """
    from ..linalg import matrix_shape
    from ..models.targets import find_targets

    models, _ = _models(base)
    adapted = tuple(matrix_shape(layer.weight) for layer in find_targets(models, targets).values())
    weights = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    small, unet = weights < SMALL, "sdxl" if "text_encoder_2" in models else "sd15"
    arch = "other" if "unet" not in models else "pocket" if small else unet
    return Shape(arch, not _is_here(base), adapted)


def _is_here(base: str) -> bool:
    return pocket.is_pocket(base) or (Path(base) / "model_index.json").is_file()


def _models(base: str) -> tuple[dict[str, Any], Any]:
    """The networks that adapters change, and the autoencoder, on the meta device: shapes without weights."""
    from ..models.architectures import build_meta, build_vae_meta
    from ..models.families import hollow_networks

    folder = pocket.path(base) if pocket.is_pocket(base) else Path(base)
    if _is_here(base):
        return hollow_networks(folder)
    return build_meta("sdxl" if "xl" in folder.name.lower() else "sd15"), build_vae_meta()
