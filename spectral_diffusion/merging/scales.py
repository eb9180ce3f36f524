"""Strengths of adapters in a fusion: λ by concept, and by component of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..adapters.adapter import Adapter
from ..config.fuse import MergeConfig


def owner(key: str, names: Iterable[str]) -> tuple[str, str]:
    """``rex`` or ``rex.unet`` as (name, component); a name may hold dots itself."""
    if key in names:
        return key, ""
    name, _, component = key.rpartition(".")
    return (name, component) if name else (key, "")


def scale_of(strength: Mapping[str, float], name: str, layer: str) -> float:
    """λ of one adapter in one layer: its own, times that of the layer's component if there is one."""
    return strength.get(name, 1.0) * strength.get(f"{name}.{layer.split('.', 1)[0]}", 1.0)


def scales_of(config: MergeConfig, adapters: Iterable[Adapter]) -> dict[str, dict[str, float]]:
    """λ of every adapter by component."""
    components = {layer.split(".", 1)[0] for adapter in adapters for layer in adapter.layers}
    return {a.name: {part: scale_of(config.scales, a.name, f"{part}.") for part in components} for a in adapters}
