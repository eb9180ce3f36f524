"""Which device merges which layer: GPUs share the layers as far as they have room, and the CPU takes the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..core.machine import CPU
from ..models.base import Base
from ..training.memory import available

SHARE = 0.8  # of the free memory that may be taken by what layers see
SHARE_BESIDE = 0.5  # where the base generates at the same time

Homes = dict[str, torch.device]  # of layers by name


def rooms(base: Base) -> dict[torch.device, int | None]:
    """The bytes that layers may take on each device, the CPU last; None where that is unknown.

    Without a base on CUDA that is the CPU alone: other GPUs have no float64.
    """
    found: dict[torch.device, int | None] = {}
    if base.device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            share = SHARE_BESIDE if index == (base.device.index or 0) else SHARE
            found[device] = round(share * (available(device) or 0))
    free = available(CPU)
    return {**found, CPU: None if free is None else round(SHARE * free)}


def placed(needs: Mapping[str, int], room: Mapping[torch.device, int | None]) -> list[Homes] | None:
    """Every layer's device, in groups that fit one after the other; None if a single layer fits nowhere.

    Args:
        needs: the bytes of every layer, in their order.
    """
    whole = {device: math.inf if free is None else float(free) for device, free in room.items()}
    groups: list[Homes] = []
    used: dict[torch.device, int] = {}
    for layer, need in needs.items():
        device = _roomiest(need, whole, used) if groups else None
        if device is None:
            groups.append({})
            used = dict.fromkeys(whole, 0)
            device = _roomiest(need, whole, used)
            if device is None:
                return None
        groups[-1][layer] = device
        used[device] += need
    return groups


def _roomiest(need: int, whole: Mapping[torch.device, float], used: Mapping[torch.device, int]) -> torch.device | None:
    """Of the GPUs with enough room the one that is the least full for its size, so that all work; else the CPU."""
    enough = [device for device, room in whole.items() if used[device] + need <= room]
    return min(enough, key=lambda device: (device.type == "cpu", used[device] / whole[device]), default=None)
