"""Spectral Adapter A: fine-tune r columns of U and V additively (paper, sec. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors
from .registry import Method, Shapes, Tensors, register_method


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A_U (out, r) and A_V (in, r), both zero at the start."""
    return {"A_U": (out_features, rank), "A_V": (in_features, rank)}


def shapes_with_values(out_features: int, in_features: int, rank: int) -> Shapes:
    """Those and A_S (r), on the singular values: the reference code has it, the paper has not."""
    return {**shapes(out_features, in_features, rank), "A_S": (rank,)}


def prepare(parameters: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """ΔW = (U_b + A_U) (S_b + A_S) (V_b + A_V)ᵀ − U_b S_b V_bᵀ without cancellation; up (…, out, 2r), down (…, 2r, in).

    As ``[A_U, U_b] · [S' V'ᵀ ; S_b A_Vᵀ + A_S V'ᵀ]`` with V' = V_b + A_V and S' = S_b + A_S. The naive difference
    loses its digits in half precision; this form has none to lose and is exactly zero for zero parameters.
    """
    U, S, V = frozen["U"], frozen["S"], frozen["V"]
    A_U, A_V, A_S = parameters["A_U"], parameters["A_V"], parameters.get("A_S")
    up, S = torch.cat([A_U, U], -1), S[..., None, :]
    if A_S is None:
        down = torch.cat([(V + A_V) * S, A_V * S], -1)
    else:
        V, A_S = V + A_V, A_S[..., None, :]
        down = torch.cat([V * (S + A_S), A_V * S + V * A_S], -1)
    return {"up": up, "down": down.mT}


def factors(prepared: Tensors, frozen: Tensors) -> Factors:
    """What :func:`prepare` made of one layer."""
    return Factors(prepared["up"], prepared["down"])


METHOD = register_method(
    Method(
        name="spectral-additive",
        summary="Spectral Adapter A: r columns of U and V, additively (paper, sec. 2)",
        shapes=shapes,
        factors=factors,
        prepare=prepare,
        prepared_on=("U", "S", "V"),
        builds_on="columns",
        normalizable=True,
        slot="columns",
        frozen_up=True,
    )
)
WITH_VALUES = register_method(
    Method(
        name="spectral-additive-s",
        summary="Spectral Adapter A with r trained singular values too (the reference code's form)",
        shapes=shapes_with_values,
        factors=factors,
        prepare=prepare,
        prepared_on=("U", "S", "V"),
        builds_on="columns",
        normalizable=True,
        slot="columns",
        frozen_up=True,
    )
)
