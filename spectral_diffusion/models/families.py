"""Which family a loaded pipeline belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from ..core.errors import UserError
from .denoiser import Denoiser
from .flux2 import Flux2KleinDenoiser
from .krea2 import Krea2Denoiser
from .qwen_image21 import QwenImage21Denoiser
from .sd import SDDenoiser
from .sdxl import SDXLDenoiser
from .z_image import ZImageDenoiser

FAMILIES: tuple[type[Denoiser], ...] = (
    SDDenoiser, SDXLDenoiser, Flux2KleinDenoiser, ZImageDenoiser, Krea2Denoiser, QwenImage21Denoiser,
)  # fmt: skip


def family_of(pipeline: Any) -> type[Denoiser] | None:
    """The family whose pipeline this is; None if there is none."""
    return next((family for family in FAMILIES if isinstance(pipeline, family.pipeline_class)), None)


def family_named(name: str) -> type[Denoiser] | None:
    """The family whose pipeline's class is called so; None if there is none."""
    return next((family for family in FAMILIES if family.pipeline_class.__name__ == name), None)


def family_titles() -> str:
    """The families' names in a row."""
    return ", ".join(family.title for family in FAMILIES)


def denoiser_of(models: Mapping[str, nn.Module], vae: nn.Module) -> Denoiser:
    """The denoiser of bare networks, by component; it predicts, but neither encodes texts nor samples."""
    for family in FAMILIES:
        network: Any = models.get(family.network_name)
        if isinstance(network, family.network_class) and set(models) == {*family.encoders, family.network_name}:
            return family(models, vae, next(network.parameters()).dtype)
    raise ValueError(f"no family has the networks {', '.join(models)}")


def hollow_networks(folder: Path) -> tuple[dict[str, nn.Module], Any]:
    """The networks that adapters change, and the autoencoder, of a diffusers folder, on the meta device by its configs.

    Raises:
        UserError: the pipeline of the folder belongs to no family.
    """
    index = DiffusionPipeline.load_config(str(folder))
    family = family_named(index["_class_name"])
    if family is None:
        raise UserError(f"{folder} is a {index['_class_name']}; these families can be used: {family_titles()}.")
    networks: dict[str, Any] = {}
    with torch.device("meta"):
        for name in family.encoders:
            kind = getattr(transformers, index[name][1])
            networks[name] = kind(kind.config_class.from_pretrained(str(folder / name)))
        config = family.network_class.load_config(str(folder / family.network_name))
        networks[family.network_name] = family.network_class.from_config(config)
        kind = getattr(diffusers, index["vae"][1])
        vae = kind.from_config(kind.load_config(str(folder / "vae")))
    family.prepare(SimpleNamespace(**networks, vae=vae))
    return networks, vae
