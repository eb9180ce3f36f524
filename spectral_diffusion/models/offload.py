"""Networks that stay in main memory and come to the GPU layer by layer, by diffusers' group offloading."""

from __future__ import annotations

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

MARK = "_spectral_offloaded"


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a network on the CPU; from now on each layer is on ``device`` only while it computes.

    Single layers, not blocks: adapters that are attached later stay where they compute.
    """
    if is_offloaded(module):
        return
    module.to("cpu")
    # Without streams: their order of loading is that of the forward pass, which recomputation does not keep.
    apply_group_offloading(module, onload_device=device, offload_device="cpu", offload_type="leaf_level")
    setattr(module, MARK, True)


def is_offloaded(module: nn.Module) -> bool:
    """Whether :func:`offload` was called for it."""
    return bool(getattr(module, MARK, False))
