"""Encoded crops on disk, keyed by everything that decides them. A damaged file is made again, an old one goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import PIL
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..core.cache import cache_folder, cached
from ..core.errors import UserError
from ..models.vae import overflows
from ..svd_cache import hash_weight
from .crops import Crop
from .folder import Photo

FORMAT = 1
MOST = 2 * 2**30  # bytes that a cache folder may hold

Encoded = tuple[Tensor, Tensor | None]  # of one photo: latents (crops, c, h, w), masks (crops, 1, h, w)


def encoder_hash(vae: AutoencoderKL) -> str:
    """One hash of everything in a VAE that decides latents, its precision and device kind included."""
    weights = {name: weight for name, weight in vae.named_parameters() if not name.startswith(("decoder", "post_"))}
    lines = [f"{name}={hash_weight(weight)}" for name, weight in sorted(weights.items())]
    first = next(iter(weights.values()))
    lines += ["in float32"] if overflows(vae) else []
    lines += [str(first.dtype), first.device.type, torch.__version__, PIL.__version__]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def key_of(photo: Photo, masked: bool, crops: list[Crop], encoder: str) -> str:
    """The cache key of a photo's encoded crops: its bytes, its mask's, the position of each crop, and the encoder.

    Raises:
        UserError: a file is gone.
    """
    try:
        files = [photo.path.read_bytes(), photo.mask.read_bytes() if masked and photo.mask else b""]
    except OSError as error:
        raise UserError(f"{photo.path} or its mask can no longer be read: {error.strerror or error}.") from error
    parts = [hashlib.sha256(data).hexdigest() for data in files]
    whole = [FORMAT, *parts, masked, masked and photo.mask == photo.path, crops, encoder]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def cached_latents(folder: Path | None, key: str, make: Callable[[], Encoded]) -> Encoded:
    """The encoded crops under ``key`` on the CPU, made and kept if they are not there whole.

    A cache that cannot be written only costs the time to encode.
    """
    path = (folder or cache_folder() / "latents") / f"{key[:40]}.safetensors"

    def pack(encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {part: of for part, of in zip(("latents", "masks"), encoded) if of is not None}, {"key": key}

    def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Encoded:
        if metadata["key"] != key:
            raise ValueError("a file of another key")
        return tensors["latents"], tensors.get("masks")

    latents, masks = cached(path, make, pack, unpack, max_bytes=MOST)
    return latents.cpu(), None if masks is None else masks.cpu()
