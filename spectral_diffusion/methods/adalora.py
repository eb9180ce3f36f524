"""AdaLoRA (Zhang et al. 2023), trained through PEFT with its rank allocator and its orthogonality penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import Factors
from .registry import Method, Peft, Shapes, Tensors, register_method

PENALTY = 0.5  # PEFT's orth_reg_weight


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (r, in) and B (out, r), random at the start, and their singular values E (r, 1), zero at the start."""
    return {"A": (rank, in_features), "B": (out_features, rank), "E": (rank, 1)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = B diag(E) A. PEFT divides alpha = r by r + 1e-5."""
    rank = len(parameters["E"])
    return Factors(parameters["B"], parameters["A"] * parameters["E"] * (rank / (rank + 1e-5)))


def penalty(parameters: Tensors) -> Tensor:
    """½ of the mean of |AAᵀ − I| and |BᵀB − I|, as AdaLoRA keeps both sides orthogonal."""
    A, B = parameters["A"], parameters["B"]
    eye = torch.eye(len(A), device=A.device)
    return PENALTY * ((A @ A.mT - eye).norm() + (B.mT @ B - eye).norm()) / 2


def options(rank: int, steps: int) -> dict[str, Any]:
    """Start at ``rank`` and end at half of it: warm-up for a tenth of the steps, the last three tenths fixed."""
    return {
        "init_r": rank, "target_r": max(1, rank // 2), "lora_alpha": rank, "total_step": max(steps, 2),
        "tinit": steps // 10, "tfinal": steps * 3 // 10, "deltaT": max(1, steps // 100),
    }  # fmt: skip


class RankSchedule:
    """AdaLoRA's schedule on one network: singular values are removed by their importance (PEFT's ``RankAllocator``).

    Args:
        config: PEFT's, with ``total_step``, ``tinit``, ``tfinal``.
        name: the adapter's name in PEFT.
    """

    AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's, by parameter

    def __init__(self, network: nn.Module, config: Any, name: str) -> None:
        from peft.tuners.adalora import RankAllocator

        self.network, self.config, self.name = network, config, name
        self.allocator = RankAllocator(network, config, name)

    def after_step(self, step: int) -> None:
        """Score all parameters, and remove singular values; those of the last phase stay removed."""
        last = self.config.total_step - self.config.tfinal
        for name, parameter in self.network.named_parameters():
            if self.name not in name or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a layer that nothing went through scores nothing
            # A float16 step that overflowed was skipped; in the averages its NaN would stay for good.
            torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
        if step < last:
            self.allocator.update_and_allocate(self.network, step)
        elif step == last:
            self.config.rank_pattern = self.allocator.update_and_allocate(self.network, step, force_mask=True)[1]
        else:
            self.prune()

    def prune(self) -> None:
        """Remove again what was removed for good."""
        if self.config.rank_pattern:
            self.allocator.mask_using_rank_pattern(self.network, self.config.rank_pattern)

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """The allocator's averages, ``average|parameter``, and which singular values stay."""
        averages = {f"{kind}|{name}": t for kind in self.AVERAGES for name, t in getattr(self.allocator, kind).items()}
        return averages, self.config.rank_pattern

    def load_state(self, tensors: Tensors, pattern: Any) -> None:
        """Take the state back."""
        device = next(self.network.parameters()).device
        self.config.rank_pattern = pattern
        for key, value in tensors.items():
            kind, name = key.split("|", 1)
            getattr(self.allocator, kind)[name] = value.to(device, copy=True)


METHOD = register_method(
    Method(
        name="adalora",
        summary="AdaLoRA (Zhang et al. 2023) through PEFT: singular values that a schedule takes away",
        shapes=shapes,
        factors=factors,
        penalty=penalty,
        lr_scale=3.0,
        ranks=lambda sides: range(2, min(min(side) for side in sides) + 1),  # it ends at half
        peft=Peft("ADALORA", options, {"A": "lora_A", "B": "lora_B", "E": "lora_E"}, schedule=RankSchedule),
    )
)
