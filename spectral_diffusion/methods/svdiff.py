"""SVDiff (Han et al. 2023): all singular values, shifted."""

from __future__ import annotations

from ..linalg import Factors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """delta (min(out, in)), zero at the start."""
    return {"delta": (min(out_features, in_features),)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = U diag(δ) Vᵀ; W' = U (S + δ) Vᵀ. Of full rank."""
    return Factors(frozen["U"] * parameters["delta"], frozen["V"].mT)


METHOD = register_method(
    Method(
        name="svdiff",
        summary="SVDiff (Han et al. 2023): every singular value shifted; it has no rank",
        shapes=shapes,
        factors=factors,
        builds_on="full_svd",
        low_rank=False,
        lr_scale=10.0,
        ranks=lambda sides: (1,),
    )
)
