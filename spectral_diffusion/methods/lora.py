"""LoRA (Hu et al. 2021), trained through PEFT: the yardstick of every other method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..linalg import Band, Factors, flatten
from .registry import Method, Shapes, register


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A (r, in), random at the start; B (out, r), zero at the start."""
    return {"A": (rank, in_features), "B": (out_features, rank)}


def factors(parameters: Mapping[str, Tensor], band: Band | None) -> Factors:
    """ΔW = B A. We always train with alpha = rank, so the scale is 1. PEFT keeps a convolution's factors 4-D."""
    return Factors(flatten(parameters["B"]), flatten(parameters["A"]))


METHOD = register(
    Method(
        name="lora",
        summary="LoRA (Hu et al. 2021) through PEFT, alpha = rank",
        banded=False,
        shapes=shapes,
        factors=factors,
        rank_of_delta=lambda rank: rank,
    )
)
