"""The Riemannian preconditioner of LoRA's gradients (Zhang & Pilanci 2024, arXiv:2402.02347), PEFT's implementation.

Before every step the gradients become g_A ← (BᵀB + ε I)⁻¹ g_A and g_B ← g_B (A Aᵀ + ε I)⁻¹.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from ..adapters.attach import InjectedAdapter

Groups = list[dict[str, Any]]


def preconditioned(
    kind: type[torch.optim.Optimizer], groups: Groups, injected: InjectedAdapter, damping: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of these groups that preconditions the factors of Linear layers; convolutions stay as they are.

    Args:
        kind: the optimizer's class.
        damping: ε.
        options: of the optimizer.
    """

    class Grouped(kind):  # type: ignore[misc, valid-type]
        """PEFT hands over one list of parameters; ours have rates and weight decay of their own."""

        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(groups, lr=lr, **options)

    layers = nn.ModuleList(injected.layers.values())  # PEFT finds pairs by the names lora_A and lora_B
    return create_riemannian_optimizer(layers, Grouped, lr=1.0, reg=damping)
