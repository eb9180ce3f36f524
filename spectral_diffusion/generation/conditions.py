"""Conditions: a sketch, white on black, that a T2I-Adapter turns into feature maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from diffusers import T2IAdapter
from PIL import Image

from .. import pocket
from ..base import Base, quiet
from ..data.folder import open_photo
from ..errors import UserError, reason
from ..fusion.recipe import read_recipe

SKETCH_SD15 = "TencentARC/t2iadapter_sketch_sd15v2"


def read_sketch(path: Path) -> Image.Image:
    """A drawing as L, white strokes on black; black on white is turned round."""
    return clean_sketch(open_photo(path))


def clean_sketch(image: Image.Image) -> Image.Image:
    """White strokes on black, whichever way round the drawing came."""
    gray = image.convert("L")
    if float(np.asarray(gray).mean()) > 127:
        gray = Image.eval(gray, lambda value: 255 - value)
    return gray


def own_sketch_adapter(base: str) -> str:
    """The sketch adapter that belongs to a base: one inside its folder, the fused base's, or SD 1.5's."""
    for _ in range(8):  # a fusion of a fusion of …
        if base == "pocket":
            return str(pocket.t2i_sketch())
        if (inside := Path(base) / "t2i_sketch").is_dir():
            return str(inside)
        recipe = read_recipe(Path(base)) if Path(base).is_dir() else None
        if recipe is None:
            break
        base = str(recipe["base"])
    return SKETCH_SD15


def load_t2i_adapter(base: Base, name: str | None) -> T2IAdapter:
    """The named T2I-Adapter (folder or hub id), or the one that belongs to the base.

    Raises:
        UserError: it cannot be loaded.
    """
    name = name or own_sketch_adapter(base.name)
    try:
        with quiet():
            adapter = T2IAdapter.from_pretrained(name, torch_dtype=base.dtype, use_safetensors=True)
    except Exception as error:
        raise UserError(
            f"Cannot load the T2I-Adapter '{name}' ({reason(error)}); name one for this base with t2i_adapter=."
        ) from error
    return adapter.to(base.device).eval()
