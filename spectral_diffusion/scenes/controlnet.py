"""Control images through a ControlNet, for families of models that have no T2I-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..config.scene import Box
from ..core.errors import Fix, UserError, only_a_pickle, reason
from ..core.files import check_not_disguised, is_folder
from ..models.base import Base
from ..models.loading import quiet_loading
from .region_mask import weight_map


def load_controlnet(base: Base, name: str | None) -> Any:
    """The named ControlNet, or the family's own, on the base's device.

    Args:
        name: a diffusers folder, a ``.safetensors`` file, a hub id, or a hub id with a file (user/repository/file).

    Raises:
        UserError: it cannot be loaded, or is for a network of another size.
    """
    family = base.family
    chosen = name or family.default_controlnet
    try:
        with quiet_loading():
            network = _load(family.controlnet_class, chosen, base.dtype)
    except UserError:
        raise
    except Exception as error:  # the loaders raise nearly everything
        if pickled := only_a_pickle(chosen, error):
            raise UserError(f"The ControlNet {pickled}") from error
        raise UserError(
            f"Cannot load the ControlNet '{chosen}' ({reason(error)}); name a diffusers folder, a .safetensors file or "
            "a hub id for this base with the condition's adapter."
        ) from error
    if wrong := family.misfit(network, base.denoiser.network):
        raise UserError(f"The ControlNet '{chosen}' is for another network: {wrong}.", Fix("controls", so="left empty"))
    return network.to(base.device).requires_grad_(False).eval()


def _load(kind: Any, name: str, dtype: torch.dtype) -> Any:
    """A ControlNet by the name of a folder, a file, a hub id or a file there."""
    path = Path(name)
    if path.suffix == ".safetensors":
        if not path.is_file():
            parts = name.split("/")
            if len(parts) != 3 or name.startswith((".", "/", "~")):
                raise UserError(f"No such file: {path}.")
            path = Path(hf_hub_download("/".join(parts[:2]), parts[2]))
        check_not_disguised(path)
        beside = path.with_suffix("")  # its config, for work without a network
        more = {"config": str(beside)} if (beside / "config.json").is_file() else {}
        return kind.from_single_file(str(path), torch_dtype=dtype, **more)
    for file in sorted(path.glob("*.safetensors")) if is_folder(path) else []:
        check_not_disguised(file)
    return kind.from_pretrained(name, torch_dtype=dtype, use_safetensors=True)


def weighing(
    weights: Sequence[float], areas: Sequence[Box | Tensor], grid: tuple[int, int]
) -> Callable[..., dict[int, Tensor]]:
    """A hook that multiplies what a ControlNet adds to image tokens by the regions' own weights, to text by their mean.

    Args:
        grid: height and width of the picture in tokens, which come before the text's.
    """

    def weigh(module: Any, inputs: Any, samples: dict[int, Tensor]) -> dict[int, Tensor]:
        factors = weight_map(weights, areas, *grid).flatten()
        out = {}
        for layer, sample in samples.items():
            factor = factors.mean().repeat(sample.shape[-2]).to(sample)
            factor[: len(factors)] = factors.to(sample)
            out[layer] = sample * factor[:, None]
        return out

    return weigh
