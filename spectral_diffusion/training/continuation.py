"""Where training starts from: the columns of an adapter that is continued, and what makes up for small ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.formats.native import content_hash
from ..adapters.frozen import Frozen
from ..config.train import TrainConfig
from ..methods.spectral_rotation import PREPARED_ON, prepare
from ..svd_cache import spectrum_of


def continued_triplets(adapter: Adapter) -> Frozen:
    """An adapter's band with the rotations it has learnt as the new start: U R_U and V R_V are orthonormal again.

    The new start's D = R − I is composed with what the new training adds; no decomposition is made.
    """
    out: Frozen = {}
    for layer in adapter.layers:
        held = adapter.frozen_of(layer)
        turned = prepare(adapter.parameters_of(layer), held)
        out[layer] = {**held, **{name: value for name, value in turned.items() if name in PREPARED_ON}}
    return out


def slot_lr_scaling(
    weights: Mapping[str, Tensor], frozen: Frozen, config: TrainConfig
) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
    """How a slot's smaller singular values are made up for, as the settings ask.

    Returns the columns' scales s_max / S_b (r,) per layer for ``normalise``, else None, and per layer the factor
    (s_max / mean S_b) ^ ``slot_rate`` of the learning rate. s_max is the weight's largest singular value.
    """
    if not (config.normalize or config.slot_lr_power):
        return None, {}
    largest = {layer: band.S[0] for layer, band in spectrum_of(weights, 1).bands.items()}
    columns = {layer: largest[layer] / held["S"] for layer, held in frozen.items()} if config.normalize else None
    return columns, {
        layer: float((largest[layer] / held["S"].mean()) ** config.slot_lr_power) for layer, held in frozen.items()
    }


def start_hash(adapter: Adapter | None) -> str:
    """Which adapter training goes on from."""
    return content_hash(adapter) if adapter else ""
