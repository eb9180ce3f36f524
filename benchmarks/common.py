"""What the benchmarks share."""

from __future__ import annotations

import torch
from torch import nn

from spectral_diffusion.adapters.attach import AdapterSpec, InjectedAdapter, inject_adapter
from spectral_diffusion.adapters.frozen import frozen_tensors
from spectral_diffusion.linalg import matrix_shape
from spectral_diffusion.methods import get_method
from spectral_diffusion.models.targets import find_targets
from spectral_diffusion.slots.ledger import Slot
from spectral_diffusion.studies.cost import saved_bytes

__all__ = ["RANK", "put", "saved_bytes"]
RANK = 8


def put(name: str, models: dict[str, nn.Module], targets: str, rank: int = RANK) -> InjectedAdapter:
    """A method on models, its parameters a little off zero. Bands are random: the cost does not depend on which."""
    method = get_method(name)
    weights = {layer: module.weight.detach() for layer, module in find_targets(models, targets).items()}
    allowed = method.ranks([matrix_shape(weight) for weight in weights.values()])
    rank = rank if rank in allowed else allowed[0]
    if method.builds_on == "columns":
        frozen = {
            layer: {
                "U": torch.linalg.qr(torch.randn(len(w), rank)).Q,
                "S": torch.ones(rank),
                "V": torch.linalg.qr(torch.randn(w.shape[1], rank)).Q,
            }
            for layer, w in weights.items()
        }
    else:
        slot = Slot.interval(0, rank) if method.slot else None
        frozen = frozen_tensors(method, {layer: w.float() for layer, w in weights.items()}, rank, slot)
    injected = inject_adapter(models, AdapterSpec(method, rank, targets, steps=100), frozen=frozen)
    with torch.no_grad():
        for _, parameter in injected.named_parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return injected
