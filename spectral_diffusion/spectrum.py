"""The spectrum of a base: top singular triplets of every adapted weight, computed once, cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from .errors import UserError
from .files import read_tensors, write_tensors
from .linalg import Band, flatten, top_band
from .progress import Event, Progress, silent

CHUNK = 64  # columns are computed in multiples of this, so that the next slots are there already


@dataclass(frozen=True)
class Spectrum:
    """Layer name to its top columns (float32)."""

    bands: dict[str, Band]

    def slot(self, start: int, stop: int) -> dict[str, Band]:
        """The columns ``start … stop − 1`` of every layer."""
        return {name: band.columns(start, stop) for name, band in self.bands.items()}


def cache_folder() -> Path:
    """``$SPECTRAL_DIFFUSION_CACHE``, or ``spectral_diffusion`` under the user's cache folder."""
    own = os.environ.get("SPECTRAL_DIFFUSION_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral_diffusion"


def capacity(weights: Mapping[str, Tensor]) -> tuple[int, str]:
    """How many columns every weight has, and the name of the narrowest one."""
    sizes = {name: min(flatten(weight).shape) for name, weight in weights.items()}
    narrowest = min(sizes, key=lambda name: sizes[name])
    return sizes[narrowest], narrowest


def hash_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """A hash of a weight's values as ``dtype``."""
    data = weight.detach().to("cpu", torch.float32).to(dtype).contiguous()
    digest = hashlib.sha256(str(tuple(data.shape)).encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def compute(weights: Mapping[str, Tensor], columns: int, progress: Progress = silent) -> Spectrum:
    """The top ``columns`` of every weight (all of them where it is narrower)."""
    bands = {}
    for index, (name, weight) in enumerate(weights.items(), 1):
        bands[name] = Band(*(t.float() for t in top_band(weight, min(columns, *flatten(weight).shape))))
        progress(Event("spectrum", index, len(weights), {"layer": name}))
    return Spectrum(bands)


def spectrum_of(
    weights: Mapping[str, Tensor], columns: int, folder: Path | None = None, progress: Progress = silent
) -> Spectrum:
    """The spectrum with at least ``columns`` columns, from the cache if it is there.

    One file per set of weights; a second process waits for the first instead of computing again. A cache
    that cannot be written or read only costs the time to compute.
    """
    columns = -(-columns // CHUNK) * CHUNK
    key = hashlib.sha256("|".join(f"{n}={hash_weight(w)}" for n, w in weights.items()).encode())
    path = (folder or cache_folder() / "spectra") / f"{key.hexdigest()[:32]}-{columns}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                try:
                    return _read(path, weights, columns)
                except (UserError, KeyError):
                    pass  # a damaged cache is computed again
            spectrum = compute(weights, columns, progress)
            write_tensors(
                path,
                {f"{name}.{part}": t for name, band in spectrum.bands.items() for part, t in band._asdict().items()},
            )
            return spectrum
    except (OSError, UserError):
        return compute(weights, columns, progress)


def _read(path: Path, weights: Mapping[str, Tensor], columns: int) -> Spectrum:
    tensors, _ = read_tensors(path)
    bands = {name: Band(*(tensors[f"{name}.{part}"] for part in Band._fields)) for name in weights}
    for name, band in bands.items():
        out, width = flatten(weights[name]).shape
        count = min(columns, out, width)
        if band.U.shape != (out, count) or band.S.shape != (count,) or band.V.shape != (width, count):
            raise KeyError(name)
    return Spectrum(bands)
