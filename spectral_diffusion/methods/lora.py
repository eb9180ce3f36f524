"""LoRA (Hu et al. 2021), trained through PEFT: the yardstick of every other method."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors, flatten
from .registry import Method, Peft, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (r, in), random at the start; B (out, r), zero at the start."""
    return {"A": (rank, in_features), "B": (out_features, rank)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = B A. We always train with alpha = rank, so the scale is 1. PEFT keeps a convolution's factors 4-D."""
    return Factors(flatten(parameters["B"]), flatten(parameters["A"]))


def initial(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    """A uniform in ±1/√in, as PEFT draws it, B zero."""
    bound = shapes["A"][1] ** -0.5
    return {
        "A": (torch.rand(shapes["A"], generator=generator) * 2 - 1) * bound,
        "B": torch.zeros(shapes["B"]),
    }


METHOD = register_method(
    Method(
        name="lora",
        summary="LoRA (Hu et al. 2021) through PEFT, alpha = rank",
        shapes=shapes,
        factors=factors,
        initial=initial,
        peft=Peft("LORA", lambda rank, steps: {"r": rank, "lora_alpha": rank}, {"A": "lora_A", "B": "lora_B"}),
    )
)
