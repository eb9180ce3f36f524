"""The start of a training: learning rate factors of a slot, and the hash of an adapter that is continued."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.formats.native import content_hash
from ..adapters.frozen import Frozen
from ..config.train import TrainConfig
from ..svd_cache import spectrum_of


def slot_lr_scaling(
    weights: Mapping[str, Tensor], frozen: Frozen, config: TrainConfig
) -> tuple[dict[str, Tensor] | None, dict[str, float]]:
    """How the settings compensate for a slot's smaller singular values.

    Returns the columns' scales s_max / S_b (r,) per layer for ``normalize``, else None, and per layer the factor
    (s_max / mean S_b) ^ ``slot_lr_power`` of the learning rate. s_max is the weight's largest singular value.
    """
    if not (config.normalize or config.slot_lr_power):
        return None, {}
    largest = {layer: band.S[0] for layer, band in spectrum_of(weights, 1).bands.items()}
    columns = {layer: largest[layer] / tensors["S"] for layer, tensors in frozen.items()} if config.normalize else None
    return columns, {
        layer: float((largest[layer] / tensors["S"].mean()) ** config.slot_lr_power)
        for layer, tensors in frozen.items()
    }


def start_hash(adapter: Adapter | None) -> str:
    """Which adapter training goes on from."""
    return content_hash(adapter) if adapter else ""
