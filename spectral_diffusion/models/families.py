"""Which family a loaded pipeline, or a set of networks, belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .denoiser import Denoiser
from .sd import SDDenoiser
from .sdxl import SDXLDenoiser

FAMILIES: tuple[type[SDDenoiser], ...] = (SDDenoiser, SDXLDenoiser)


def family_of(pipeline: Any) -> type[Denoiser] | None:
    """The family whose pipeline this is; None if there is none."""
    return next((family for family in FAMILIES if isinstance(pipeline, family.pipeline_class)), None)


def denoiser_of_models(models: Mapping[str, nn.Module], vae: nn.Module, dtype: torch.dtype) -> Denoiser:
    """A denoiser of bare networks, which predicts but neither samples nor encodes text."""
    return (SDXLDenoiser if "text_encoder_2" in models else SDDenoiser)(models, vae, dtype)
