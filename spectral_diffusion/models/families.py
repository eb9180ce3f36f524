"""Which family a loaded pipeline belongs to."""

from __future__ import annotations

from typing import Any

from .denoiser import Denoiser
from .flux2 import Flux2KleinDenoiser
from .sd import SDDenoiser
from .sdxl import SDXLDenoiser
from .z_image import ZImageDenoiser

FAMILIES: tuple[type[Denoiser], ...] = (SDDenoiser, SDXLDenoiser, Flux2KleinDenoiser, ZImageDenoiser)


def family_of(pipeline: Any) -> type[Denoiser] | None:
    """The family whose pipeline this is; None if there is none."""
    return next((family for family in FAMILIES if isinstance(pipeline, family.pipeline_class)), None)
