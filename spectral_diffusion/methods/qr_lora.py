"""QR-LoRA (Yang et al. 2025): an orthonormal basis of a band stays, and what it is multiplied by learns."""

from __future__ import annotations

from ..linalg import Factors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """dR (r, in), zero at the start: half of a LoRA's numbers."""
    return {"dR": (rank, in_features)}


def factors(parameters: Tensors, frozen: Tensors) -> Factors:
    """ΔW = Q ΔR, where the band is U_b S_b V_bᵀ = Q R.

    Any orthonormal basis of the band's column space serves as Q, as ΔR turns with it; U_b is one.
    """
    return Factors(frozen["U"], parameters["dR"])


METHOD = register_method(
    Method(
        name="qr-lora",
        summary="QR-LoRA (Yang et al. 2025, arXiv 2507.04599): a slot's orthonormal columns stay, their factor learns",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
    )
)
