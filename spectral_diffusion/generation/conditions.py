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


def load_t2i_adapter(base: Base, name: str | None) -> T2IAdapter:
    """The named T2I-Adapter (folder or hub id), or the one that belongs to the base.

    Raises:
        UserError: it cannot be loaded.
    """
    if name is None:
        recipe = read_recipe(Path(base.name)) if Path(base.name).is_dir() else None
        root = recipe["base"] if recipe else base.name
        name = str(pocket.t2i_sketch()) if root == "pocket" else SKETCH_SD15
    try:
        with quiet():
            adapter = T2IAdapter.from_pretrained(name, torch_dtype=base.dtype, use_safetensors=True)
    except Exception as error:
        raise UserError(
            f"Cannot load the T2I-Adapter '{name}' ({reason(error)}); name one for this base with t2i_adapter=."
        ) from error
    return adapter.to(base.device).eval()
