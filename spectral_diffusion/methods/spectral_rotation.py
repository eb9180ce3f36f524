"""Spectral Adapter R: rotate r columns of U and of V by Cayley maps (paper, sec. 2 and 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors, cayley_change, compose_changes
from .registry import Method, Shapes, Tensors, register


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A_U and A_V (r, r), whose skew parts turn the columns of U and V."""
    return {"A_U": (rank, rank), "A_V": (rank, rank)}


def shapes_with_values(out_features: int, in_features: int, rank: int) -> Shapes:
    """Those and c (r): the singular values become S (1 + c)."""
    return {**shapes(out_features, in_features, rank), "c": (rank,)}


def prepare(parameters: Tensors) -> dict[str, Tensor]:
    """D = R − I of both rotations, in one batched solve over leading dimensions."""
    turned = cayley_change(torch.stack([parameters["A_U"], parameters["A_V"]]))
    return {**parameters, "D_U": turned[0], "D_V": turned[1]}


def total(prepared: Tensors, frozen: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """(D_U, D_V, c) from the band on: an earlier training's start composed with this one's (Lemma 4.1)."""
    D_U, D_V, c = prepared["D_U"], prepared["D_V"], prepared.get("c")
    if "D_U" in frozen:
        D_U, D_V = compose_changes(frozen["D_U"], D_U), compose_changes(frozen["D_V"], D_V)
    if "c" in frozen:
        c = frozen["c"] if c is None else frozen["c"] + c + frozen["c"] * c
    return D_U, D_V, c


def factors(prepared: Tensors, frozen: Tensors) -> Factors:
    """ΔW = U_b M V_bᵀ with M = R_U S' R_Vᵀ − S, S' = S (1 + c); up (out, r), down (r, in).

    M = D_U S' R_Vᵀ + S' D_Vᵀ + S c, which has no cancellation. The columns of U R_U and V R_V are orthonormal again.
    """
    U, S, V = frozen["U"], frozen["S"], frozen["V"]
    D_U, D_V, c = total(prepared, frozen)
    with torch.autocast(U.device.type, enabled=False):
        scaled = S if c is None else S * (1 + c)
        M = (D_U * scaled) @ (D_V + torch.eye(len(S), dtype=D_V.dtype, device=D_V.device)).mT + scaled[:, None] * D_V.mT
        if c is not None:
            M = M + torch.diag(S * c)
        return Factors(U @ M, V.mT)


METHOD = register(
    Method(
        name="spectral-rotation",
        summary="Spectral Adapter R: r columns of U and V, rotated by Cayley maps (paper, sec. 2)",
        shapes=shapes,
        factors=factors,
        frozen="band",
        slot="columns",
        prepare=prepare,
    )
)
WITH_VALUES = register(
    Method(
        name="spectral-rotation-s",
        summary="Spectral Adapter R with r trained scales of the singular values too",
        shapes=shapes_with_values,
        factors=factors,
        frozen="band",
        slot="columns",
        prepare=prepare,
    )
)
