"""Spectral Adapter A: fine-tune r columns of U and V additively (paper, sec. 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..linalg import Band, Factors
from .registry import Method, Shapes, register


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A_U (out, r) and A_V (in, r), both zero at the start."""
    return {"A_U": (out_features, rank), "A_V": (in_features, rank)}


def factors(parameters: Mapping[str, Tensor], band: Band | None) -> Factors:
    """ΔW = (U_b + A_U) S_b (V_b + A_V)ᵀ − U_b S_b V_bᵀ as ``[A_U, U_b] · [S_b (V_b + A_V)ᵀ ; S_b A_Vᵀ]``.

    The naive difference loses its digits to cancellation in half precision; this form has none and is
    exactly zero for A_U = A_V = 0. up (out, 2r), down (2r, in).
    """
    assert band is not None
    A_U, A_V = parameters["A_U"], parameters["A_V"]
    up = torch.cat([A_U, band.U], dim=1)
    down = torch.cat([band.V + A_V, A_V], dim=1) * torch.cat([band.S, band.S])
    return Factors(up, down.mT)


METHOD = register(
    Method(
        name="spectral-additive",
        summary="Spectral Adapter A: r columns of U and V, additively (paper, sec. 2)",
        banded=True,
        shapes=shapes,
        factors=factors,
        rank_of_delta=lambda rank: 2 * rank,
    )
)
