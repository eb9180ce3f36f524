"""LoRA-XS (Bałazy et al. 2024): a small matrix between the frozen singular vectors of a band."""

from __future__ import annotations

from ..linalg import Factors, SandwichFactors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """R (r, r), zero at the start; the paper draws it with a deviation of 1e-5."""
    return {"R": (rank, rank)}


def core(parameters: Tensors, frozen: Tensors) -> SandwichFactors:
    """ΔW = U_b S_b R V_bᵀ."""
    return SandwichFactors(frozen["U"], frozen["S"][..., :, None] * parameters["R"], frozen["V"].mT)


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """The same as up (out, r), down (r, in)."""
    return core(parameters, frozen).factors()


METHOD = register_method(
    Method(
        name="lora-xs",
        summary="LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): r × r numbers between a slot's frozen columns",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
        sandwich=core,
        lr_scale=10.0,
    )
)
