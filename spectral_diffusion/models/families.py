"""Which family a loaded pipeline belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .denoiser import Denoiser
from .flux2 import Flux2KleinDenoiser
from .sd import SDDenoiser
from .sdxl import SDXLDenoiser
from .z_image import ZImageDenoiser

FAMILIES: tuple[type[Denoiser], ...] = (SDDenoiser, SDXLDenoiser, Flux2KleinDenoiser, ZImageDenoiser)


def family_of(pipeline: Any) -> type[Denoiser] | None:
    """The family whose pipeline this is; None if there is none."""
    return next((family for family in FAMILIES if isinstance(pipeline, family.pipeline_class)), None)


def denoiser_of(models: Mapping[str, nn.Module], vae: nn.Module) -> Denoiser:
    """The denoiser of bare networks, by component; it predicts, but neither encodes texts nor samples."""
    for family in FAMILIES:
        network: Any = models.get(family.network_name)
        if isinstance(network, family.network_class) and set(models) == {*family.encoders, family.network_name}:
            return family(models, vae, next(network.parameters()).dtype)
    raise ValueError(f"no family has the networks {', '.join(models)}")
