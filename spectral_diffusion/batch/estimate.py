"""What a training asks of a cluster, from computed memory and measured time."""

from __future__ import annotations

import math

from ..config.train import TrainConfig
from ..core.errors import UserError
from ..models.base import Base
from ..training.memory import estimate, is_large
from ..training.speed import training_seconds
from .job import Cluster

SMALL_GB = 4.0  # of main memory, for a small base with its libraries
LOADING_GB = 6.0  # of main memory beside the weights, where a GPU does the work
SPARE = 3.0  # a node may be slower than this machine, and loads the libraries from a shared disk
START_MINUTES = 10
UNKNOWN_MINUTES = 240  # where no measurement applies; a training that takes longer is started again and goes on


def needed(config: TrainConfig, base: Base | None) -> Cluster:
    """GPUs, main memory and minutes of one training.

    Args:
        base: the loaded base; None if nothing needed it yet, which leaves memory to the cluster.
    """
    if base is None:
        return Cluster(minutes=UNKNOWN_MINUTES)
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and is_large(base))
    if not is_large(base):
        measured = not on_gpu and "unet" in base.models  # a small transformer's step is not the pocket base's
        minutes = SPARE * training_seconds(config, "pocket") / 60 + START_MINUTES if measured else None
        return Cluster(memory_gb=SMALL_GB, minutes=rounded(minutes), gpus=int(on_gpu))
    weights = sum(p.numel() * p.element_size() for model in base.models.values() for p in model.parameters()) / 1e9
    if on_gpu:
        return Cluster(memory_gb=math.ceil(weights + LOADING_GB), minutes=UNKNOWN_MINUTES, gpus=1)
    models = base.stored.models if base.stored else base.models
    try:
        found = estimate(models, base.pipeline.vae, config, config.resolution or base.size, "cpu")
    except UserError:  # its own training reports it
        return Cluster(minutes=UNKNOWN_MINUTES)
    return Cluster(memory_gb=math.ceil(found.total / 1e9 + 1), minutes=UNKNOWN_MINUTES, gpus=0)


def rounded(minutes: float | None) -> int:
    """Whole minutes, in steps of five."""
    return UNKNOWN_MINUTES if minutes is None else 5 * math.ceil(minutes / 5)
