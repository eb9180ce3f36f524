"""The frozen tensors that a method's trained numbers are built on, per layer: bands, spectra, random matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.hooks import QUIET, Hooks
from ..linalg import SingularTriplets, flatten, matrix_shape
from ..methods.registry import Method
from ..slots.ledger import Slot
from ..svd_cache import compute, spectrum_of, triplets_of

Frozen = dict[str, dict[str, Tensor]]
STORED = {"columns": ("U", "S", "V", "D_U", "D_V", "c"), "full_svd": ("S",)}  # what goes into a file, by kind


def frozen_tensors(
    method: Method,
    weights: Mapping[str, Tensor],
    rank: int,
    slot: Slot | None,
    hooks: Hooks = QUIET,
    cached: bool = True,
) -> Frozen:
    """Layer to the method's frozen tensors, float32. The weight itself (``W``) is not among them: see ``with_weight``.

    Args:
        weights: layer to weight, (out, in) or (out, in, kh, kw).
        cached: whether spectra go through the disk cache.
    """
    if method.builds_on == "columns":
        assert slot is not None
        bands = triplets_of(weights, slot, hooks) if cached else _bands(weights, slot)
        return {layer: dict(band._asdict()) for layer, band in bands.items()}
    if method.builds_on == "full_svd":
        most = max(min(matrix_shape(weight)) for weight in weights.values())
        spectrum = spectrum_of(weights, most, hooks=hooks) if cached else compute(weights, most, hooks)
        return {layer: dict(band._asdict()) for layer, band in spectrum.bands.items()}
    if method.builds_on == "random":
        assert method.init_frozen is not None
        return {layer: method.init_frozen(*matrix_shape(weight), rank, slot) for layer, weight in weights.items()}
    return {layer: {} for layer in weights}


def _bands(weights: Mapping[str, Tensor], slot: Slot) -> dict[str, SingularTriplets]:
    return compute(weights, slot.bottom or slot.top, bottom=slot.bottom > 0).slot(slot.columns)


def hollow_tensors(method: Method, size: tuple[int, int], rank: int, slot: Slot | None) -> dict[str, Tensor]:
    """Tensors without numbers (on the meta device) in the shapes of a method's frozen ones, for a weight (out, in)."""
    if method.builds_on == "random":
        assert method.init_frozen is not None
        return {name: value.to("meta") for name, value in method.init_frozen(*size, rank, slot).items()}
    count = {"columns": rank, "full_svd": min(size)}.get(method.builds_on)
    if count is None:
        return {}
    shapes = {"U": (size[0], count), "S": (count,), "V": (size[1], count)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def with_weight(method: Method, frozen: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The frozen tensors of one layer and, where the method acts on it, the weight as a matrix ``W`` (out, in)."""
    return {**frozen, "W": flatten(weight.detach()).float()} if method.builds_on == "weight" else dict(frozen)


def stored_part(method: Method, frozen: Frozen) -> Frozen:
    """The part that a file must store; the rest is recomputed from sizes or from the base."""
    names = STORED.get(method.builds_on, ())
    kept = {layer: {n: t for n, t in tensors.items() if n in names} for layer, tensors in frozen.items()}
    return {layer: tensors for layer, tensors in kept.items() if tensors}
