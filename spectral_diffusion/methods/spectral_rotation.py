"""Spectral Adapter R: rotate r columns of U and of V by Cayley maps (paper, sec. 2 and 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factors, SandwichFactors, cayley_change, compose_changes
from .registry import Method, Shapes, Tensors, register_method

PREPARED_ON = ("S", "D_U", "D_V", "c")


def shapes(out_features: int, in_features: int, rank: int) -> Shapes:
    """A_U and A_V (r, r), whose skew parts turn the columns of U and V."""
    return {"A_U": (rank, rank), "A_V": (rank, rank)}


def shapes_with_values(out_features: int, in_features: int, rank: int) -> Shapes:
    """Those and c (r): the singular values become S (1 + c)."""
    return {**shapes(out_features, in_features, rank), "c": (rank,)}


def prepare(parameters: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """D = R − I of both rotations in one batched solve, and M = R_U S' R_Vᵀ − S with S' = S (1 + c).

    An earlier training's start is composed with this one's (Lemma 4.1): D_U, D_V and c are relative to the band.
    M = D_U S' R_Vᵀ + S' D_Vᵀ + S c has no cancellation. Over leading dimensions, never below float32.
    """
    S = frozen["S"]
    with torch.autocast(S.device.type, enabled=False):
        D_U, D_V = cayley_change(torch.stack([parameters["A_U"], parameters["A_V"]]))
        if "D_U" in frozen:
            D_U, D_V = compose_changes(frozen["D_U"], D_U), compose_changes(frozen["D_V"], D_V)
        c = parameters.get("c")
        if "c" in frozen:
            c = frozen["c"] if c is None else frozen["c"] + c + frozen["c"] * c
        scaled = S if c is None else S * (1 + c)
        eye = torch.eye(S.shape[-1], dtype=D_V.dtype, device=D_V.device)
        M = (D_U * scaled[..., None, :]) @ (D_V + eye).mT + scaled[..., :, None] * D_V.mT
        if c is None:
            return {"D_U": D_U, "D_V": D_V, "M": M}
        return {"D_U": D_U, "D_V": D_V, "c": c, "M": M + torch.diag_embed(S * c)}


def core(prepared: Tensors, frozen: Tensors) -> SandwichFactors:
    """ΔW = U_b M V_bᵀ between frozen columns. The columns of U R_U and V R_V are orthonormal again."""
    return SandwichFactors(frozen["U"], prepared["M"], frozen["V"].mT)


def factors(prepared: Tensors, frozen: Tensors) -> Factors:
    """The same as up (out, r), down (r, in)."""
    with torch.autocast(frozen["U"].device.type, enabled=False):
        return core(prepared, frozen).factors()


def continue_from(parameters: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """The rotated columns as the new start: U R_U and V R_V are orthonormal again (Lemma 4.1), so no new SVD is needed.

    The new start's D = R − I is composed with what the new training adds.
    """
    turned = prepare(parameters, frozen)
    return {**frozen, **{name: value for name, value in turned.items() if name in PREPARED_ON}}


METHOD = register_method(
    Method(
        name="spectral-rotation",
        summary="Spectral Adapter R: r columns of U and V, rotated by Cayley maps (paper, sec. 2)",
        shapes=shapes,
        factors=factors,
        builds_on="columns",
        slot="columns",
        sandwich=core,
        prepare=prepare,
        prepared_on=PREPARED_ON,
        continue_from=continue_from,
        lr_scale=10.0,
    )
)
WITH_VALUES = register_method(
    Method(
        name="spectral-rotation-s",
        summary="Spectral Adapter R with r trained scales of the singular values too",
        shapes=shapes_with_values,
        factors=factors,
        builds_on="columns",
        slot="columns",
        sandwich=core,
        prepare=prepare,
        prepared_on=PREPARED_ON,
        continue_from=continue_from,
        lr_scale=10.0,
    )
)
