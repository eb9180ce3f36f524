"""The spectrum of a base: top singular triplets of every adapted weight, computed once, cached on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .core.cache import WAIT, cache_folder, cached, restored, store
from .core.files import parse_json
from .core.hooks import QUIET, Event, Hooks
from .linalg import SingularTriplets, bottom_band, flatten, gram_of, top_band
from .slots.ledger import Slot

CHUNK = 64  # columns are computed in multiples of this, so that the next slots are cached already
HASHED = 1 << 18  # numbers hashed at a time, which fit into a processor's cache
KEEP_EVERY = 20.0  # seconds between saves of an unfinished spectrum


@dataclass(frozen=True)
class Spectrum:
    """Layer name to its top columns, or to its bottom ones (float32)."""

    bands: dict[str, SingularTriplets]

    def slot(self, columns: Sequence[int]) -> dict[str, SingularTriplets]:
        """These columns of every layer, negative ones counted from the bottom."""
        return {name: band.select(columns) for name, band in self.bands.items()}

    def smallest_gap(self, columns: Sequence[int]) -> tuple[float, str]:
        """The smallest relative gap of singular values at the edges of these top columns, and its layer.

        Where it is tiny another machine may mix the columns next to the border.
        """
        inside, smallest, where = set(columns), 1.0, ""
        for name, band in self.bands.items():
            for column in columns:
                for other in (column - 1, column + 1):
                    if other in inside or not 0 <= other < len(band.S) or column < 0:
                        continue
                    gap = float((band.S[column] - band.S[other]).abs() / band.S[column].clamp_min(1e-30))
                    if gap < smallest:
                        smallest, where = gap, name
        return smallest, where


def capacity(sizes: Mapping[str, tuple[int, int]]) -> tuple[int, str]:
    """How many columns weights of these sizes (out, in) all have, and the name of the narrowest one."""
    narrowest = min(sizes, key=lambda name: min(sizes[name]))
    return min(sizes[narrowest]), narrowest


def hash_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """A hash of a weight's values as ``dtype``."""
    return hash_rounded(weight, [dtype])[0]


def hash_rounded(weight: Tensor, dtypes: Sequence[torch.dtype]) -> list[str]:
    """A hash of a weight's values as each of these dtypes, all in one pass over it."""
    flat = weight.detach().contiguous().view(-1)
    digests = [hashlib.sha256(str(tuple(weight.shape)).encode()) for _ in dtypes]
    for part in flat.split(HASHED):
        values = part.to("cpu", torch.float32)
        for digest, dtype in zip(digests, dtypes, strict=True):
            digest.update(values.to(dtype).view(torch.uint8).numpy().data)
    return [digest.hexdigest()[:32] for digest in digests]


def compute(
    weights: Mapping[str, Tensor],
    columns: int,
    hooks: Hooks = QUIET,
    bottom: bool = False,
    known: Mapping[str, SingularTriplets] | None = None,
    keep: Callable[[Mapping[str, SingularTriplets]], object] = lambda bands: None,
) -> Spectrum:
    """The top (or bottom) ``columns`` of every weight (all of them where it is narrower), on the weight's device.

    Args:
        known: layers that are done already.
        keep: called now and then with what is done, so that an interrupted computation can go on from there.
    """
    bands = dict(known or {})
    left = [name for name in weights if name not in bands]  # names: of a large base not all weights are in memory
    kept = time.monotonic()
    for name, weight, gram in with_grams(weights, left, skip=bottom):
        count = min(columns, *flatten(weight).shape)
        band = bottom_band(weight, count) if bottom else top_band(weight, count, gram)
        bands[name] = SingularTriplets(*(t.float().cpu() for t in band))
        hooks.progress(Event("spectrum", len(bands), len(weights), {"layer": name}))
        if time.monotonic() - kept > KEEP_EVERY and len(bands) < len(weights):
            keep(bands)
            kept = time.monotonic()
    return Spectrum({name: bands[name] for name in weights})


def with_grams(
    weights: Mapping[str, Tensor], names: Sequence[str], skip: bool = False
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """These weights with their Gram matrices; a thread computes the next one while the eigensolver is busy.

    The eigensolver holds Python's lock and gains nothing from a second core; this is what that core is for.
    """
    if skip:
        yield from ((name, weights[name], None) for name in names)
        return
    if not names:
        return
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(gram_of, weights[names[0]])
        for index, name in enumerate(names):
            gram = coming.result()
            if index + 1 < len(names):
                coming = ahead.submit(gram_of, weights[names[index + 1]])
            yield name, weights[name], gram


def triplets_of(weights: Mapping[str, Tensor], slot: Slot, hooks: Hooks = QUIET) -> dict[str, SingularTriplets]:
    """Every weight's band in a slot, from the cache if present."""
    bottom = slot.bottom > 0  # a slot never mixes both ends
    return spectrum_of(weights, slot.bottom or slot.top, bottom=bottom, hooks=hooks).slot(slot.columns)


def spectrum_of(
    weights: Mapping[str, Tensor],
    columns: int,
    folder: Path | None = None,
    hooks: Hooks = QUIET,
    bottom: bool = False,
) -> Spectrum:
    """The spectrum with at least ``columns`` columns of one end, from the cache if present.

    One file per set of weights; a second process waits for the first instead of computing again, and an interrupted
    computation goes on where it was last kept. A cache that cannot be written or read only costs the time to compute.
    """
    columns = -(-columns // CHUNK) * CHUNK
    hashes, sizes = [], {}
    for layer, weight in weights.items():  # once: those of a large base are read from its files
        hashes.append(f"{layer}={hash_weight(weight)}")
        sizes[layer] = flatten(weight).shape
    key = hashlib.sha256("|".join(hashes).encode())
    name = f"{key.hexdigest()[:32]}-{'bottom' if bottom else ''}{columns}.safetensors"
    path = (folder or cache_folder() / "spectra") / name
    unfinished = path.with_name(f"{path.stem}.unfinished.safetensors")

    def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, SingularTriplets]:
        bands = {}
        for name in parse_json(metadata["done"]):
            band = SingularTriplets(*(tensors[f"{name}.{part}"] for part in SingularTriplets._fields))
            out, width = sizes[name]
            count = min(columns, out, width)
            if [part.shape for part in band] != [(out, count), (count,), (width, count)]:
                raise ValueError(f"The columns of {name} are of another shape.")
            bands[name] = band
        return bands

    def make() -> dict[str, SingularTriplets]:
        known = restored(unfinished, unpack)
        return compute(weights, columns, hooks, bottom, known, lambda bands: store(unfinished, *_packed(bands))).bands

    bands_by_layer = cached(path, make, _packed, unpack, WAIT)
    with suppress(OSError):
        if path.exists():
            unfinished.unlink(missing_ok=True)
    return Spectrum(bands_by_layer)


def _packed(bands: Mapping[str, SingularTriplets]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {f"{name}.{part}": value for name, band in bands.items() for part, value in band._asdict().items()}
    return tensors, {"done": json.dumps(list(bands))}
